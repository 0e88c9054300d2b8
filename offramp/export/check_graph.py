"""Can this graph be cut at all? What can be told by looking at it, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import NodeProto, numpy_helper

from offramp.errors import CutError
from offramp.export.graph import GraphView, describe_node, walk_nodes
from offramp.export.row_outputs import WORDS, RowOutputs

MIN_OPSET = 11  # TopK and ArgMax as the score head uses them
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def check_graph(view: GraphView, exits: Sequence[str], row_outputs: RowOutputs) -> None:
    """Raise CutError, naming the output or operator, when `view` cannot be cut at `exits` with `row_outputs`."""
    graph = view.model.graph
    if view.opset < MIN_OPSET:
        raise CutError(
            f"graph has opset {view.opset}, expected at least {MIN_OPSET}; convert it with onnx.version_converter"
        )
    if graph.sparse_initializer:
        names = ", ".join(tensor.values.name for tensor in graph.sparse_initializer)
        raise CutError(f"weights {names} are sparse_initializers; store them as dense initializers")
    for node in walk_nodes(graph):
        _check_deterministic(view, node)
    for node in view.nodes:
        if node.op_type == "If" and node.input[0] in view.data_valued:
            raise CutError(
                f"cutting the graph: {describe_node(node)} takes its branch by values of the whole batch, so a row "
                f"would depend on the others; compute both sides and choose per row (torch.where)"
            )
    _check_exits(view, exits)
    _check_row_outputs(view, exits, row_outputs)


def _check_deterministic(view: GraphView, node: NodeProto) -> None:
    if node.op_type in _RANDOM:
        raise CutError(f"cutting the graph: {describe_node(node)} draws random numbers; remove it or export in eval()")
    if node.op_type == "Dropout" and len(node.input) > 2:
        is_training = _is_true(view, node.input[2])
    else:
        is_training = node.op_type == "BatchNormalization" and any(
            attribute.name == "training_mode" and attribute.i for attribute in node.attribute
        )
    if is_training:
        raise CutError(f"cutting the graph: {describe_node(node)} is in training mode; export the model in eval()")


def _is_true(view: GraphView, name: str) -> bool:
    """Is the tensor a constant that says True?"""
    tensor = view.initializers.get(name)
    if tensor is None and name in view.producer:
        node = view.nodes[view.producer[name]]
        tensor = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
    return tensor is not None and bool(numpy_helper.to_array(tensor).any())


def _check_exits(view: GraphView, exits: Sequence[str]) -> None:
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
            raise CutError(f"exit {name!r} is not computed from any input; check which output it is")


def _check_row_outputs(view: GraphView, exits: Sequence[str], row_outputs: RowOutputs) -> None:
    named = [(kind, name) for found in row_outputs.values() for kind, name in found.items()]
    if len({*exits, *(name for _, name in named)}) != len(exits) + len(named):
        others = ", ".join(f"{kind} {name}" for kind, name in named)
        raise CutError(f"got exits {', '.join(exits)} with {others}, expected each output once")
    for kind, name in named:
        if name not in view.output_names or view.producer.get(name) is None:
            raise CutError(
                f"{WORDS[kind].called} {name!r} is not computed by the graph; its outputs are "
                f"{', '.join(view.output_names)}; pass `--{kind}` with some of these, in the order of the exits"
            )
