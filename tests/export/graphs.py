"""Hand-made ONNX graphs with several exits and every oddity that the standard allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def weight(name: str, *shape: int) -> TensorProto:
    values = np.sin(np.arange(int(np.prod(shape)), dtype=np.float32) * 0.7 + len(name)).reshape(shape)
    return numpy_helper.from_array(values, name)


def model_of(
    nodes: Sequence[NodeProto],
    inputs: dict[str, Sequence[object]],
    outputs: dict[str, Sequence[object]],
    weights: Sequence[TensorProto],
    opset: int = 17,
) -> ModelProto:
    def values(shapes: dict[str, Sequence[object]]) -> list[object]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs), weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def odd_names(opset: int = 17) -> ModelProto:
    """Names that clash with offramp's own, with slashes, colons and spaces; an If; a node without a name."""
    branch = helper.make_graph(
        [helper.make_node("Mul", ["scores", "two"], ["then/out"])],
        "then",
        [],
        [helper.make_tensor_value_info("then/out", TensorProto.FLOAT, None)],
    )
    otherwise = helper.make_graph(
        [helper.make_node("Identity", ["scores"], ["else out"])],
        "else",
        [],
        [helper.make_tensor_value_info("else out", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x:0", "w1"], ["scores"], "a/b c"),
        helper.make_node("Size", ["scores"], ["size"]),
        helper.make_node("Greater", ["size", "zero"], ["is big"]),
        helper.make_node("If", ["is big"], ["logits"], then_branch=branch, else_branch=otherwise),
        helper.make_node("Tanh", ["logits"], ["carry_out_0"]),
        helper.make_node("MatMul", ["carry_out_0", "w2"], ["exit one"]),
        helper.make_node("MatMul", ["carry_out_0", "w1"], ["prediction"]),
        helper.make_node("Add", ["prediction", "x:0"], ["carry_in_0"]),
        helper.make_node("MatMul", ["carry_in_0", "w2"], ["Exit/2"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(0, np.int64), "zero"),
        numpy_helper.from_array(np.array(2, np.float32), "two"),
    ]
    return model_of(
        nodes,
        {"x:0": ["batch", 4]},
        {"exit one": ["batch", 3], "Exit/2": ["batch", 3]},
        [weight("w1", 4, 4), weight("w2", 4, 3), *constants],
        opset,
    )


def reads_shape_of_lost_tensor() -> ModelProto:
    """The second segment asks for the shape of a tensor that stays behind, in the old spelling (Shape, Gather)."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["wide"]),  # (batch, time, 8)
        helper.make_node("MatMul", ["wide", "w2"], ["narrow"]),  # (batch, time, 2)
        helper.make_node("ReduceMax", ["narrow"], ["logits_a"], axes=[1], keepdims=0),
        helper.make_node("Shape", ["wide"], ["wide shape"]),
        helper.make_node("Gather", ["wide shape", "zero_one"], ["batch and time"]),
        helper.make_node("Concat", ["batch and time", "minus_one"], ["target"], axis=0),
        helper.make_node("Tanh", ["narrow"], ["bounded"]),
        helper.make_node("Reshape", ["bounded", "target"], ["same"]),
        helper.make_node("MatMul", ["same", "w3"], ["mixed"]),
        helper.make_node("ReduceMax", ["mixed"], ["logits_b"], axes=[1], keepdims=0),
    ]
    constants = [
        numpy_helper.from_array(np.array([0, 1], np.int64), "zero_one"),
        numpy_helper.from_array(np.array([-1], np.int64), "minus_one"),
    ]
    weights = [weight("w1", 3, 8), weight("w2", 8, 2), weight("w3", 2, 2), *constants]
    shape = ["batch", "time", 3]
    return model_of(nodes, {"x": shape}, {"logits_a": ["batch", 2], "logits_b": ["batch", 2]}, weights)


def fixed_batch() -> ModelProto:
    """A batch of 2 baked into a Reshape, under an input that says it is dynamic."""
    nodes = [
        helper.make_node("Reshape", ["x", "two_by_four"], ["y"]),
        helper.make_node("MatMul", ["y", "w1"], ["a"]),
        helper.make_node("MatMul", ["a", "w2"], ["b"]),
    ]
    constants = [numpy_helper.from_array(np.array([2, 4], np.int64), "two_by_four")]
    weights = [weight("w1", 4, 3), weight("w2", 3, 3), *constants]
    return model_of(nodes, {"x": ["batch", 4]}, {"a": ["batch", 3], "b": ["batch", 3]}, weights)


def stacked() -> ModelProto:
    """Each exit is computed from the one before it."""
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["a"]), helper.make_node("MatMul", ["a", "w2"], ["b"])]
    weights = [weight("w1", 4, 3), weight("w2", 3, 3)]
    return model_of(nodes, {"x": ["batch", 4]}, {"a": ["batch", 3], "b": ["batch", 3]}, weights)


def random_noise() -> ModelProto:
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["noise"], "noise"),
        helper.make_node("Add", ["x", "noise"], ["y"]),
        helper.make_node("MatMul", ["y", "w1"], ["a"]),
    ]
    return model_of(nodes, {"x": ["batch", 4]}, {"a": ["batch", 3]}, [weight("w1", 4, 3)])


def unknown_operator() -> ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Mystery", ["a"], ["b"], "the mystery", domain="elsewhere"),
    ]
    model = model_of(nodes, {"x": ["batch", 4]}, {"a": ["batch", 3], "b": ["batch", 3]}, [weight("w1", 4, 3)])
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    return model


def constant_exit() -> ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("MatMul", ["w3", "w1"], ["b"]),
    ]
    weights = [weight("w1", 4, 3), weight("w3", 2, 4)]
    return model_of(nodes, {"x": ["batch", 4]}, {"a": ["batch", 3], "b": [2, 3]}, weights)
