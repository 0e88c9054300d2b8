"""Runs segments with ONNX Runtime on the CPU. The only module of the runtime that imports onnxruntime.

Inputs and outputs are plain numpy arrays: OrtValues cost more per call than they save (DESIGN, Runtime).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from offramp.bundle import (
    INVERSE_TEMPERATURE,
    ROW_OUTPUTS,
    ROWS,
    SCORES,
    Dimension,
    ExitSpec,
    Manifest,
    SegmentSpec,
    TensorSpec,
    read_file,
)
from offramp.cpu import saturates_bytes
from offramp.errors import BackendError, BundleError, CorruptError, OptionError
from offramp.runtime.engine import SegmentOutput

# Default optimisation of a graph with FP16 initialisers kills the process on the CPU
# (microsoft/onnxruntime#26717). A graph made elsewhere may hold some whatever its precision is called, so
# it is off for all.
# Its fused SkipLayerNormalization takes twice the time of an addition and a LayerNormalization: without it an encoder
# is 2 to 9 % faster with two threads (tuned_ratio in bench/results/chain_vs_uncut.json).
_DISABLED_OPTIMIZERS = ("FuseFp16InitializerToFp32NodeTransformer", "SkipLayerNormFusion")
_DTYPES = {  # ONNX Runtime's name of a tensor type -> numpy's
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


Feed = dict[str, NDArray[Any]]


class OnnxRuntimeEngine:
    """One segment in one InferenceSession; its carry is a list of numpy arrays.

    Late inputs of later segments go beside the graph: they are the last arrays of a carry.
    """

    keeps_carries = True

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest, index: int) -> None:
        segment, exit_spec = manifest.segments[index], manifest.exits[index]
        self._session: onnxruntime.InferenceSession | None = session
        self._index = segment.index
        self._model_inputs = segment.inputs
        self._carry_names = [tensor.name for tensor in segment.carry_in]
        self._outputs = [tensor.name for tensor in _expected_outputs(segment, exit_spec)]
        self._num_carried = len(segment.carry_out)
        self._has_gap = list(exit_spec.row_outputs) != list(ROW_OUTPUTS[: len(exit_spec.row_outputs)])
        self._input_shapes = {spec.name: spec.shape for spec in manifest.inputs}
        self._late_in = _late_inputs(manifest, index)
        self._late_out = _late_inputs(manifest, index + 1)
        late_shapes = [self._input_shapes[name] for name in self._late_in]
        self._carry_shapes = [tensor.shape for tensor in segment.carry_in] + late_shapes

    def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
        """See Engine.run. Raises BackendError when ONNX Runtime fails or the engine is closed."""
        if self._session is None:
            raise BackendError(f"running segment {self._index}: the engine is closed; open the bundle again")
        late: dict[str, NDArray[Any]] = {}
        if self._index:
            feed = dict(zip(self._carry_names, carry, strict=not self._late_in))
            feed[ROWS] = rows
            if self._late_in:
                beside = carry[len(self._carry_names) :]
                late = {name: array[rows] for name, array in zip(self._late_in, beside, strict=True)}
                feed |= {name: late[name] for name in self._model_inputs}
        else:
            feed = {name: carry[name] for name in self._model_inputs}
            late = carry
        feed[INVERSE_TEMPERATURE] = np.asarray(inverse_temperature)  # a 0-d array: it takes no numpy scalar
        try:
            values = self._session.run(self._outputs, feed)
        except Exception as exc:  # ONNX Runtime's errors have no common base below Exception
            raise BackendError(
                f"running segment {self._index} on {len(rows)} rows with ONNX Runtime "
                f"{onnxruntime.__version__}: {exc}; try fewer rows at once, or `offramp verify` the bundle"
            ) from exc
        if self._has_gap:  # retention, and no learned confidence before it
            values.insert(-1, None)
        handed = values[: self._num_carried] + [late[name] for name in self._late_out]
        return SegmentOutput(handed, *values[self._num_carried :])

    def trimmed(self, carry: Any, dimension: str, size: int) -> Any:
        """See Engine.trimmed: views of the arrays, which ONNX Runtime copies."""
        if not self._index:
            return {name: array[_first(size, dimension, self._input_shapes[name])] for name, array in carry.items()}
        handed = zip(carry, self._carry_shapes, strict=True)
        return [array[_first(size, dimension, shape)] for array, shape in handed]

    def merged(self, parts: Sequence[tuple[Any, NDArray[np.int64]]]) -> list[NDArray[Any]]:
        """See Engine.merged. Every row is copied once."""
        total = sum(len(rows) for _, rows in parts)
        merged = []
        for tensors in zip(*(carry for carry, _ in parts), strict=True):
            whole = np.empty((total, *tensors[0].shape[1:]), tensors[0].dtype)
            start = 0
            for tensor, (_, rows) in zip(tensors, parts, strict=True):
                end = start + len(rows)
                np.take(tensor, rows, axis=0, out=whole[start:end], mode="clip")  # "raise" would copy twice
                start = end
            merged.append(whole)
        return merged

    def close(self) -> None:
        """See Engine.close."""
        self._session = None


class OnnxRuntimeGraph:
    """One graph in one InferenceSession that reads and writes arrays where they lie: what a decoder is made of.

    A decoder's call has a hundred tensors, most of which stay where they are from token to token: handing them over
    once instead of at every call saves a millisecond of 23 (docs/log.md).
    """

    def __init__(self, session: onnxruntime.InferenceSession, name: str) -> None:
        self._session, self._name = session, name

    def bound(self, inputs: Feed, outputs: Feed) -> Callable[[], None]:
        """A call of the graph: reads `inputs` as they are then and writes `outputs`. It raises BackendError.

        All arrays are contiguous, and not moved as long as the call is used.
        """
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        kept = inputs, outputs

        def call() -> None:
            try:
                self._session.run_with_iobinding(binding)
            except Exception as exc:  # ONNX Runtime's errors have no common base below Exception
                shapes = ", ".join(f"{name} {array.shape}" for name, array in kept[0].items())
                raise BackendError(
                    f"running {self._name} of a decoder with ONNX Runtime {onnxruntime.__version__} on {shapes}: {exc}"
                ) from exc

        return call


def open_onnxruntime_engines(bundle: Path, manifest: Manifest, precision: str, threads: int) -> list[OnnxRuntimeEngine]:
    """One engine per segment, from the graphs of `precision`; `threads=0` is ONNX Runtime's default.

    Raises OptionError, CorruptError (a file, or a tensor that is not the manifest's) or BundleError.
    """
    return [
        _engine_from_segment(bundle, manifest, index, precision, threads) for index in range(len(manifest.segments))
    ]


def _engine_from_segment(
    bundle: Path, manifest: Manifest, index: int, precision: str, threads: int
) -> OnnxRuntimeEngine:
    segment, exit_spec = manifest.segments[index], manifest.exits[index]
    record = segment.graphs.get(precision)
    if record is None:
        raise OptionError(
            f"opening {bundle}: segment {segment.index} has no {precision!r} graph, expected one of "
            f"{', '.join(sorted(segment.graphs)) or 'none at all'}; choose that precision, or export it"
        )
    place = bundle / record.path
    session = open_session(read_file(bundle, record), threads, str(place))
    _check_tensors(session.get_inputs(), _expected_inputs(session.get_inputs(), segment), f"{place}: input")
    _check_tensors(session.get_outputs(), _expected_outputs(segment, exit_spec), f"{place}: output")
    return OnnxRuntimeEngine(session, manifest, index)


def _late_inputs(manifest: Manifest, index: int) -> list[str]:
    """Model inputs that segment `index` >= 1 or one after it is given directly, in the model's order."""
    read = {name for segment in manifest.segments[max(index, 1) :] for name in segment.inputs} if index else set()
    return [spec.name for spec in manifest.inputs if spec.name in read]


def _first(size: int, dimension: str, shape: tuple[Dimension, ...]) -> tuple[slice, ...]:
    """The index that takes the first `size` along `dimension` of an array of `shape`."""
    return tuple(slice(size if name == dimension else None) for name in shape)


def open_session(
    content: bytes, threads: int, place: str, left_out: Sequence[str] = _DISABLED_OPTIMIZERS
) -> onnxruntime.InferenceSession:
    """A CPU session for the graph `content`, which came from `place`, as engines use it. Raises BundleError."""
    try:
        return onnxruntime.InferenceSession(
            content,
            _session_options(threads),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(left_out),
        )
    except Exception as exc:  # ONNX Runtime's errors have no common base below Exception
        raise BundleError(
            f"opening {place}: ONNX Runtime {onnxruntime.__version__} refuses it: {exc}; "
            f"export the bundle again with this version installed"
        ) from exc


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # its errors come back as exceptions; here they would be said twice
    # Threads spin for work within a run and sleep between runs: pools that go on spinning, one per segment, made
    # everything 3 times slower on 2 cores; pools that never spin cost 20 % on short inputs (docs/log.md).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if saturates_bytes():  # signed weights become unsigned ones, for slower kernels that do not saturate
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _expected_inputs(got: list[Any], segment: SegmentSpec) -> tuple[TensorSpec, ...]:
    """The inputs of the segment contract; the model's own are the manifest's affair, checked per request."""
    temperature = TensorSpec(INVERSE_TEMPERATURE, "float32", ())
    nodes = {node.name: node for node in got}
    specs = [_spec_from_node(nodes[name]) if name in nodes else TensorSpec(name, "", ()) for name in segment.inputs]
    given = (*specs, temperature)
    return (TensorSpec(ROWS, "int64", (ROWS,)), *segment.carry_in, *given) if segment.index else given


def _expected_outputs(segment: SegmentSpec, exit_spec: ExitSpec) -> tuple[TensorSpec, ...]:
    """The outputs of the segment contract, in its order."""
    return (
        *segment.carry_out,
        TensorSpec("logits", "float32", (ROWS, exit_spec.num_classes)),
        TensorSpec("prediction", "int64", (ROWS,)),
        TensorSpec("scores", "float32", (ROWS, len(SCORES))),
        *(TensorSpec(name, "float32", (ROWS,)) for name in exit_spec.row_outputs),
    )


def _spec_from_node(node: Any) -> TensorSpec:
    return TensorSpec(node.name, _DTYPES.get(node.type, node.type), tuple(node.shape))


def _check_tensors(nodes: list[Any], expected: tuple[TensorSpec, ...], place: str) -> None:
    """Raise CorruptError, naming the tensor, unless `nodes` are the tensors `expected`, in any order."""
    got = {node.name: _spec_from_node(node) for node in nodes}
    names = {tensor.name for tensor in expected}
    if got.keys() != names:
        raise CorruptError(
            f"{place}s are {', '.join(sorted(got))}; the manifest expects {', '.join(sorted(names))}; "
            f"export the bundle again"
        )
    for tensor in expected:
        found = got[tensor.name]
        if found.dtype != tensor.dtype or not _is_compatible(found.shape, tensor.shape):
            raise CorruptError(
                f"{place} {tensor.name!r} is {found.dtype} {found.shape}, the manifest expects "
                f"{tensor.dtype} {tensor.shape}; export the bundle again"
            )


def _is_compatible(got: tuple[Dimension | None, ...], expected: tuple[Dimension, ...]) -> bool:
    """Same rank, and every dimension that both know as a number the same; what must vary is not fixed."""
    return len(got) == len(expected) and all(
        have == want if isinstance(have, int) else True for have, want in zip(got, expected, strict=True)
    )
