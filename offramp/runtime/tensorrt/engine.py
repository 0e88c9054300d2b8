"""The TensorRT engines of a bundle: plans shared by all threads, one worker per thread.

A thread that runs the engines for the first time gets a worker: contexts, buffers and graphs of its own. The worker of
a thread that has ended goes to the next new thread. What is needed of CUDA and TensorRT comes as a Device and
LoadedPlans, so that everything here runs on a FakeDevice too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import (
    INVERSE_TEMPERATURE,
    ROW_OUTPUTS,
    ROWS,
    SCORES,
    Manifest,
    PlanRecord,
    SegmentSpec,
    read_file,
)
from offramp.errors import BackendError, BundleError, PlanError
from offramp.plan import check_plan_header
from offramp.runtime.engine import SegmentOutput
from offramp.runtime.tensorrt.device import Device, LoadedPlan, PlanTensor, Shape
from offramp.runtime.tensorrt.lane import PlannedSegment, RowRange
from offramp.runtime.tensorrt.options import TensorRtOptions
from offramp.runtime.tensorrt.worker import GraphSwitch, Worker


class TensorRtChain:
    """The segments of a bundle on a GPU; `engines` run them."""

    def __init__(
        self, segments: Sequence[PlannedSegment], open_device: Callable[[], Device], options: TensorRtOptions
    ) -> None:
        self._segments, self._open_device = tuple(segments), open_device
        has_own_graphs = any(segment.plan.has_own_graphs for segment in segments)
        self._switch = GraphSwitch(options.graphs and not has_own_graphs)
        self._speculates = options.speculate
        self._lock = threading.Lock()
        self._local = threading.local()
        self._workers: list[tuple[threading.Thread, Worker]] = []
        self._num_open = len(segments)
        self.worker()  # memory that does not suffice is found out now
        self.engines = [TensorRtEngine(self, segment.spec.index) for segment in segments]

    def worker(self) -> Worker:
        """The worker of this thread. Raises BackendError when the GPU has no room for another."""
        found: Worker | None = getattr(self._local, "worker", None)
        if found is None:
            with self._lock:
                found = self._local.worker = self._taken_over() or self._new_worker()
                self._workers.append((threading.current_thread(), found))
        return found

    def release(self) -> None:
        """One engine was closed; the last one gives everything back."""
        with self._lock:
            self._num_open -= 1
            if self._num_open == 0:
                for _, worker in self._workers:
                    worker.close()
                self._workers.clear()
                for segment in self._segments:
                    segment.plan.close()

    def _taken_over(self) -> Worker | None:
        for position, (thread, _) in enumerate(self._workers):
            if not thread.is_alive():
                return self._workers.pop(position)[1]
        return None

    def _new_worker(self) -> Worker:
        device = self._open_device()
        try:
            return Worker(device, self._segments, self._switch, speculates=self._speculates)
        except BaseException:
            device.close()
            raise


class TensorRtEngine:
    """One segment; its carry is a handle to device memory, valid until the segment runs again in the same thread."""

    keeps_carries = False

    def __init__(self, chain: TensorRtChain, index: int) -> None:
        self._chain: TensorRtChain | None = chain
        self._index = index

    def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
        """See Engine.run. Raises BackendError when CUDA or TensorRT fail, and for a carry gone stale."""
        return self._open_chain().worker().run(self._index, carry, rows, inverse_temperature)

    def trimmed(self, carry: Any, dimension: str, size: int) -> Any:
        """See Engine.trimmed: carries stay where and as they are on the device."""
        return carry

    def merged(self, parts: Sequence[Any]) -> Any:
        """Not possible: carries of several requests do not lie in one piece of device memory. Raises BackendError."""
        raise BackendError(
            f"segment {self._index}: the TensorRT backend cannot merge the carries of {len(parts)} requests; pool "
            f"requests before their first segment only, or use backend='onnxruntime'"
        )

    def close(self) -> None:
        """See Engine.close. Closing twice is fine."""
        if self._chain is not None:
            chain, self._chain = self._chain, None
            chain.release()

    def _open_chain(self) -> TensorRtChain:
        if self._chain is None:
            raise BackendError(f"running segment {self._index}: the engine is closed; open the bundle again")
        return self._chain


def open_tensorrt_engines(
    bundle: Path, manifest: Manifest, plans: Sequence[PlanRecord], options: TensorRtOptions
) -> Sequence[TensorRtEngine]:
    """One engine per segment from these plans, one per segment and all of one backend.

    Raises CorruptError for a file that is not the one recorded, PlanError, BackendError or BundleError.
    """
    for segment in manifest.segments[1:]:
        if segment.inputs:
            raise BundleError(
                f"opening segment {segment.index} of {bundle}: it reads the model inputs {', '.join(segment.inputs)}, "
                f"which this version cannot give to a later segment; upgrade with `pip install -U offramp`"
            )
    contents = [read_file(bundle, plan.file) for plan in plans]  # the hash is checked before TensorRT sees a byte
    for content, plan in zip(contents, plans, strict=True):
        check_plan_header(content, plan)
    try:
        from offramp.runtime.tensorrt.cuda_device import open_device
        from offramp.runtime.tensorrt.loaded_plan import load_plans
    except ImportError as exc:
        raise BackendError(
            f"opening {bundle}: cuda-bindings is not installed here ({exc}); "
            f"run `pip install 'offramp[{plans[0].backend}]'`"
        ) from exc
    loaded = load_plans(plans, contents, options.graphs, options.runtime_cache)
    return TensorRtChain(planned_segments(manifest, plans, loaded), open_device, options).engines


def planned_segments(
    manifest: Manifest, plans: Sequence[PlanRecord], loaded: Sequence[LoadedPlan]
) -> list[PlannedSegment]:
    """Every segment with its plan. Raises PlanError, naming the tensors, for a plan of another segment."""
    dtypes = {spec.name: spec.dtype for spec in manifest.inputs} | {ROWS: "int64"}
    shapes = [
        _input_ranges(manifest, segment, record) for segment, record in zip(manifest.segments, plans, strict=True)
    ]
    max_rows = min(high[0] for ranges in shapes for _, high in ranges.values())
    planned = []
    for segment, record, plan in zip(manifest.segments, plans, loaded, strict=True):
        num_classes = manifest.exits[segment.index].num_classes
        row_outputs = tuple(name for name in ROW_OUTPUTS if name in plan.tensors)
        _check_tensors(plan.tensors, _expected(manifest, segment, num_classes, row_outputs), record)
        ranges = shapes[segment.index]
        following = shapes[segment.index + 1 : segment.index + 2]  # takes in as many rows as were run here
        low = [ranges[name][0][0] for name in _uploads(segment)]
        low += [bounds[0][0] for after in following for name, bounds in after.items() if name != ROWS]
        max_shapes = {name: high for name, (_, high) in ranges.items()}
        rows = RowRange(max(low), max_rows)
        planned.append(PlannedSegment(segment, plan, max_shapes, dtypes, rows, num_classes, row_outputs))
    return planned


def _uploads(segment: SegmentSpec) -> tuple[str, ...]:
    return (ROWS,) if segment.index else segment.inputs


def _input_ranges(manifest: Manifest, segment: SegmentSpec, record: PlanRecord) -> dict[str, tuple[Shape, Shape]]:
    """Smallest and largest shape of every input but the temperature; one of fixed shape has no profile."""
    shapes = {spec.name: spec.shape for spec in manifest.inputs} | {t.name: t.shape for t in segment.carry_in}
    ranges = {}
    for name in (*_uploads(segment), *(tensor.name for tensor in segment.carry_in)):
        fixed = tuple(size for size in shapes.get(name, ()) if isinstance(size, int))
        bounds = record.profile.get(name, (fixed,))
        if not bounds[0] or len(bounds[0]) != len(shapes.get(name, (ROWS,))):
            raise PlanError(
                f"{record.file.path}: no profile for input {name!r}; run `offramp build-engine BUNDLE --force`"
            )
        ranges[name] = bounds[0], bounds[-1]
    return ranges


def _expected(
    manifest: Manifest, segment: SegmentSpec, num_classes: int, row_outputs: Sequence[str]
) -> Mapping[str, PlanTensor]:
    """The tensors of the segment contract; -1 for what varies."""
    expected = {INVERSE_TEMPERATURE: PlanTensor("float32", (), True)}
    for spec in manifest.inputs:
        if spec.name in segment.inputs:
            expected[spec.name] = PlanTensor(spec.dtype, _numbers(spec.shape), True)
    if segment.index:
        expected[ROWS] = PlanTensor("int64", (-1,), True)
    for is_input, tensors in ((True, segment.carry_in), (False, segment.carry_out)):
        expected |= {t.name: PlanTensor(t.dtype, _numbers(t.shape), is_input) for t in tensors}
    expected["logits"] = PlanTensor("float32", (-1, num_classes), False)
    expected["prediction"] = PlanTensor("int64", (-1,), False)
    expected["scores"] = PlanTensor("float32", (-1, len(SCORES)), False)
    return expected | {name: PlanTensor("float32", (-1,), False) for name in row_outputs}


def _numbers(shape: Sequence[int | str]) -> Shape:
    return tuple(size if isinstance(size, int) else -1 for size in shape)


def _check_tensors(got: Mapping[str, PlanTensor], expected: Mapping[str, PlanTensor], record: PlanRecord) -> None:
    for name in sorted(got.keys() | expected.keys()):
        have, want = got.get(name), expected.get(name)
        if (
            have is None
            or want is None
            or have[0] != want[0]
            or have[2] != want[2]
            or not _fits(have.shape, want.shape)
        ):
            raise PlanError(
                f"{record.file.path}: its tensor {name!r} is {have or 'missing'}, the manifest expects "
                f"{want or 'none of that name'}; run `offramp build-engine BUNDLE --force`"
            )


def _fits(have: Shape, want: Shape) -> bool:
    """Same rank, and the same wherever both are numbers."""
    return len(have) == len(want) and all(-1 in (a, b) or a == b for a, b in zip(have, want, strict=True))
