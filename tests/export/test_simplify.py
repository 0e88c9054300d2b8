"""Reshapes with constant targets: which are taken, which are left, and that the numbers stay."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from offramp.export.simplify import simplify_graph

Shape = tuple[int | str, ...]

CASES: dict[str, tuple[Shape, Shape, list[int] | None]] = {
    "into heads": (("rows", "tokens", 6), ("rows", "tokens", 3, 2), [0, 0, 3, 2]),
    "out of heads": (("rows", "tokens", 3, 2), ("rows", "tokens", 6), [0, 0, 6]),
    "flatten": (("rows", 3, 4), ("rows", 12), [0, 12]),
    "an axis before": (("rows", "tokens"), (1, "rows", "tokens"), None),
    "one moved axis": (("rows", "tokens", 6), ("rows", 6, "tokens"), [0, 6, -1]),
    "one new name": (("rows", "tokens", 6), ("both", 6), [-1, 6]),
    "two new names": (("rows", "tokens", 6), ("half", "double", 6), None),
    "an empty axis": (("rows", "tokens", 0), ("rows", "tokens", 0, 2), None),
}


def reshape_model(before: Shape, after: Shape) -> ModelProto:
    """A Reshape whose target is another input, and an operator that nobody reads."""
    graph = helper.make_graph(
        [
            helper.make_node("Abs", ["x"], ["positive"]),
            helper.make_node("Concat", ["lengths"], ["target"], axis=0),
            helper.make_node("Concat", ["lengths"], ["unread"], axis=0),
            helper.make_node("Reshape", ["positive", "target"], ["y"], allowzero=1),
        ],
        "reshape",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, before),
            helper.make_tensor_value_info("lengths", TensorProto.INT64, [len(after)]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, after)],
        [numpy_helper.from_array(np.zeros(3, np.float32), "unread_weight")],
        value_info=[helper.make_tensor_value_info("positive", TensorProto.FLOAT, before)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("before", "after", "target"), CASES.values(), ids=CASES)
def test_a_reshape_takes_a_constant_where_the_shapes_say_which(
    before: Shape, after: Shape, target: list[int] | None
) -> None:
    model = reshape_model(before, after)
    simplify_graph(model.graph)
    checker.check_model(model)
    constants = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer}
    (reshape,) = [node for node in model.graph.node if node.op_type == "Reshape"]
    assert constants.get(reshape.input[1]) == target
    assert [attribute.name for attribute in reshape.attribute] == ([] if target else ["allowzero"])
    assert [node.op_type for node in model.graph.node] == (
        ["Abs", "Reshape"] if target else ["Abs", "Concat", "Reshape"]
    )
    assert set(constants) == ({reshape.input[1]} if target else set())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2]])
def test_the_result_is_the_same_at_every_size(name: str) -> None:
    before, after, _ = CASES[name]
    plain, simple = reshape_model(before, after), reshape_model(before, after)
    simplify_graph(simple.graph)
    for rows, tokens in ((1, 1), (2, 5), (4, 3)):
        sizes = {"rows": rows, "tokens": tokens, "both": rows * tokens}
        x = np.arange(np.prod(shape := [sizes.get(d, d) for d in before]), dtype=np.float32).reshape(shape)
        lengths = np.array([sizes.get(d, d) for d in after], np.int64)
        results = []
        for model in (plain, simple):
            session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            results.append(session.run(["y"], {"x": x, "lengths": lengths})[0])
        np.testing.assert_array_equal(*results)
