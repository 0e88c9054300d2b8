"""One ONNX graph that decides for itself: after every open exit an If, whose else branch is the rest of the model.

What a user gets who puts the policy into the graph (torch.cond exports to the same): no runtime is needed, but the
thresholds are constants, and an If takes one branch for the whole batch. So a batch leaves when its least sure row is
sure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from offramp.bundle import INVERSE_TEMPERATURE
from offramp.export.graph import GraphView, rename_tensors
from offramp.export.score_head import PREFIX, score_head
from offramp.policy import Policy

LOGITS, EXIT_INDEX = "answer", "exit_index"  # the graph's outputs: (N, C) float32, () int64


def if_graph(whole: ModelProto, exits: Sequence[str], num_classes: int, policy: Policy) -> ModelProto:
    """`whole`, whose outputs `exits` are the exits in order, under the thresholds of `policy`.

    Weights and shapes stand in the branch that alone uses them, so that ONNX Runtime fuses and packs there as it does
    in the whole graph.
    """
    view = GraphView(whole)
    limits = [*(policy.limits or [None] * (len(exits) - 1)), None]
    stops = [k for k, limit in enumerate(limits) if limit is not None] + [len(exits) - 1]
    placed: set[int] = set()
    stages: list[list[int]] = []
    for k in stops:
        stages.append(sorted(view.upstream([exits[k]], view.reads) - placed))
        placed.update(stages[-1])
    graph = _answer(exits[stops[-1]], stops[-1], num_classes, "last")
    for depth in reversed(range(len(stops))):
        k = stops[depth]
        body = GraphProto(name=f"to_exit_{k}")
        body.node.extend(view.nodes[index] for index in stages[depth])
        _place_constants(body, view, stages, depth)
        if depth < len(stops) - 1:
            leave = _answer(exits[k], k, num_classes, f"leave_{k}")
            head = score_head(num_classes, view.opset)
            inverse = policy.inverse_temperatures(len(exits))[k]
            condition = _add_condition(body, exits[k], k, policy, inverse, head)
            branch = helper.make_node(
                "If", [condition], [f"{LOGITS}_{depth}", f"{EXIT_INDEX}_{depth}"], then_branch=leave, else_branch=graph
            )
            body.node.append(branch)
        else:
            body.node.extend(graph.node)
            for output in (LOGITS, EXIT_INDEX):
                body.node.append(helper.make_node("Identity", [f"{output}_last"], [f"{output}_{depth}"]))
        body.output.extend(_outputs(str(depth), num_classes))
        graph = body
    model = ModelProto(ir_version=whole.ir_version, graph=graph)
    model.opset_import.extend(whole.opset_import)
    model.graph.input.extend(whole.graph.input)
    onnx.checker.check_model(model)
    return model


def _answer(logits: str, exit_index: int, num_classes: int, suffix: str) -> GraphProto:
    """A branch that answers with `logits`, a tensor from outside, and its exit."""
    index = numpy_helper.from_array(np.array(exit_index, np.int64))
    nodes = [
        helper.make_node("Identity", [logits], [f"{LOGITS}_{suffix}"]),
        helper.make_node("Constant", [], [f"{EXIT_INDEX}_{suffix}"], value=index),
    ]
    return helper.make_graph(nodes, suffix, [], _outputs(suffix, num_classes))


def _outputs(suffix: str, num_classes: int) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(f"{LOGITS}_{suffix}", TensorProto.FLOAT, ["rows", num_classes]),
        helper.make_tensor_value_info(f"{EXIT_INDEX}_{suffix}", TensorProto.INT64, []),
    ]


def _place_constants(body: GraphProto, view: GraphView, stages: list[list[int]], depth: int) -> None:
    """Put the weights that stage `depth` is the first to read into its graph, and the shapes of what it makes."""
    read = {name for index in stages[depth] for name in view.reads[index]}
    before = {name for stage in stages[:depth] for index in stage for name in view.reads[index]}
    body.initializer.extend(tensor for name, tensor in view.initializers.items() if name in read - before)
    made = {name for index in stages[depth] for name in view.nodes[index].output}
    body.value_info.extend(value for value in view.model.graph.value_info if value.name in made)


def _add_condition(
    body: GraphProto,
    logits: str,
    exit_index: int,
    policy: Policy,
    inverse_temperature: np.float32,
    head: tuple[list[NodeProto], list[TensorProto]],
) -> str:
    """Add the score of exit `exit_index` and its comparison to `body`; the name of the result, one boolean.

    `head` makes all scores from logits; what the policy's score does not need of it is left out.
    """
    nodes, constants = head
    score = f"{PREFIX}{policy.score}"
    kept = _needed_for(nodes, score)
    names = {name for node in nodes for name in (*node.input, *node.output)} | {tensor.name for tensor in constants}
    own = {name: f"exit_{exit_index}/{name}" for name in names if name} | {"logits": logits}
    body.node.extend(rename_tensors(node, own) for node in kept)
    for tensor in constants:
        tensor.name = own[tensor.name]
    body.initializer.extend(constants)
    limit = np.float32(policy.limits[exit_index])
    limit_name, least, condition = (f"exit_{exit_index}/{name}" for name in ("limit", "least_sure", "leaves"))
    for name, value in ((own[INVERSE_TEMPERATURE], inverse_temperature), (limit_name, limit)):
        body.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    over_rows, compare = ("ReduceMax", "LessOrEqual") if policy.score == "entropy" else ("ReduceMin", "GreaterOrEqual")
    body.node.append(helper.make_node(over_rows, [own[score]], [least], keepdims=0))
    body.node.append(helper.make_node(compare, [least, limit_name], [condition]))
    return condition


def _needed_for(nodes: Sequence[NodeProto], tensor: str) -> list[NodeProto]:
    """The nodes of `nodes`, in topological order, that `tensor` depends on."""
    needed, kept = {tensor}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]
