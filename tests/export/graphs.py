"""Hand-made ONNX graphs with several exits and every oddity that the standard allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper


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


def constant(name: str, value: object, dtype: type = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def two_exits(
    between: Sequence[NodeProto], weights: Sequence[TensorProto] = (), inputs: dict[str, Sequence[object]] | None = None
) -> ModelProto:
    """x -> h -> exit a; then `between`, from h (and w3) to h2; h2 -> exit b."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["a"]),
        *between,
        helper.make_node("MatMul", ["h2", "w2"], ["b"]),
    ]
    every = [weight("w1", 4, 4), weight("w2", 4, 3), weight("w3", 4, 4), *weights]
    return model_of(nodes, {"x": ["batch", 4], **(inputs or {})}, {"a": ["batch", 3], "b": ["batch", 3]}, every)


def _branch(name: str, operator: str, domain: str = "") -> GraphProto:
    node = helper.make_node(operator, ["h"], [name], domain=domain)
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])


def branch(condition: Sequence[NodeProto], weights: Sequence[TensorProto], operator: str = "Tanh") -> ModelProto:
    """An If over `condition`, whose branches read what the first segment made; contrib operators inside."""
    node = helper.make_node(
        "If",
        ["condition"],
        ["h2"],
        then_branch=_branch("p", operator),
        else_branch=_branch("q", "Gelu", "com.microsoft"),
    )
    model = two_exits([*condition, node], weights)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def branch_on_constant(operator: str = "Tanh") -> ModelProto:
    return branch([], [constant("condition", True, bool)], operator)


def branch_on_values() -> ModelProto:
    condition = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "half"], ["condition"]),
    ]
    return branch(condition, [constant("half", 0.5, np.float32)])


def branch_on_rows() -> ModelProto:
    """Another path for a batch of one."""
    condition = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"]),
        helper.make_node("Equal", ["n", "one"], ["condition"]),
    ]
    return branch(condition, [constant("zero", 0), constant("one", 1)])


def loop_that_shadows() -> ModelProto:
    """A Loop reading the first segment, whose inner names are `logits`, which shadows nothing, and `scores`."""
    body = helper.make_graph(
        [helper.make_node("Add", ["logits", "h"], ["scores"]), helper.make_node("Identity", ["go"], ["carry_in_0"])],
        "body",
        [
            helper.make_tensor_value_info("rows", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("carry_in_0", TensorProto.BOOL, []),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["three", "yes", "x"], ["h2"], body=body)
    return two_exits([loop], [constant("three", 3), constant("yes", True, bool)])


def names_taken() -> ModelProto:
    """Initializers, constants and tensors called what the segment contract calls its own."""
    between = [
        helper.make_node("Constant", [], ["prediction"], value=constant("", [1, 2, 1, 2], np.float32)),
        helper.make_node("Add", ["inverse_temperature", "prediction"], ["logits"]),
        helper.make_node("Add", ["h", "scores"], ["rows"]),
        helper.make_node("Mul", ["rows", "logits"], ["scores:0"]),
        helper.make_node("Tanh", ["scores:0"], ["h2"]),
    ]
    weights = [constant("scores", [1, 2, 3, 4], np.float32), constant("inverse_temperature", 2, np.float32)]
    return two_exits(between, weights)


def routed() -> ModelProto:
    """Rows with a positive flag get something added: how many they are is known from values only."""
    between = [
        helper.make_node("Greater", ["flag", "zero"], ["on"]),
        helper.make_node("NonZero", ["on"], ["places"]),
        helper.make_node("Transpose", ["places"], ["index"]),
        helper.make_node("MatMul", ["h", "w3"], ["g"]),
        helper.make_node("GatherND", ["g", "index"], ["chosen"]),
        helper.make_node("Shape", ["early"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["ones"], value=constant("", [1], np.float32)),
        helper.make_node("Add", ["chosen", "ones"], ["more"]),
        helper.make_node("ScatterND", ["g", "index", "more"], ["h2"]),
    ]
    model = two_exits(between, [constant("zero", 0, np.float32)], {"flag": ["batch"]})
    # The first exit makes `early`, so that it exists at the boundary, with as many rows as flags are positive.
    first = [
        *between[:3],
        helper.make_node("GatherND", ["h", "index"], ["early"]),
        helper.make_node("ScatterND", ["h", "index", "early"], ["same"]),
        helper.make_node("MatMul", ["same", "w2"], ["a"]),
    ]
    nodes = [model.graph.node[0], *first, *between[3:], model.graph.node[-1]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def training_dropout() -> ModelProto:
    node = helper.make_node("Dropout", ["h", "ratio", "training"], ["h2"], "drop")
    return two_exits([node], [constant("ratio", 0.5, np.float32), constant("training", True, bool)])


def training_batch_norm() -> ModelProto:
    node = helper.make_node(
        "BatchNormalization", ["h", "one", "zero", "zero", "one"], ["h2", "mean", "variance"], "norm", training_mode=1
    )
    return two_exits([node], [constant("one", [1] * 4, np.float32), constant("zero", [0] * 4, np.float32)])


def longest_row() -> ModelProto:
    """Cuts the batch to its longest row: shapes, and with them padding, depend on the others."""
    nodes = [
        helper.make_node("ReduceMax", ["length"], ["longest"], keepdims=1),
        helper.make_node("Cast", ["longest"], ["end"], to=TensorProto.INT64),
        helper.make_node("Slice", ["x", "zero", "end", "one"], ["short"]),
        helper.make_node("MatMul", ["short", "w1"], ["h"]),
        helper.make_node("ReduceMean", ["h"], ["pooled"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["pooled", "w2"], ["a"]),
        helper.make_node("MatMul", ["h", "w1"], ["h2"]),
        helper.make_node("ReduceMean", ["h2"], ["pooled2"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["pooled2", "w2"], ["b"]),
    ]
    weights = [weight("w1", 4, 4), weight("w2", 4, 3), constant("zero", [0]), constant("one", [1])]
    inputs: dict[str, Sequence[object]] = {"x": ["batch", "time", 4], "length": ["batch"]}
    return model_of(nodes, inputs, {"a": ["batch", 3], "b": ["batch", 3]}, weights)


def image_with_rows() -> ModelProto:
    """A picture whose own dimensions are called rows and cols."""
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["h"]),
        helper.make_node("GlobalMaxPool", ["h"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w2"], ["a"]),
        helper.make_node("Conv", ["h", "kernel"], ["h2"]),
        helper.make_node("GlobalMaxPool", ["h2"], ["p2"]),
        helper.make_node("Flatten", ["p2"], ["f2"]),
        helper.make_node("MatMul", ["f2", "w2"], ["b"]),
    ]
    weights = [weight("kernel", 4, 4, 3, 3), weight("w2", 4, 3)]
    outputs: dict[str, Sequence[object]] = {"a": ["batch", 3], "b": ["batch", 3]}
    return model_of(nodes, {"x": ["batch", 4, "rows", "cols"]}, outputs, weights)


def sparse_weight() -> ModelProto:
    model = two_exits([helper.make_node("Add", ["h", "sparse"], ["h2"])])
    values, places = constant("sparse", [5.0], np.float32), constant("places", [2])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))
    return model


def local_function() -> ModelProto:
    model = two_exits([helper.make_node("Twice", ["h"], ["h2"], domain="local")])
    add = helper.make_node("Add", ["u", "u"], ["v"])
    model.functions.append(helper.make_function("local", "Twice", ["u"], ["v"], [add], [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


def initializer_as_input() -> ModelProto:
    model = two_exits([helper.make_node("Identity", ["h"], ["h2"])])
    model.graph.input.append(helper.make_tensor_value_info("w1", TensorProto.FLOAT, [4, 4]))
    return model
