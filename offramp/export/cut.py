"""The cut: from one graph with several exits to one graph per segment (DESIGN: the segment contract).

Says which tensors cross each boundary and builds the segments' graphs. What a tensor is comes from probing,
what crosses is decided by the minimum cut; nothing here knows any particular model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from offramp.bundle import PREVIOUS_ROWS, ROWS, DimensionSpec, InputSpec, TensorSpec
from offramp.errors import CutError
from offramp.export.costs import CostModel
from offramp.export.graph import GraphView, describe_node
from offramp.export.mincut import CutProblem, minimum_carry
from offramp.export.probe import Arrays, Probe, probe_graph
from offramp.export.segment_graph import SegmentPlan, carry_specs, segment_graph

MIN_OPSET = 11  # TopK and ArgMax as the score head uses them


@dataclass(frozen=True)
class Segment:
    """One segment of a cut model."""

    index: int
    model: ModelProto
    carried: tuple[str, ...]  # names, in the whole graph, of the tensors that it hands on
    carry_in: tuple[TensorSpec, ...]
    carry_out: tuple[TensorSpec, ...]
    rerun: tuple[str, ...]  # operators of earlier segments that it runs again


@dataclass(frozen=True)
class CutModel:
    """All segments, the number of classes, and where to read the carried dimensions that no input has."""

    segments: tuple[Segment, ...]
    num_classes: int
    derived: Mapping[str, tuple[str, int]]  # dimension name -> a tensor of the whole graph, and its axis


def segments_from_graph(
    model: ModelProto,
    exits: Sequence[str],
    inputs: Sequence[InputSpec],
    dimensions: Mapping[str, DimensionSpec],
    example: Arrays,
) -> CutModel:
    """Cut `model` at `exits`, output names in order of depth; the last one is the final exit.

    `example` maps input names to arrays with rows first; they are cut or repeated to the sizes probed.
    Raises CutError, with the tensor or operator named, when the graph cannot be cut there, and CaptureError when
    a dimension is not dynamic as declared.
    """
    view = GraphView(model)
    _check_graph(view, exits)
    probe = probe_graph(view, inputs, dimensions, example)
    num_classes = _check_exits(probe, exits)
    plans = _plan_segments(view, probe, exits, CostModel())
    segments: list[Segment] = []
    before: tuple[str, ...] = ()
    for index, plan in enumerate(plans):
        segments.append(
            Segment(
                index=index,
                model=segment_graph(view, probe, plan, inputs, num_classes),
                carried=plan.carried,
                carry_in=carry_specs(probe, before, "carry_in", PREVIOUS_ROWS),
                carry_out=carry_specs(probe, plan.carried, "carry_out", ROWS),
                rerun=tuple(describe_node(view.nodes[i]) for i in sorted(plan.rerun)),
            )
        )
        before = plan.carried
    return CutModel(tuple(segments), num_classes, _derived_dimensions(probe, plans, dimensions))


def _check_graph(view: GraphView, exits: Sequence[str]) -> None:
    opset = next((entry.version for entry in view.model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise CutError(
            f"graph has opset {opset}, expected at least {MIN_OPSET}; convert it with onnx.version_converter"
        )
    if not exits or len(set(exits)) != len(exits):
        raise CutError(f"got exits {', '.join(exits) or '(none)'}, expected at least one, each once")
    unknown = [name for name in exits if name not in view.output_names]
    if unknown:
        raise CutError(
            f"unknown exit {', '.join(unknown)}: the graph's outputs are {', '.join(view.output_names)}; "
            f"pass `--exits` with some of these, in order of depth"
        )
    for name in exits:
        if view.producer.get(name) is None or view.producer[name] in view.constant_nodes:
            raise CutError(f"exit {name!r} does not depend on any input; check which output it is")


def _check_exits(probe: Probe, exits: Sequence[str]) -> int:
    """Every exit is (rows, C) float32 with the same C >= 2, row by row; returns C."""
    classes = set()
    for name in exits:
        facts = probe.tensors[name]
        shape = tuple(probe.dimension(law) for law in facts.laws)
        if len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2 or facts.dtype != "float32":
            raise CutError(
                f"exit {name!r} is {facts.dtype} of shape {shape}; expected float32 logits of shape (rows, classes) "
                f"with at least 2 classes"
            )
        if not facts.has_row_axis:
            raise CutError(
                f"exit {name!r} of shape {shape}: the answer of a row changes with the other rows of its batch, or "
                f"the batch is fixed; export in eval() with an example batch of at least 2"
            )
        classes.add(shape[1])
    if len(classes) != 1:
        raise CutError(f"exits have different numbers of classes: {sorted(classes)}; expected the same everywhere")
    return classes.pop()


def _plan_segments(view: GraphView, probe: Probe, exits: Sequence[str], costs: CostModel) -> list[SegmentPlan]:
    """Minimum cuts at all boundaries, with shapes read off what each segment has.

    A Shape operator needs lengths, not data: where its tensor is not at hand, the lengths come from a carried
    tensor of the same law. Where no carried tensor has that law, the operator is pinned, which makes its tensor
    count as needed data, and everything is cut again.
    """
    pinned: frozenset[int] = frozenset()
    while True:
        reads = [
            () if node.op_type == "Shape" and i not in pinned and node.input[0] in probe.tensors else view.reads[i]
            for i, node in enumerate(view.nodes)
        ]
        problem = costs.problem(view, probe, reads)
        plans = _cut_boundaries(view, problem, reads, exits, probe)
        resolved = [plan.with_sources(view, probe) for plan in plans]
        unresolved = frozenset().union(*(plan.unresolved for plan in resolved))
        if not unresolved:
            return resolved
        pinned |= unresolved


def _cut_boundaries(
    view: GraphView, problem: CutProblem, reads: Sequence[Sequence[str]], exits: Sequence[str], probe: Probe
) -> list[SegmentPlan]:
    plans: list[SegmentPlan] = []
    before: tuple[str, ...] = ()
    rerun: frozenset[int] = frozenset()
    for index, name in enumerate(exits):
        existing = view.upstream(exits[: index + 1], reads)
        carried: tuple[str, ...] = ()
        rerun_next: frozenset[int] = frozenset()
        if index + 1 < len(exits):
            if view.producer[exits[index + 1]] in existing:
                raise CutError(
                    f"exit {exits[index + 1]!r} adds nothing to exit {name!r}; list the exits in order of depth"
                )
            carry = minimum_carry(problem, existing, view.upstream(exits[index + 1 :], reads) - existing)
            if carry.forbidden:
                raise CutError(_explain_forbidden(probe, name, carry.forbidden))
            carried, rerun_next = carry.tensors, carry.rerun
        nodes = view.upstream((name, *carried), reads, frozenset(before))
        plans.append(SegmentPlan(index, name, before, carried, nodes, rerun & nodes))
        before, rerun = carried, rerun_next
    return plans


def _explain_forbidden(probe: Probe, exit_name: str, names: Sequence[str]) -> str:
    shapes = ", ".join(
        f"{name!r} of shape ({', '.join(str(probe.dimension(law)) for law in probe.tensors[name].laws)})"
        for name in names
    )
    return (
        f"cutting after exit {exit_name!r} would carry {shapes}, whose first axis is not the row axis; move the row "
        f"axis first in the model (batch_first), or drop this exit"
    )


def _derived_dimensions(
    probe: Probe, plans: Sequence[SegmentPlan], dimensions: Mapping[str, DimensionSpec]
) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for plan in plans:
        for name in plan.carried:
            for axis, law in enumerate(probe.tensors[name].laws):
                symbol = probe.dimension(law)
                if isinstance(symbol, str) and symbol != ROWS and symbol not in dimensions:
                    found.setdefault(symbol, (name, axis))
    return found
