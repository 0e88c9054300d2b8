"""What each tensor of a graph is, found out by running the graph: its shape law and its row axis.

Symbolic shape inference gives up on graphs that compute shapes; a graph that runs does not. The whole graph is
run on ONNX Runtime with every tensor as an output, at several sizes. A tensor has the *row axis first* when
choosing rows of the inputs and choosing rows of the tensor are the same thing, which is exactly what a cut needs
to be right. Two axes have the same *law* when they had the same length at every size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from offramp.bundle import ROWS, Dimension, DimensionSpec, InputSpec
from offramp.errors import CaptureError, CutError
from offramp.export.graph import RANDOM_OPERATORS, GraphView, describe_node

Arrays = Mapping[str, NDArray[np.generic]]
Law = tuple[int, ...]  # length of an axis at each probed size

# Rows of each probe: no two equal, none equal to a usual head count, so that an axis that follows them is no accident.
_ROW_COUNTS = (5, 3, 7, 2, 11)
_CHOSEN_ROWS = np.array([3, 0, 4])  # of the first probe's five: neither sorted nor everybody
# FP32 kernels may sum in another order for another batch; anything that mixes rows is far above this.
_ROW_RTOL, _ROW_ATOL = 1e-3, 1e-4


@dataclass(frozen=True)
class TensorFacts:
    """What probing found about one tensor."""

    dtype: str
    laws: tuple[Law, ...]  # per axis
    has_row_axis: bool  # first axis is the row axis, and a row depends on that row alone
    bytes_per_row: float  # at the nominal size


@dataclass(frozen=True)
class Probe:
    """The facts about every tensor that the inputs decide, and a name for every law that changes with them."""

    tensors: Mapping[str, TensorFacts]
    symbols: Mapping[Law, str]  # the rows, the inputs' dimensions under their names, others as dim_0, dim_1, …

    def dimension(self, law: Law) -> Dimension:
        """A law as a dimension of a shape: the length when it never changes, else its name."""
        return law[0] if len(set(law)) == 1 else self.symbols[law]


def probe_graph(
    view: GraphView, inputs: Sequence[InputSpec], dimensions: Mapping[str, DimensionSpec], example: Arrays
) -> Probe:
    """Run `view` at several sizes around `example` and say what every tensor is.

    Raises CutError for graphs that ONNX Runtime cannot run or that draw random numbers, CaptureError when a
    dimension declared dynamic is in truth fixed.
    """
    _check_deterministic(view)
    run = run_tensors(view)
    wanted = _sizes(inputs, dimensions, example)
    nominal, *others = wanted
    feed = resize_inputs(inputs, example, nominal)
    _check_runs(run, inputs, example, nominal)
    values = run(feed)
    chosen = run({name: value[_CHOSEN_ROWS] for name, value in feed.items()})
    sizes, shapes = [nominal], [{name: np.shape(value) for name, value in values.items()}]
    for size in others:
        try:
            other = run(resize_inputs(inputs, example, size))
        except CutError:
            continue  # a graph may refuse some lengths; whether it refuses all is checked below
        sizes.append(size)
        shapes.append({name: np.shape(value) for name, value in other.items()})
    _check_dynamic(run, inputs, example, wanted, sizes)
    symbols = {tuple(size[symbol] for size in sizes): symbol for symbol in (*dimensions, ROWS)}
    rows_law = tuple(size[ROWS] for size in sizes)
    tensors = {
        name: _facts(value, chosen[name], [shape[name] for shape in shapes], rows_law) for name, value in values.items()
    }
    derived = (law for facts in tensors.values() for law in facts.laws if len(set(law)) > 1)
    for law in derived:
        symbols.setdefault(law, f"dim_{len(symbols)}")
    return Probe(tensors, symbols)


def resize_inputs(
    inputs: Sequence[InputSpec], example: Arrays, size: Mapping[str, int]
) -> dict[str, NDArray[np.generic]]:
    """The example inputs cut or repeated to `size`; repeated rows are rotated so that no two are the same."""
    return {spec.name: _resize(spec, np.asarray(example[spec.name]), size) for spec in inputs}


def _resize(spec: InputSpec, value: NDArray[np.generic], size: Mapping[str, int]) -> NDArray[np.generic]:
    for axis, dimension in enumerate(spec.shape):
        if not isinstance(dimension, str) or (wanted := size[dimension]) == value.shape[axis]:
            continue
        have = value.shape[axis]
        copies = [value]
        for turn in range(1, -(-wanted // have)):
            rotate = axis == 0 and value.ndim > 1 and not spec.is_mask
            copies.append(np.roll(value, turn, axis=-1) if rotate else value)
        value = np.take(np.concatenate(copies, axis), range(wanted), axis)
    if spec.is_mask:
        value = value.copy()
        value.reshape(len(value), -1)[:, 0] = 1  # cutting must not leave a row without a token
    return np.ascontiguousarray(value)


def _sizes(
    inputs: Sequence[InputSpec], dimensions: Mapping[str, DimensionSpec], example: Arrays
) -> list[dict[str, int]]:
    """Sizes to probe, the nominal one first: every symbol takes its own sequence of lengths."""
    nominal = {
        dimension: np.asarray(example[spec.name]).shape[axis]
        for spec in inputs
        for axis, dimension in enumerate(spec.shape)
        if isinstance(dimension, str)
    }
    sizes = []
    for turn, rows in enumerate(_ROW_COUNTS):
        size = {ROWS: rows}
        for offset, (symbol, limits) in enumerate(dimensions.items()):
            if symbol == ROWS:
                continue
            length = nominal[symbol]
            choices = (length, length // 2 + 1 + offset, length + 2 + offset, max(length // 3, 4), length + 5)
            size[symbol] = min(max(choices[turn], limits.min), limits.max)
        sizes.append(size)
    return sizes


def _check_deterministic(view: GraphView) -> None:
    for node in view.nodes:
        if node.op_type in RANDOM_OPERATORS:
            raise CutError(
                f"cutting the graph: {describe_node(node)} draws random numbers; remove it or export in eval()"
            )


def _check_runs(
    run: Callable[[Arrays], object], inputs: Sequence[InputSpec], example: Arrays, nominal: Mapping[str, int]
) -> None:
    """Raise CaptureError when the graph runs with some number of rows but not with the nominal one."""
    try:
        run(resize_inputs(inputs, example, nominal))
        return
    except CutError as exc:
        refusal = exc
    for rows in (1, 2, len(next(iter(example.values())))):
        with contextlib.suppress(CutError):
            run(resize_inputs(inputs, example, {**nominal, ROWS: rows}))
            raise CaptureError(
                f"the graph runs with {rows} rows and not with {nominal[ROWS]}: its batch was fixed when it was "
                f"exported; export it with an example batch of at least 2 and a dynamic first axis ({refusal})"
            ) from refusal
    raise refusal


def _check_dynamic(
    run: Callable[[Arrays], object],
    inputs: Sequence[InputSpec],
    example: Arrays,
    sizes: Sequence[Mapping[str, int]],
    ran: Sequence[Mapping[str, int]],
) -> None:
    """Raise CaptureError for the first dimension that cannot change although several lengths of it were tried."""
    for symbol in sizes[0]:
        if len({size[symbol] for size in ran}) > 1 or len({size[symbol] for size in sizes}) == 1:
            continue
        for size in sizes[1:]:
            alone = {**sizes[0], symbol: size[symbol]}
            try:
                run(resize_inputs(inputs, example, alone))
            except CutError as exc:
                names = ", ".join(spec.name for spec in inputs if symbol in spec.shape)
                raise CaptureError(
                    f"dimension {symbol!r} of {names} is declared dynamic but the graph runs at {sizes[0][symbol]} and "
                    f"not at {size[symbol]} ({exc}); export with an example batch of at least 2 rows and that "
                    f"dimension dynamic, or declare it static"
                ) from exc


def run_tensors(view: GraphView, names: Sequence[str] = ()) -> Callable[[Arrays], dict[str, NDArray[np.generic]]]:
    """A function from the inputs to the tensors `names` and the inputs themselves; every tensor by default.

    Raises CutError when ONNX Runtime cannot load the graph; the function does when it cannot run it.
    """
    wanted = list(names) or [
        name
        for index, node in enumerate(view.nodes)
        if index not in view.constant_nodes
        for name in node.output
        if name
    ]
    observed = ModelProto()
    observed.CopyFrom(view.model)
    del observed.graph.output[:]
    observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(observed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # ONNX Runtime's exceptions have no common base of their own
        raise CutError(f"ONNX Runtime cannot load the whole graph: {exc}") from exc

    def run(feed: Arrays) -> dict[str, NDArray[np.generic]]:
        try:
            values = session.run(wanted, dict(feed))
        except Exception as exc:
            raise CutError(f"ONNX Runtime cannot run the whole graph: {exc}") from exc
        return dict(feed) | dict(zip(wanted, values, strict=True))

    return run


def _facts(value: object, chosen: object, shapes: Sequence[tuple[int, ...]], rows_law: Law) -> TensorFacts:
    """Facts from a tensor's value at the nominal size, on the chosen rows of it, and its shape at every size."""
    if not isinstance(value, np.ndarray) or any(len(shape) != value.ndim for shape in shapes):
        return TensorFacts("none", (), False, 0.0)  # a sequence, an optional, or a tensor that changes its rank
    laws = tuple(tuple(shape[axis] for shape in shapes) for axis in range(value.ndim))
    has_row_axis = bool(laws) and laws[0] == rows_law and _same_rows(value, np.asarray(chosen))
    return TensorFacts(value.dtype.name, laws, has_row_axis, value.nbytes / rows_law[0])


def _same_rows(value: NDArray[np.generic], chosen: NDArray[np.generic]) -> bool:
    """Is `chosen` what selecting the chosen rows of `value` gives?"""
    expected = value[_CHOSEN_ROWS]
    if expected.shape != chosen.shape:
        return False
    if value.dtype.kind == "f":
        return bool(np.allclose(chosen, expected, _ROW_RTOL, _ROW_ATOL, equal_nan=True))
    return bool(np.array_equal(chosen, expected))
