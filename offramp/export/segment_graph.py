"""Build the ONNX graph of one segment from a plan of what it computes, takes and hands on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from offramp.bundle import (
    HIDDEN,
    INVERSE_TEMPERATURE,
    PREVIOUS_ROWS,
    ROW_OUTPUTS,
    ROWS,
    Dimension,
    InputSpec,
    TensorSpec,
)
from offramp.errors import CutError
from offramp.export.graph import GraphView, read_names, rename_tensors, walk_nodes
from offramp.export.probe import Probe
from offramp.export.score_head import PREFIX, row_output_constants, row_output_nodes, score_head
from offramp.export.simplify import simplify_graph

LOGITS = "logits"  # the output of every segment
_MAX_PROTOBUF_BYTES = 2**31 - 1  # protobuf's limit for one message

Source = tuple[str, int] | int  # an axis of a tensor at hand, or a length that never changes


@dataclass(frozen=True)
class SegmentPlan:
    """What one segment computes: nodes of the whole graph by index, and tensors of it by name."""

    index: int
    outputs: Mapping[str, str]  # of its exit: LOGITS and those of ROW_OUTPUTS that it has -> the whole graph's name
    carried_in: tuple[str, ...]
    carried: tuple[str, ...]
    nodes: frozenset[int]
    rerun: frozenset[int]
    sources: dict[int, tuple[Source, ...]] = field(default_factory=dict)  # Shape node -> where its lengths are
    unresolved: frozenset[int] = frozenset()  # Shape nodes whose lengths nothing at hand has
    inputs: tuple[str, ...] = ()  # model inputs that it is given
    states: tuple[str, ...] = ()  # those of its outputs that are made for later calls, under their own names

    @property
    def has_separate_head(self) -> bool:
        """Does it put out what another graph makes logits of?"""
        return HIDDEN in self.outputs

    def with_sources(self, view: GraphView, probe: Probe) -> SegmentPlan:
        """The plan with a source for every length that is taken of a tensor which this segment lacks."""
        given = (*self.carried_in, *self.inputs)
        at_hand = {name for index in self.nodes for name in view.nodes[index].output} | set(given)
        sources: dict[int, tuple[Source, ...]] = {}
        unresolved = set()
        for index in self.nodes:
            node = view.nodes[index]
            if node.op_type != "Shape" or node.input[0] in at_hand or node.input[0] not in probe.tensors:
                continue
            found = [self._source(probe, given, law) for law in laws_taken(probe, node)]
            if None in found:
                unresolved.add(index)
            sources[index] = tuple(source for source in found if source is not None)
        return replace(self, sources=sources, unresolved=frozenset(unresolved))

    def _source(self, probe: Probe, given: Sequence[str], law: tuple[int, ...]) -> Source | None:
        dimension = probe.dimension(law)
        if isinstance(dimension, int):
            return dimension
        if dimension == ROWS and self.index:
            return ROWS, 0
        for name in given:
            if law in probe.tensors[name].laws:
                return name, probe.tensors[name].laws.index(law)
        return None


def carry_specs(probe: Probe, names: Sequence[str], prefix: str, rows: str) -> tuple[TensorSpec, ...]:
    """The interface of carried tensors, named by position: `rows` leads, the other axes follow in their order."""
    specs = []
    for position, name in enumerate(names):
        facts = probe.tensors[name]
        others = [probe.dimension(law) for axis, law in enumerate(facts.laws) if axis != facts.row_axis]
        specs.append(TensorSpec(f"{prefix}_{position}", facts.dtype, (rows, *others)))
    return tuple(specs)


def state_specs(probe: Probe, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    """The interface of states, under their own names. Raises CutError for one without rows on its first axis."""
    for name in names:
        if probe.tensors[name].row_axis != 0:
            raise CutError(
                f"state {name!r} of shape {probe.shape(name)}: expected one whose first axis is the row axis"
            )
    return tuple(TensorSpec(name, probe.tensors[name].dtype, probe.shape(name)) for name in names)


def segment_graph(
    view: GraphView, probe: Probe, plan: SegmentPlan, inputs: Sequence[InputSpec], num_classes: int
) -> ModelProto:
    """The graph of `plan`: gather the rows that go on, the segment's own operators, the score head.

    Raises CutError when a model input has a name that the segment contract needs.
    """
    carry_in = carry_specs(probe, plan.carried_in, "carry_in", PREVIOUS_ROWS)
    carry_out = carry_specs(probe, plan.carried, "carry_out", ROWS)
    states = state_specs(probe, plan.states)
    said = {name: tensor for name, tensor in plan.outputs.items() if name in (LOGITS, HIDDEN)}
    if plan.has_separate_head:
        said |= {kind: plan.outputs[kind] for kind in _row_outputs(plan)}
    outputs = said | {name: name for name in plan.states}
    outputs |= {spec.name: name for spec, name in zip(carry_out, plan.carried, strict=True)}
    names = _names(view, probe, plan, outputs)
    head_nodes, head_constants = _head(probe, plan, names, num_classes, view.opset)
    constants: dict[str, TensorProto] = {}
    nodes = _carried_in_nodes(probe, plan, names)
    for index in sorted(plan.nodes):
        if index in plan.sources:
            nodes += _shape_nodes(view.nodes[index], plan.sources[index], names, constants, view.opset)
        else:
            nodes.append(rename_tensors(view.nodes[index], names))
    nodes += [
        _output_node(probe, name, names, output) for output, name in outputs.items() if names.get(name, name) != output
    ]
    graph = GraphProto(
        name=f"segment_{plan.index:02d}",
        node=[*nodes, *head_nodes],
        initializer=[*_weights(view, nodes, names), *constants.values(), *head_constants],
        input=_input_values(plan, inputs, carry_in),
        output=[_value(spec.name, spec.dtype, spec.shape) for spec in (*carry_out, *states)],
        value_info=_inner_values(view, probe, nodes, names, set(outputs)),
    )
    if plan.has_separate_head:
        graph.output.extend(_value(name, "float32", probe.shape(tensor)) for name, tensor in said.items())
    else:
        graph.output.extend(_answer_values(num_classes, _row_outputs(plan)))
    simplify_graph(graph)
    return _finish(view.model, graph)


def head_graph(view: GraphView, probe: Probe, exit_and_hidden: tuple[str, str], num_classes: int) -> ModelProto:
    """A separate head: from `hidden` (rows, width), a position each, to `logits`. Raises CutError."""
    name, hidden = exit_and_hidden
    indices = view.upstream([name], view.reads, frozenset({hidden}))
    read = {tensor for index in indices for tensor in view.reads[index]}
    if needed := sorted(read & set(view.input_names)):
        raise CutError(f"exit {name!r} has a separate head on {hidden!r} but reads {', '.join(needed)} besides")
    # Named by position, so that exits with the same head have the same graph.
    made = [hidden, *(made for index in sorted(indices) for made in view.nodes[index].output)]
    weights = [tensor for index in sorted(indices) for tensor in view.reads[index] if tensor in view.initializers]
    names = {tensor: f"head/{position}" for position, tensor in enumerate(dict.fromkeys([*made, *weights]))}
    as_rows = numpy_helper.from_array(np.array([-1, num_classes], np.int64), f"{PREFIX}one_position_a_row")
    middle = numpy_helper.from_array(np.array([1], np.int64), f"{PREFIX}position_axis")
    body = [rename_tensors(view.nodes[index], names) for index in sorted(indices)]
    for position, node in enumerate(body):
        node.name = f"head/{node.op_type}/{position}"
    flat = f"{PREFIX}flat" if probe.tensors[name].dtype != "float32" else LOGITS
    if is_product := _is_product(view, name, hidden):
        # A product takes positions as rows as they are; a Reshape to an output copies it, 9 % of a vocabulary's time.
        body[-1].input[0], body[-1].output[0] = HIDDEN, flat
    else:
        body = [
            helper.make_node("Unsqueeze", [HIDDEN, middle.name], [names[hidden]], f"{PREFIX}Unsqueeze"),
            *body,
            helper.make_node("Reshape", [names[name], as_rows.name], [flat], f"{PREFIX}Reshape/logits"),
        ]
    if flat != LOGITS:
        body.append(helper.make_node("Cast", [flat], [LOGITS], f"{PREFIX}Cast/logits", to=TensorProto.FLOAT))
    graph = GraphProto(
        name="head",
        node=body,
        initializer=[*_weights(view, body, names), *([] if is_product else [as_rows, middle])],
        input=[_value(HIDDEN, probe.tensors[hidden].dtype, (ROWS, probe.shape(hidden)[-1]))],
        output=[_value(LOGITS, "float32", (ROWS, num_classes))],
    )
    return _finish(view.model, graph)


def _is_product(view: GraphView, name: str, left: str) -> bool:
    """Is tensor `name` the product of `left` and a matrix of weights, so that the rank of `left` does not matter?"""
    node = view.nodes[view.producer[name]]
    if node.op_type != "MatMul" or node.input[0] != left:
        return False
    right = node.input[1]
    while right in view.producer and view.nodes[view.producer[right]].op_type in ("Transpose", "Cast", "Identity"):
        right = view.nodes[view.producer[right]].input[0]
    return right in view.initializers and len(view.initializers[right].dims) == 2


def _weights(view: GraphView, nodes: Sequence[NodeProto], names: Mapping[str, str]) -> list[TensorProto]:
    """The constants that `nodes` read, under their new names."""
    used = {name for node in nodes for name in read_names(node)}
    return [
        _renamed(tensor, names.get(name, name))
        for name, tensor in view.initializers.items()
        if names.get(name, name) in used
    ]


def _head(
    probe: Probe, plan: SegmentPlan, names: Mapping[str, str], num_classes: int, opset: int
) -> tuple[list[NodeProto], list[TensorProto]]:
    """What turns the exit's own outputs into those of the contract."""
    if plan.has_separate_head:
        return [], []
    nodes, constants = score_head(num_classes, opset)
    for kind in _row_outputs(plan):
        tensor = plan.outputs[kind]
        nodes += row_output_nodes(kind, names.get(tensor, tensor), probe.tensors[tensor].dtype)
    return nodes, constants + (row_output_constants() if _row_outputs(plan) else [])


def _row_outputs(plan: SegmentPlan) -> list[str]:
    """Those of ROW_OUTPUTS that its exit has, in their order."""
    return [kind for kind in ROW_OUTPUTS if kind in plan.outputs]


def _names(view: GraphView, probe: Probe, plan: SegmentPlan, outputs: Mapping[str, str]) -> dict[str, str]:
    """New names for tensors of the whole graph: those that the contract asks for, and others that are in its way."""
    carries = {f"carry_{way}_{position}" for way in ("in", "out") for position in range(len(view.producer))}
    reserved = {LOGITS, "prediction", "scores", ROWS, INVERSE_TEMPERATURE, *(carries & view.names)}
    reserved |= {HIDDEN, *_row_outputs(plan)} if plan.has_separate_head else set(_row_outputs(plan))
    if taken := reserved.intersection(view.input_names):
        raise CutError(f"model input {', '.join(sorted(taken))}: offramp uses this name itself; rename the input")
    names = {}
    for name in sorted(reserved & view.names):
        free = next(text for count in itertools.count() if (text := f"{name}:{count}") not in view.names)
        names[name] = free
    made = {name for index in plan.nodes for name in view.nodes[index].output} | set(plan.carried_in)
    made -= set(plan.states)  # they keep their names
    named: dict[str, str] = {}
    for output, name in outputs.items():
        if name in made and name not in named and not _output_operator(probe, name, output):
            named[name] = output
    return names | named


def _carried_in_nodes(probe: Probe, plan: SegmentPlan, names: Mapping[str, str]) -> list[NodeProto]:
    """Gather the rows that go on, and put the row axis back where the whole graph has it."""
    gathers, turns = [], []
    for position, name in enumerate(plan.carried_in):
        result, axis = names.get(name, name), probe.tensors[name].row_axis
        gathered = f"{PREFIX}gathered_{position}" if axis else result
        gathers.append(
            helper.make_node("Gather", [f"carry_in_{position}", ROWS], [gathered], f"{PREFIX}Gather/{position}", axis=0)
        )
        if axis:
            order = list(range(1, len(probe.tensors[name].laws)))
            order.insert(axis, 0)
            turns.append(
                helper.make_node("Transpose", [gathered], [result], f"{PREFIX}Transpose/in/{position}", perm=order)
            )
    return gathers + turns


def _output_node(probe: Probe, name: str, names: Mapping[str, str], output: str) -> NodeProto:
    """The operator that makes `output` of the tensor `name`, which may be an input or have another form."""
    operator = _output_operator(probe, name, output) or "Identity"
    attributes: dict[str, Any] = {}
    if operator == "Cast":
        attributes["to"] = TensorProto.FLOAT
    elif operator == "Transpose":
        facts = probe.tensors[name]
        others = [axis for axis in range(len(facts.laws)) if axis != facts.row_axis]
        attributes["perm"] = [facts.row_axis, *others]
    return helper.make_node(operator, [names.get(name, name)], [output], f"{PREFIX}{operator}/{output}", **attributes)


def _output_operator(probe: Probe, name: str, output: str) -> str:
    """What has to be done to a tensor to become an output of the contract; empty when nothing has."""
    facts = probe.tensors[name]
    if output in (LOGITS, HIDDEN, *ROW_OUTPUTS):
        return "" if facts.dtype == "float32" else "Cast"
    return "Transpose" if facts.row_axis else ""


def _renamed(tensor: TensorProto, name: str) -> TensorProto:
    if tensor.name == name:
        return tensor
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _shape_nodes(
    node: NodeProto, sources: Sequence[Source], names: Mapping[str, str], constants: dict[str, TensorProto], opset: int
) -> list[NodeProto]:
    """Nodes that make what the Shape operator `node` makes, out of lengths that are at hand."""
    result = names.get(node.output[0], node.output[0])

    def constant(length: int) -> str:
        name = f"{PREFIX}length_{length}"
        constants[name] = numpy_helper.from_array(np.array([length], np.int64), name)
        return name

    parts, nodes = [], []
    for position, source in enumerate(sources):
        if isinstance(source, int):
            parts.append(constant(source))
            continue
        tensor, axis = names.get(source[0], source[0]), source[1]
        part = result if len(sources) == 1 else f"{PREFIX}{result}/length_{position}"
        if opset < 15:  # Shape takes all axes
            shape = f"{PREFIX}{result}/shape_{position}"
            nodes.append(helper.make_node("Shape", [tensor], [shape], shape))
            nodes.append(helper.make_node("Gather", [shape, constant(axis)], [part], f"{PREFIX}Gather/{part}", axis=0))
        else:
            nodes.append(helper.make_node("Shape", [tensor], [part], f"{PREFIX}Shape/{part}", start=axis, end=axis + 1))
        parts.append(part)
    if parts != [result]:
        nodes.append(helper.make_node("Concat", parts, [result], f"{PREFIX}{result}/Concat", axis=0))
    return nodes


def laws_taken(probe: Probe, node: NodeProto) -> tuple[tuple[int, ...], ...]:
    """The laws of the axes that a Shape operator asks for."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return probe.tensors[node.input[0]].laws[attributes.get("start", 0) : attributes.get("end")]


def _input_values(
    plan: SegmentPlan, inputs: Sequence[InputSpec], carry_in: Sequence[TensorSpec]
) -> list[ValueInfoProto]:
    values = [_value(ROWS, "int64", (ROWS,))] if plan.index else []
    values += [_value(spec.name, spec.dtype, spec.shape) for spec in carry_in]
    values += [_value(spec.name, spec.dtype, spec.shape) for spec in inputs if spec.name in plan.inputs]
    return values if plan.has_separate_head else [*values, _value(INVERSE_TEMPERATURE, "float32", ())]


def _answer_values(num_classes: int, row_outputs: Sequence[str]) -> list[ValueInfoProto]:
    return [
        _value(LOGITS, "float32", (ROWS, num_classes)),
        _value("prediction", "int64", (ROWS,)),
        _value("scores", "float32", (ROWS, 3)),
        *(_value(kind, "float32", (ROWS,)) for kind in row_outputs),
    ]


def _inner_values(
    view: GraphView, probe: Probe, nodes: Sequence[NodeProto], names: Mapping[str, str], outputs: set[str]
) -> list[ValueInfoProto]:
    """Shapes of the tensors inside: ONNX Runtime fuses residual additions into normalisation only with them."""
    made = {name for node in nodes for name in node.output} - outputs
    values = []
    for name, facts in probe.tensors.items():
        if names.get(name, name) in made and facts.dtype != "none" and name not in view.data_shaped:
            values.append(_value(names.get(name, name), facts.dtype, probe.shape(name)))
    return values


def _value(name: str, dtype: str, shape: Sequence[Dimension]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _finish(whole: ModelProto, graph: GraphProto) -> ModelProto:
    domains = {node.domain for node in walk_nodes(graph)} | {""}
    model = helper.make_model(
        graph,
        producer_name="offramp",
        ir_version=whole.ir_version,
        opset_imports=[entry for entry in whole.opset_import if entry.domain in domains or entry.domain == "ai.onnx"],
    )
    if model.ByteSize() > _MAX_PROTOBUF_BYTES:
        raise CutError(
            f"{graph.name} has {model.ByteSize()} bytes, more than one ONNX file holds; add an exit before it"
        )
    try:
        checker.check_model(model)
    except checker.ValidationError as exc:
        raise CutError(f"cutting the graph: {graph.name} is not valid ONNX: {exc}; please report this model") from exc
    return model
