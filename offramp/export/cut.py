"""The cut: from one graph with several exits to one graph per segment (DESIGN: the segment contract).

Says which tensors cross each boundary and builds the segments' graphs. What a tensor is comes from probing,
what crosses is decided by the minimum cut; nothing here knows any particular model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import ModelProto, inliner

from offramp.bundle import HIDDEN, LEARNED, PREVIOUS_ROWS, ROW_OUTPUTS, ROWS, DimensionSpec, InputSpec, TensorSpec
from offramp.errors import CutError
from offramp.export.check_graph import check_graph
from offramp.export.costs import CostModel
from offramp.export.graph import GraphView, describe_node
from offramp.export.lengths import with_lengths_read
from offramp.export.mincut import CutProblem, minimum_carry
from offramp.export.probe import Probe, probe_graph
from offramp.export.roles import NO_ROLES, Roles
from offramp.export.row_outputs import WORDS
from offramp.export.segment_graph import LOGITS, SegmentPlan, carry_specs, head_graph, segment_graph, state_specs
from offramp.export.simplify import reshape_target
from offramp.export.sizes import Arrays

_ANSWERS = frozenset({LOGITS, HIDDEN, *ROW_OUTPUTS})  # the other outputs of an exit are states
_FLOATS = frozenset({"float16", "float32", "float64"})


@dataclass(frozen=True)
class Segment:
    """One segment of a cut model."""

    index: int
    model: ModelProto
    carried: tuple[str, ...]  # names, in the whole graph, of the tensors that it hands on
    carry_in: tuple[TensorSpec, ...]
    carry_out: tuple[TensorSpec, ...]
    rerun: tuple[str, ...]  # operators of earlier segments that it runs again
    inputs: tuple[str, ...] = ()  # model inputs that it is given
    states: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True)
class CutModel:
    """All segments, the number of classes, and where to read the carried dimensions that no input has."""

    segments: tuple[Segment, ...]
    num_classes: int
    derived: Mapping[str, tuple[str, int]]  # dimension name -> a tensor of the whole graph, and its axis
    heads: Mapping[str, ModelProto]  # exit -> its separate head, where it has one


@dataclass(frozen=True)
class ProbedGraph:
    """A whole graph and what its tensors are: looked at once, cut as often as one likes."""

    view: GraphView
    probe: Probe
    inputs: Sequence[InputSpec]
    dimensions: Mapping[str, DimensionSpec]


def segments_from_graph(
    model: ModelProto,
    exits: Sequence[str],
    inputs: Sequence[InputSpec],
    dimensions: Mapping[str, DimensionSpec],
    example: Arrays,
    roles: Roles = NO_ROLES,
) -> CutModel:
    """Cut `model` at `exits`, output names in order of depth; the last one is the final exit.

    `example` maps input names to arrays with rows first; they are cut or repeated to the sizes probed. What
    `roles` names of an exit is part of what it needs; so is a state that is made on the way to it.
    Raises CutError, with the tensor or operator named, when the graph cannot be cut there, and CaptureError when
    a dimension is not dynamic as declared.
    """
    return segments_from_probed(probed_graph(model, exits, inputs, dimensions, example, roles), exits, roles)


def probed_graph(
    model: ModelProto,
    exits: Sequence[str],
    inputs: Sequence[InputSpec],
    dimensions: Mapping[str, DimensionSpec],
    example: Arrays,
    roles: Roles = NO_ROLES,
) -> ProbedGraph:
    """`model`, found fit to be cut at `exits` or some of them, and run on `example`. Arguments and errors as above."""
    view = GraphView(inliner.inline_local_functions(model) if model.functions else model)
    check_graph(view, exits, roles.row_outputs)
    _check_roles(view, exits, roles)
    probe = probe_graph(view, inputs, dimensions, example)
    return ProbedGraph(*with_lengths_read(view, probe, frozenset(dimensions)), inputs, dimensions)


def segments_from_probed(probed: ProbedGraph, exits: Sequence[str], roles: Roles = NO_ROLES) -> CutModel:
    """Cut a probed graph at `exits`; what `roles` say of others does not count. Raises CutError."""
    view, probe, inputs = probed.view, probed.probe, probed.inputs
    row_outputs = {name: roles.row_outputs[name] for name in exits if name in roles.row_outputs}
    heads = {name: roles.heads[name] for name in exits if name in roles.heads}
    roles = replace(roles, row_outputs=row_outputs, heads=heads)
    num_classes = _check_exits(probe, exits, roles)
    _check_row_outputs(probe, roles)
    plans = _plan_segments(view, probe, exits, roles, CostModel())
    apart = {name: head_graph(view, probe, (name, hidden), num_classes) for name, hidden in heads.items()}
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
                inputs=plan.inputs,
                states=state_specs(probe, plan.states),
            )
        )
        before = plan.carried
    derived = _derived_dimensions(probe, plans, probed.dimensions)
    return CutModel(tuple(segments), num_classes, derived, apart)


def _check_roles(view: GraphView, exits: Sequence[str], roles: Roles) -> None:
    """Raise CutError unless every name is one of the graph's, and some input is not late."""
    inputs, outputs = set(view.input_names), set(view.output_names)
    wrong = {*roles.late, *roles.states.values()} - inputs | {*roles.states, *roles.heads.values()} - outputs
    if wrong or not set(roles.heads) <= set(exits) or inputs <= set(roles.late):
        raise CutError(
            f"late inputs {', '.join(roles.late) or '(none)'}, states {', '.join(roles.states) or '(none)'}, heads of "
            f"{', '.join(roles.heads) or '(none)'}: the graph has inputs {', '.join(sorted(inputs))} (one at least "
            f"must not be late), outputs {', '.join(sorted(outputs))} and exits {', '.join(exits)}"
        )


def _check_exits(probe: Probe, exits: Sequence[str], roles: Roles) -> int:
    """Every exit is (rows, C) floats with the same C, row by row; returns C. With a separate head, (rows, X, C).

    C is at least 2, or 1 for a regression, whose exits before the final one need a learned confidence: a single number
    says nothing of how sure it is.
    """
    classes = {}
    has_learned = [LEARNED in roles.row_outputs.get(name, {}) for name in exits[:-1]]
    least = 1 if has_learned and all(has_learned) else 2
    for name in (*exits, *roles.heads.values()):
        facts, shape = probe.tensors[name], probe.shape(name)
        drawn = f"({', '.join(map(str, shape))})"
        rank = 3 if name in roles.heads or name not in exits else 2
        if len(shape) != rank or not isinstance(shape[-1], int) or shape[-1] < least or facts.dtype not in _FLOATS:
            hint = (
                "; a binary exit needs two logits, such as (0, x), a regression learned confidences"
                if shape[1:] == (1,)
                else ""
            )
            raise CutError(
                f"exit {name!r} is {facts.dtype} of shape {drawn}; expected floating-point logits of shape "
                f"({'rows, classes' if rank == 2 else 'rows, positions, classes'}) with at least 2 classes{hint}"
            )
        if facts.row_axis != 0:
            raise CutError(
                f"exit {name!r} of shape {drawn}: the answer of a row changes with the other rows of its batch, or "
                f"the batch is fixed; export in eval() with an example batch of at least 2"
            )
        if name in exits:
            classes[name] = shape[-1]
    if len(set(classes.values())) != 1:
        counts = ", ".join(f"{name} {count}" for name, count in classes.items())
        raise CutError(f"exits have different numbers of classes: {counts}; expected the same everywhere")
    return classes.popitem()[1]


def _check_row_outputs(probe: Probe, roles: Roles) -> None:
    """Every one is (rows,) or (rows, 1) floats, or one per position at an exit with a separate head, row by row."""
    for exit_name, found in roles.row_outputs.items():
        head = roles.heads.get(exit_name)
        shapes = [probe.shape(head)[:2]] if head else [(ROWS,), (ROWS, 1)]
        for kind, name in found.items():
            facts, shape = probe.tensors[name], probe.shape(name)
            if facts.dtype not in _FLOATS or shape not in shapes or facts.row_axis != 0:
                raise CutError(
                    f"{WORDS[kind].called} {name!r} of exit {exit_name!r} is {facts.dtype} of shape "
                    f"({', '.join(map(str, shape))}); expected floating-point numbers of shape (rows,) or (rows, 1), "
                    f"each of its row alone"
                )


def _plan_segments(
    view: GraphView, probe: Probe, exits: Sequence[str], roles: Roles, costs: CostModel
) -> list[SegmentPlan]:
    """Minimum cuts at all boundaries, with shapes read off what each segment has.

    A Shape operator needs lengths, not data: where its tensor is not at hand, the lengths come from a carried
    tensor of the same law. Where no carried tensor has that law, or the law is not one because values decide the
    shape, the operator is pinned, which makes its tensor count as needed data, and everything is cut again.
    """
    needed = _needed_reads(view, probe)
    shapes = {i: node.input[0] for i, node in enumerate(view.nodes) if node.op_type == "Shape"}
    lawless = view.data_shaped | {name for name, facts in probe.tensors.items() if facts.dtype == "none"}
    pinned = frozenset(i for i, name in shapes.items() if name not in probe.tensors or name in lawless)
    late = view.made_from(roles.late)
    while True:
        taken = [() if i in shapes and i not in pinned else read for i, read in enumerate(needed)]
        reads = [tuple(name for name in read if name not in roles.late) for read in taken]
        problem = costs.problem(view, probe, reads)
        prices = {name: None if name in late else price for name, price in problem.carry_ns.items()}
        outputs = _outputs(view, exits, roles, reads)
        plans = _cut_boundaries(view, replace(problem, carry_ns=prices), reads, outputs, probe)
        plans = [_with_roles(view, plan, roles, taken) for plan in plans]
        resolved = [plan.with_sources(view, probe) for plan in plans]
        unresolved = frozenset().union(*(plan.unresolved for plan in resolved))
        if not unresolved:
            return resolved
        pinned |= unresolved


def _outputs(
    view: GraphView, exits: Sequence[str], roles: Roles, reads: Sequence[Sequence[str]]
) -> list[dict[str, str]]:
    """What leaves the whole graph at each exit, by its name in the segment.

    A state belongs to the first exit on whose way it is made, or else to the final one.
    """
    found: list[dict[str, str]] = []
    left = list(roles.states)
    for index, name in enumerate(exits):
        answer = {HIDDEN: roles.heads[name]} if name in roles.heads else {LOGITS: name}
        found.append({**answer, **roles.row_outputs.get(name, {})})
        existing = view.upstream(_names(found), reads)
        is_final = index + 1 == len(exits)
        made = [state for state in left if is_final or view.producer[state] in existing]
        found[-1] |= {state: state for state in made}
        left = [state for state in left if state not in made]
    return found


def _with_roles(view: GraphView, plan: SegmentPlan, roles: Roles, reads: Sequence[Sequence[str]]) -> SegmentPlan:
    """The plan with its states, and the model inputs that it is given: late ones where their data is read."""
    read = {name for index in plan.nodes for name in reads[index]}
    given = [name for name in view.input_names if (name in read if name in roles.late else plan.index == 0)]
    return replace(plan, inputs=tuple(given), states=tuple(name for name in plan.outputs if name in roles.states))


def _needed_reads(view: GraphView, probe: Probe) -> list[Sequence[str]]:
    """What each node reads, but for targets of Reshapes that `simplify` makes constants: nothing is to be carried,
    nor any length computed, for those."""
    needed: list[Sequence[str]] = []
    for node, read in zip(view.nodes, view.reads, strict=True):
        is_known = node.op_type == "Reshape" and all(
            name in probe.tensors and probe.tensors[name].dtype != "none" and name not in view.data_shaped
            for name in (node.input[0], node.output[0])
        )
        if is_known and reshape_target(probe.shape(node.input[0]), probe.shape(node.output[0])) is not None:
            read = tuple(name for name in read if name != node.input[1] or name == node.input[0])
        needed.append(read)
    return needed


def _cut_boundaries(
    view: GraphView,
    problem: CutProblem,
    reads: Sequence[Sequence[str]],
    exits: Sequence[Mapping[str, str]],
    probe: Probe,
) -> list[SegmentPlan]:
    plans: list[SegmentPlan] = []
    before: tuple[str, ...] = ()
    rerun: frozenset[int] = frozenset()
    for index, outputs in enumerate(exits):
        existing = view.upstream(_names(exits[: index + 1]), reads)
        carried: tuple[str, ...] = ()
        rerun_next: frozenset[int] = frozenset()
        if index + 1 < len(exits):
            answers = [name for output, name in exits[index + 1].items() if output in _ANSWERS]
            if ready := [name for name in answers if view.producer[name] in existing]:
                raise CutError(
                    f"exit {ready[0]!r} adds nothing to exit {next(iter(outputs.values()))!r}; list the exits in "
                    f"order of depth, or drop one of them"
                )
            later = view.upstream(_names(exits[index + 1 :]), reads)
            carry = minimum_carry(problem, existing, later - existing)
            if carry.forbidden:
                raise CutError(_explain_forbidden(probe, next(iter(outputs.values())), carry.forbidden))
            carried, rerun_next = carry.tensors, carry.rerun
        nodes = view.upstream((*outputs.values(), *carried), reads, frozenset(before))
        plans.append(SegmentPlan(index, outputs, before, carried, nodes, rerun & nodes))
        before, rerun = carried, rerun_next
    return plans


def _names(exits: Sequence[Mapping[str, str]]) -> Iterable[str]:
    return itertools.chain.from_iterable(outputs.values() for outputs in exits)


def _explain_forbidden(probe: Probe, exit_name: str, names: Sequence[str]) -> str:
    shapes = ", ".join(
        f"{name!r} of shape ({', '.join(map(str, probe.shape(name)))})"
        if probe.tensors[name].dtype != "none"
        else f"{name!r} of a shape that depends on values"
        for name in names
    )
    return (
        f"cutting after exit {exit_name!r} would carry {shapes}, where no axis is the row axis: rows are folded "
        f"into another axis there, or depend on each other; place this exit where the model has one row per request"
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
