"""Build the ONNX graph of one segment from a plan of what it computes, takes and hands on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from offramp.bundle import INVERSE_TEMPERATURE, PREVIOUS_ROWS, ROWS, Dimension, InputSpec, TensorSpec
from offramp.errors import CutError
from offramp.export.graph import GraphView, read_names, rename_tensors
from offramp.export.probe import Probe
from offramp.export.score_head import PREFIX, score_head

_MAX_PROTOBUF_BYTES = 2**31 - 1  # protobuf's limit for one message

Source = tuple[str, int] | int  # an axis of a tensor at hand, or a length that never changes


@dataclass(frozen=True)
class SegmentPlan:
    """What one segment computes: nodes of the whole graph by index, and tensors of it by name."""

    index: int
    exit_name: str
    carried_in: tuple[str, ...]
    carried: tuple[str, ...]
    nodes: frozenset[int]
    rerun: frozenset[int]
    sources: dict[int, tuple[Source, ...]] = field(default_factory=dict)  # Shape node -> where its lengths are
    unresolved: frozenset[int] = frozenset()  # Shape nodes whose lengths nothing at hand has

    def with_sources(self, view: GraphView, probe: Probe) -> SegmentPlan:
        """The plan with a source for every length that is taken of a tensor which this segment lacks."""
        given = self.carried_in if self.index else view.input_names
        at_hand = {name for index in self.nodes for name in view.nodes[index].output} | set(given)
        sources: dict[int, tuple[Source, ...]] = {}
        unresolved = set()
        for index in self.nodes:
            node = view.nodes[index]
            if node.op_type != "Shape" or node.input[0] in at_hand or node.input[0] not in probe.tensors:
                continue
            found = [self._source(probe, given, law) for law in _laws_taken(probe, node)]
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
    """The interface of carried tensors, named by position, with `rows` as their leading dimension."""
    specs = []
    for position, name in enumerate(names):
        facts = probe.tensors[name]
        shape = (rows, *(probe.dimension(law) for law in facts.laws[1:]))
        specs.append(TensorSpec(f"{prefix}_{position}", facts.dtype, shape))
    return tuple(specs)


def segment_graph(
    view: GraphView, probe: Probe, plan: SegmentPlan, inputs: Sequence[InputSpec], num_classes: int
) -> ModelProto:
    """The graph of `plan`: gather the rows that go on, the segment's own operators, the score head.

    Raises CutError when a model input has a name that the segment contract needs.
    """
    carry_in = carry_specs(probe, plan.carried_in, "carry_in", PREVIOUS_ROWS)
    carry_out = carry_specs(probe, plan.carried, "carry_out", ROWS)
    head_nodes, head_constants = score_head(num_classes)
    outputs = {"logits": plan.exit_name} | {spec.name: name for spec, name in zip(carry_out, plan.carried, strict=True)}
    reserved = {
        *outputs,
        "prediction",
        "scores",
        ROWS,
        INVERSE_TEMPERATURE,
        *(spec.name for spec in carry_in),
    }
    _check_names(view, reserved)
    names = _output_names(view, plan, outputs) | {name: f"{name}:0" for name in reserved if name in probe.tensors}
    nodes = [
        helper.make_node("Gather", [spec.name, ROWS], [names.get(name, name)], f"{PREFIX}Gather/{position}", axis=0)
        for position, (spec, name) in enumerate(zip(carry_in, plan.carried_in, strict=True))
    ]
    constants: dict[str, TensorProto] = {}
    for index in sorted(plan.nodes):
        if index in plan.sources:
            nodes += _shape_nodes(view.nodes[index], plan.sources[index], names, constants)
        else:
            nodes.append(rename_tensors(view.nodes[index], names))
    nodes += [
        helper.make_node("Identity", [names.get(name, name)], [output], f"{PREFIX}Identity/{output}")
        for output, name in outputs.items()
        if names.get(name) != output
    ]
    used = {name for node in nodes for name in read_names(node)}
    initializers = [tensor for name, tensor in view.initializers.items() if name in used]
    graph = GraphProto(
        name=f"segment_{plan.index:02d}",
        node=[*nodes, *head_nodes],
        initializer=[*initializers, *constants.values(), *head_constants],
        input=[*_input_values(plan, inputs, carry_in), _value(INVERSE_TEMPERATURE, "float32", ())],
        output=[
            *(_value(spec.name, spec.dtype, spec.shape) for spec in carry_out),
            *_answer_values(num_classes),
        ],
        value_info=_inner_values(probe, nodes, names, set(outputs)),
    )
    return _finish(view.model, graph)


def _check_names(view: GraphView, reserved: set[str]) -> None:
    taken = reserved.intersection(view.input_names)
    if taken:
        raise CutError(f"model input {', '.join(sorted(taken))}: offramp uses this name itself; rename the input")


def _output_names(view: GraphView, plan: SegmentPlan, outputs: dict[str, str]) -> dict[str, str]:
    """Tensor of the whole graph -> its name as an output here; what is not computed here keeps its name."""
    made = {name for index in plan.nodes for name in view.nodes[index].output} | set(plan.carried_in)
    names: dict[str, str] = {}
    for output, name in outputs.items():
        if name in made and name not in names:
            names[name] = output
    return names


def _shape_nodes(
    node: NodeProto, sources: Sequence[Source], names: dict[str, str], constants: dict[str, TensorProto]
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
        tensor, axis = source
        shape, part = f"{PREFIX}{result}/shape_{position}", f"{PREFIX}{result}/length_{position}"
        nodes.append(helper.make_node("Shape", [names.get(tensor, tensor)], [shape], shape))
        nodes.append(helper.make_node("Gather", [shape, constant(axis)], [part], part, axis=0))
        parts.append(part)
    nodes.append(helper.make_node("Concat", parts, [result], f"{PREFIX}{result}/Concat", axis=0))
    return nodes


def _laws_taken(probe: Probe, node: NodeProto) -> tuple[tuple[int, ...], ...]:
    """The laws of the axes that a Shape operator asks for."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return probe.tensors[node.input[0]].laws[attributes.get("start", 0) : attributes.get("end")]


def _input_values(
    plan: SegmentPlan, inputs: Sequence[InputSpec], carry_in: Sequence[TensorSpec]
) -> list[ValueInfoProto]:
    if plan.index == 0:
        return [_value(spec.name, spec.dtype, spec.shape) for spec in inputs]
    carried = [_value(spec.name, spec.dtype, spec.shape) for spec in carry_in]
    return [_value(ROWS, "int64", (ROWS,)), *carried]


def _answer_values(num_classes: int) -> list[ValueInfoProto]:
    return [
        _value("logits", "float32", (ROWS, num_classes)),
        _value("prediction", "int64", (ROWS,)),
        _value("scores", "float32", (ROWS, 3)),
    ]


def _inner_values(
    probe: Probe, nodes: Sequence[NodeProto], names: dict[str, str], outputs: set[str]
) -> list[ValueInfoProto]:
    """Shapes of the tensors inside: ONNX Runtime fuses residual additions into normalisation only with them."""
    made = {name for node in nodes for name in node.output} - outputs
    values = []
    for name, facts in probe.tensors.items():
        if names.get(name, name) in made and facts.dtype != "none":
            shape = [probe.dimension(law) for law in facts.laws]
            values.append(_value(names.get(name, name), facts.dtype, shape))
    return values


def _value(name: str, dtype: str, shape: Sequence[Dimension]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _finish(whole: ModelProto, graph: GraphProto) -> ModelProto:
    domains = {node.domain for node in graph.node} | {""}
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
    checker.check_model(model)
    return model
