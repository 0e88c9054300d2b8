"""The score head: from the logits of an exit to its scores and prediction, inside the segment's graph.

It stays in FP32 in every lowering. The inverse temperature is an input, so recalibration needs no rebuild.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from offramp.bundle import INVERSE_TEMPERATURE

# Rounding gives flat rows an entropy of 1.0000001 (seen); scores promise [0, 1], and a Clip would be one operator more.
_BELOW_ONE = 1 - 2**-22
PREFIX = "offramp/"  # of the names of all nodes and tensors that the cut adds


def score_head(num_classes: int, opset: int) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and constants from `logits` (S, C) and `inverse_temperature` () to `prediction` and `scores`.

    Entropy is the mean over classes of p log p, by GlobalAveragePool, times -C / log C. ONNX Runtime's ReduceSum
    adds a row in an order that depends on where the row starts in memory (seen for C = 5 and 37: other bits in
    another batch), its GlobalAveragePool does not; and p log p comes from LogSoftmax because Log is not bit-stable.
    """

    if num_classes == 1:
        return _value_head()

    def name(tensor: str) -> str:
        return f"{PREFIX}{tensor}"

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(operator, inputs, [output], name=f"{PREFIX}{operator}/{output}", **attributes)

    def constant(tensor: str, value: object) -> TensorProto:
        return numpy_helper.from_array(np.asarray(value), name(tensor))

    constants = [
        constant("two", np.array([2], np.int64)),
        constant("one_each", np.array([1, 1], np.int64)),
        constant("as_planes", np.array([-1, 1, num_classes], np.int64)),
        constant("as_column", np.array([-1, 1], np.int64)),
        constant("entropy_scale", np.float32(-num_classes / math.log(num_classes) * _BELOW_ONE)),
    ]
    nodes = [
        node("ArgMax", ["logits"], "prediction", axis=1, keepdims=0),
        node("Mul", ["logits", INVERSE_TEMPERATURE], name("scaled")),
        node("Softmax", [name("scaled")], name("probability"), axis=1),
        helper.make_node(
            "TopK",
            [name("probability"), name("two")],
            [name("top"), name("top_classes")],
            f"{PREFIX}TopK",
            axis=1,
        ),
        _halves(name("top"), name("max_prob"), name("runner_up"), name("one_each"), opset),
        node("Sub", [name("max_prob"), name("runner_up")], name("margin")),
        node("LogSoftmax", [name("scaled")], name("log_probability"), axis=1),
        node("Mul", [name("probability"), name("log_probability")], name("information")),
        node("Reshape", [name("information"), name("as_planes")], name("planes")),
        node("GlobalAveragePool", [name("planes")], name("mean_information")),
        node("Reshape", [name("mean_information"), name("as_column")], name("mean_column")),
        node("Mul", [name("mean_column"), name("entropy_scale")], name("entropy")),
        node("Concat", [name("max_prob"), name("margin"), name("entropy")], "scores", axis=1),
    ]
    return nodes, constants


def _value_head() -> tuple[list[NodeProto], list[TensorProto]]:
    """The same for a regression, `logits` (S, 1) being the value: no class, and scores that are as unsure as can be.

    Max_prob and margin are 0 and entropy is 1, so that no threshold on them lets a row leave: its learned confidence is
    what decides. They are computed from the inputs, because a segment without its inverse temperature is none.
    """
    constants = [
        numpy_helper.from_array(np.zeros((1, 3), np.float32), f"{PREFIX}nothing"),
        numpy_helper.from_array(np.array([[0, 0, 1]], np.float32), f"{PREFIX}unsure"),
    ]
    scaled, zeros = f"{PREFIX}scaled", f"{PREFIX}zeros"
    nodes = [
        helper.make_node("ArgMax", ["logits"], ["prediction"], f"{PREFIX}ArgMax/prediction", axis=1, keepdims=0),
        helper.make_node("Mul", ["logits", INVERSE_TEMPERATURE], [scaled], f"{PREFIX}Mul/scaled"),
        helper.make_node("Mul", [scaled, f"{PREFIX}nothing"], [zeros], f"{PREFIX}Mul/zeros"),
        helper.make_node("Add", [zeros, f"{PREFIX}unsure"], ["scores"], f"{PREFIX}Add/scores"),
    ]
    return nodes, constants


def row_output_nodes(kind: str, tensor: str, dtype: str) -> list[NodeProto]:
    """Nodes from a number per row that the model has, `tensor` (S,) or (S, 1), to the output `kind` (S,) in [0, 1]."""
    nodes = []
    if dtype != "float32":
        wide = f"{PREFIX}{kind}_wide"
        nodes.append(helper.make_node("Cast", [tensor], [wide], f"{PREFIX}Cast/{kind}", to=TensorProto.FLOAT))
        tensor = wide
    rows, limits = f"{PREFIX}{kind}_rows", [f"{PREFIX}zero", f"{PREFIX}one"]
    nodes.append(helper.make_node("Reshape", [tensor, f"{PREFIX}as_rows"], [rows], f"{PREFIX}Reshape/{kind}"))
    nodes.append(helper.make_node("Clip", [rows, *limits], [kind], f"{PREFIX}Clip/{kind}"))
    return nodes


def row_output_constants() -> list[TensorProto]:
    """The constants of `row_output_nodes`, for all of them."""
    return [
        numpy_helper.from_array(np.array([-1], np.int64), f"{PREFIX}as_rows"),
        numpy_helper.from_array(np.array(0, np.float32), f"{PREFIX}zero"),
        numpy_helper.from_array(np.array(1, np.float32), f"{PREFIX}one"),
    ]


def _halves(pair: str, left: str, right: str, sizes: str, opset: int) -> NodeProto:
    """`pair` (S, 2) as two columns; the sizes are an attribute before opset 13."""
    if opset < 13:
        return helper.make_node("Split", [pair], [left, right], f"{PREFIX}Split", axis=1, split=[1, 1])
    return helper.make_node("Split", [pair, sizes], [left, right], f"{PREFIX}Split", axis=1)
