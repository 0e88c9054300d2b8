"""What each tensor of a graph is, found out by running the graph: its shape law and its row axis.

Symbolic shape inference gives up on graphs that compute shapes; a graph that runs does not. Shapes of all tensors
are read at several sizes: two axes have the same *law* when they had the same length at every size. Values are read
once, at a small size: an axis is the *row axis* when choosing rows of the inputs and choosing along it are the same
thing, which is exactly what a cut needs to be right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, ValueInfoProto, helper

from offramp.bundle import ROWS, Dimension, DimensionSpec, InputSpec
from offramp.errors import CaptureError, CutError
from offramp.export.graph import GraphView
from offramp.export.sizes import Arrays, Size, nominal_size, other_lengths, other_values, probing_sizes, resize_inputs

Law = tuple[int, ...]  # length of an axis at each probed size
Shapes = dict[str, tuple[int, ...]]  # of all tensors, at one size
Run = Callable[[Arrays], dict[str, Any]]

_NUM_ROWS = 5
# Of these, rows that are also run without the others: neither sorted nor everybody, and one alone.
_CHOSEN_ROWS = (np.array([3, 0, 4]), np.array([1]))
# FP32 kernels may sum in another order for another batch; anything that mixes rows is far above this.
_ROW_TOLERANCES = {"float16": (1e-2, 1e-2), "float32": (1e-3, 1e-4), "float64": (1e-3, 1e-4)}
_ENOUGH = 16  # length of an axis at which rows show what they depend on; longer only costs memory
_FIXED_BATCH = (
    "its batch was fixed when it was exported; export it with an example batch of at least 2 and a dynamic first axis"
)
_SHAPE_PREFIX = "offramp/shape_of/"


@dataclass(frozen=True)
class TensorFacts:
    """What probing found about one tensor."""

    dtype: str  # "none" for what has no shape law: a sequence, a tensor that changes its rank or follows values
    laws: tuple[Law, ...]  # per axis
    row_axis: int | None  # a row along it depends on that row of the inputs alone
    bytes_per_row: float  # at the nominal size


@dataclass(frozen=True)
class Probe:
    """The facts about every tensor that the inputs decide, and a name for every law that changes with them."""

    tensors: Mapping[str, TensorFacts]
    symbols: Mapping[Law, str]  # the rows, the inputs' dimensions under their names, others as dim_0, dim_1, …

    def dimension(self, law: Law) -> Dimension:
        """A law as a dimension of a shape: the length when it never changes, else its name."""
        return law[0] if len(set(law)) == 1 else self.symbols[law]

    def shape(self, name: str) -> tuple[Dimension, ...]:
        return tuple(self.dimension(law) for law in self.tensors[name].laws)


def probe_graph(
    view: GraphView, inputs: Sequence[InputSpec], dimensions: Mapping[str, DimensionSpec], example: Arrays
) -> Probe:
    """Run `view` at several sizes around `example` and say what every tensor is.

    Raises CutError when ONNX Runtime cannot run the graph, CaptureError when a dimension declared dynamic is in
    truth fixed, or when the example cannot show what a row is.
    """
    nominal = nominal_size(inputs, dimensions, example)
    _check_rows_differ(resize_inputs(inputs, example, nominal))
    dtypes, sizes, shapes = _measured(view, inputs, dimensions, example)
    every = {name: _laws([shape[name] for shape in shapes]) for name in shapes[0] if dtypes[name] != "none"}
    laws = {name: axes for name, axes in every.items() if axes is not None}
    row_axes = _row_axes(view, inputs, example, sizes, laws)
    tensors = {}
    for name, dtype in dtypes.items():
        if name not in laws:
            tensors[name] = TensorFacts("none", (), None, 0.0)
            continue
        num_bytes = np.prod(shapes[0][name], dtype=np.int64) * np.dtype(dtype).itemsize
        tensors[name] = TensorFacts(dtype, laws[name], row_axes.get(name), float(num_bytes) / nominal[ROWS])
    return Probe(tensors, _symbols(dimensions, sizes, laws))


def _measured(
    view: GraphView, inputs: Sequence[InputSpec], dimensions: Mapping[str, DimensionSpec], example: Arrays
) -> tuple[dict[str, str], list[Size], list[Shapes]]:
    """The dtype of every tensor, the sizes at which the graph runs, the nominal one first, and the shapes there."""
    run, dtypes = run_shapes(view)
    first, *others = probing_sizes(nominal_size(inputs, dimensions, example), dimensions)
    found = [(first, _nominal_shapes(run, inputs, example, first))]
    for size in others:
        with contextlib.suppress(CutError):  # a graph may refuse some lengths; whether it refuses all comes next
            found.append((size, run(resize_inputs(inputs, example, size))))
    found += _missing_lengths(run, inputs, example, dimensions, [size for size, _ in found])
    with contextlib.suppress(CutError):  # the graph may refuse values made up
        other = run(other_values(inputs, resize_inputs(inputs, example, first)))
        dtypes |= {name: "none" for name, shape in found[0][1].items() if other[name] != shape}
    return dtypes, [size for size, _ in found], [shape for _, shape in found]


def _laws(shapes: Sequence[tuple[int, ...]]) -> tuple[Law, ...] | None:
    """Per axis its lengths; None when the rank changes."""
    return tuple(zip(*shapes, strict=True)) if len({len(shape) for shape in shapes}) == 1 else None


def _symbols(
    dimensions: Mapping[str, DimensionSpec], sizes: Sequence[Size], laws: Mapping[str, tuple[Law, ...]]
) -> dict[Law, str]:
    symbols = {tuple(size[symbol] for size in sizes): symbol for symbol in (*dimensions, ROWS)}
    count = 0
    for law in (law for axes in laws.values() for law in axes if len(set(law)) > 1):
        if law not in symbols:
            while (name := f"dim_{count}") in dimensions:
                count += 1
            symbols[law] = name
            count += 1
    return symbols


def _check_rows_differ(feed: Arrays) -> None:
    if all((value == value[:1]).all() for value in feed.values()):
        raise CaptureError(
            f"all rows of the example are the same ({', '.join(feed)}): that cannot show whether rows depend on each "
            f"other, nor calibrate FP16; pass rows that differ, real data if possible"
        )


def _nominal_shapes(run: Run, inputs: Sequence[InputSpec], example: Arrays, nominal: Size) -> Shapes:
    """All shapes at the nominal size; CaptureError when only another number of rows runs."""
    try:
        return run(resize_inputs(inputs, example, nominal))
    except CutError as exc:
        refusal = exc
    for rows in (1, 2, len(next(iter(example.values())))):
        with contextlib.suppress(CutError):
            run(resize_inputs(inputs, example, {**nominal, ROWS: rows}))
            raise CaptureError(
                f"the graph runs with {rows} rows and not with {nominal[ROWS]}: {_FIXED_BATCH} ({refusal})"
            ) from refusal
    raise refusal


def _missing_lengths(
    run: Run,
    inputs: Sequence[InputSpec],
    example: Arrays,
    dimensions: Mapping[str, DimensionSpec],
    ran: Sequence[Size],
) -> list[tuple[Size, Shapes]]:
    """Runs at which every dimension has changed that did not in `ran`; CaptureError for one that cannot."""
    found: list[tuple[Size, Shapes]] = []
    nominal = ran[0]
    for symbol in dimensions:
        lengths = other_lengths(nominal, dimensions, symbol)
        if symbol == ROWS or not lengths or len({size[symbol] for size in ran}) > 1:
            continue
        refusal = None
        for length in lengths:
            size = {**nominal, symbol: length, ROWS: 3}
            try:
                found.append((size, run(resize_inputs(inputs, example, size))))
            except CutError as exc:
                refusal = exc
        if not any(size[symbol] != nominal[symbol] for size, _ in found):
            names = ", ".join(spec.name for spec in inputs if symbol in spec.shape)
            raise CaptureError(
                f"dimension {symbol!r} of {names} is declared dynamic but the graph runs at {nominal[symbol]} and not "
                f"at {', '.join(map(str, lengths))} ({refusal}); export with an example batch of at least 2 rows and "
                f"that dimension dynamic, declare it static, or give dimensions that must be equal one name"
            ) from refusal
    return found


def _row_axes(
    view: GraphView,
    inputs: Sequence[InputSpec],
    example: Arrays,
    sizes: Sequence[Size],
    laws: Mapping[str, tuple[Law, ...]],
) -> dict[str, int]:
    """The row axis of those tensors that have one."""
    rows_law = tuple(size[ROWS] for size in sizes)
    free = [symbol for symbol in sizes[0] if symbol != ROWS]
    enough = [size for size in sizes if all(size[symbol] >= min(_ENOUGH, sizes[0][symbol]) for symbol in free)]
    small = min(enough, key=lambda size: sum(size[symbol] for symbol in free))
    candidates = [name for name in laws if rows_law in laws[name]]
    run = run_tensors(view, candidates)
    feed = resize_inputs(inputs, example, {**small, ROWS: _NUM_ROWS})
    values, parts = run(feed), []
    for chosen in _CHOSEN_ROWS:
        try:
            parts.append((chosen, run({name: value[chosen] for name, value in feed.items()})))
        except CutError as exc:
            raise CaptureError(
                f"the graph runs with {_NUM_ROWS} rows and not with {len(chosen)}: {_FIXED_BATCH} ({exc})"
            ) from exc
    axes = {}
    for name in candidates:
        for axis in (axis for axis, law in enumerate(laws[name]) if law == rows_law):
            if all(_is_same(np.take(values[name], chosen, axis), part[name]) for chosen, part in parts):
                axes[name] = axis
                break
    return axes


def _is_same(expected: NDArray[np.generic], got: NDArray[np.generic]) -> bool:
    if expected.shape != got.shape:
        return False
    tolerance = _ROW_TOLERANCES.get(expected.dtype.name)
    if tolerance is None:
        return bool(np.array_equal(expected, got))
    return bool(np.allclose(got, expected, *tolerance, equal_nan=True))


def run_shapes(view: GraphView) -> tuple[Run, dict[str, str]]:
    """A function from the inputs to the shapes of all tensors that they decide, and the dtypes of these tensors.

    Values stay inside: only the outputs of added Shape operators leave. Sequences have dtype "none" and no shape.
    Raises CutError when ONNX Runtime cannot load the graph; the function does when it cannot run it.
    """
    names = [
        name
        for index, node in enumerate(view.nodes)
        if index not in view.constant_nodes
        for name in node.output
        if name
    ]
    types = {value.name: value.type for value in _open(view, GraphProto(), names).get_outputs()}
    given = {value.name: value.type for value in view.model.graph.input if value.name in view.input_names}
    dtypes = {name: helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type).name for name, kind in given.items()}
    dtypes |= {name: _numpy_dtype(types[name]) for name in names}
    measured = [name for name in names if types[name].startswith("tensor(")]
    nodes = [helper.make_node("Shape", [name], [_SHAPE_PREFIX + name]) for name in measured]
    outputs = [_SHAPE_PREFIX + name for name in measured]
    session = _open(view, GraphProto(node=nodes), outputs)

    def run(feed: Arrays) -> dict[str, Any]:
        shapes = [tuple(shape.tolist()) for shape in _run(session, outputs, feed)]
        return {name: np.shape(value) for name, value in feed.items()} | dict(zip(measured, shapes, strict=True))

    return run, dtypes


def run_tensors(view: GraphView, names: Sequence[str]) -> Run:
    """A function from the inputs to the tensors `names` and the inputs themselves.

    Raises CutError when ONNX Runtime cannot load the graph; the function does when it cannot run it.
    """
    wanted = [name for name in names if name not in view.input_names]
    session = _open(view, GraphProto(), wanted)

    def run(feed: Arrays) -> dict[str, Any]:
        return dict(feed) | dict(zip(wanted, _run(session, wanted, feed), strict=True))

    return run


def _open(view: GraphView, more: GraphProto, outputs: Sequence[str]) -> ort.InferenceSession:
    """A session that leaves the graph as it is, with operators added and with `outputs` besides its own."""
    more.output.extend(ValueInfoProto(name=name) for name in outputs if name not in view.output_names)
    # Protobuf reads two messages one after another as one: fields add up, and the weights need no copy.
    content = view.model.SerializeToString() + ModelProto(graph=more).SerializeToString()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # it never gives back, and these runs are few
    # A Shape runs as soon as its tensor is there, which is then freed; by default they come last, and all is kept.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of the weights
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # ONNX Runtime's exceptions have no common base of their own
        raise CutError(f"ONNX Runtime cannot load the whole graph: {exc}") from exc


def _run(session: ort.InferenceSession, outputs: Sequence[str], feed: Arrays) -> list[Any]:
    try:
        values: list[Any] = session.run(outputs, dict(feed)) if outputs else []
    except Exception as exc:
        raise CutError(f"ONNX Runtime cannot run the whole graph: {exc}") from exc
    return values


def _numpy_dtype(kind: str) -> str:
    """ONNX Runtime's name of a type as numpy's; "none" for what numpy has not."""
    names = {"float": "float32", "double": "float64"}
    inner = kind.removeprefix("tensor(").removesuffix(")")
    inner = names.get(inner, inner)
    known = kind.startswith("tensor(") and inner in {"bool", "float16", "float32", "float64", *_INTEGERS}
    return inner if known else "none"


_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
