"""Precisions are compared under the same choices, and carried values by their size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, checker, helper

from offramp.bundle import TensorSpec
from offramp.export import quantize
from offramp.export.chain import Chain, open_session
from offramp.export.choices import choices_of, taking_choices, with_same_choices
from offramp.export.quantize import int8_from_segment
from offramp.export.verify import Tolerance, carry_tolerance, verify_lowered
from tests.export import graphs


class One:
    """The interface of a single segment that hands on what it has chosen."""

    inputs = ("x",)
    carry_in = ()
    carry_out = (TensorSpec("short", "float32", ("rows", "kept")),)


def choosing(scale: float) -> ModelProto:
    """The two largest of `scale` x, in the order of size, and scores of a classifier on x."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["importance"]),
        helper.make_node("TopK", ["importance", "two"], ["largest", "places"], axis=1),
        helper.make_node("GatherElements", ["x", "places"], ["short"], axis=1),
        helper.make_node("Softmax", ["x"], ["logits"]),
        helper.make_node("ArgMax", ["x"], ["prediction"], axis=1, keepdims=0),
        helper.make_node("Slice", ["logits", "zero", "three", "one"], ["scores"]),
    ]
    constants = [
        graphs.constant("scale", scale, np.float32),
        *(graphs.constant(name, [value]) for name, value in {"two": 2, "zero": 0, "three": 3, "one": 1}.items()),
    ]
    outputs = {"short": ["rows", 2], "logits": ["rows", 4], "scores": ["rows", 3]}
    model = graphs.model_of(nodes, {"x": ["rows", 4]}, outputs, constants)
    model.graph.output.append(helper.make_tensor_value_info("prediction", TensorProto.INT64, ["rows"]))
    checker.check_model(model)
    return model


X = np.array([[1.0, 4.0, 2.0, 3.0], [0.5, 0.1, 0.3, 0.2]], np.float32)


def test_only_choices_that_are_read_count() -> None:
    model = choosing(1.0)
    assert choices_of(model) == ("places",)
    unread = choosing(1.0)
    unread.graph.node[2].CopyFrom(helper.make_node("Slice", ["x", "zero", "two", "one"], ["short"]))
    assert choices_of(unread) == ()


def test_a_graph_takes_choices_and_keeps_its_nodes_in_place() -> None:
    model = choosing(1.0)
    taking = taking_choices(model, ("places",))
    assert [node.op_type for node in taking.graph.node] == [node.op_type for node in model.graph.node]
    places = np.array([[0, 1], [3, 3]])
    (got,) = open_session(taking).run(["short"], {"x": X, "places": places})
    np.testing.assert_array_equal(got, np.take_along_axis(X, places, axis=1))
    assert model.graph.node[1].output[1] == "places", "the original stays"


def test_another_choice_is_no_error_of_the_segment_and_another_value_is() -> None:
    """The second graph would choose the smallest: under the choices of the first it says the same."""
    fp32, lowered = (Chain.open([One()], [choosing(scale)]) for scale in (1.0, -1.0))
    assert not np.array_equal(fp32.run_segment(0, {"x": X})["short"], lowered.run_segment(0, {"x": X})["short"])
    assert with_same_choices(fp32, lowered)[2] == [("places",)]
    found = verify_lowered(fp32, lowered, [{"x": X}], Tolerance(1e-6, 1e-6))
    assert found.segments[0].allowed_ratio == 0
    wrong = choosing(1.0)
    wrong.graph.node[2].input[0] = "importance"
    wrong.graph.initializer[0].CopyFrom(graphs.constant("scale", 1.01, np.float32))
    found = verify_lowered(fp32, Chain.open([One()], [wrong]), [{"x": X}], Tolerance(1e-2, 1e-6))
    assert found.segments[0].where == "output short"
    assert found.segments[0].max_abs == pytest.approx(0.04, rel=1e-3)


@pytest.mark.parametrize(("size", "factor"), [(0.01, 1.0), (1.0, 1.0), (9.0, 9.0), (1e4, 16.0)])
def test_what_is_carried_is_judged_by_its_size(size: float, factor: float) -> None:
    found = carry_tolerance(Tolerance(2e-2, 1e-2), np.full((3, 4), -size, np.float32))
    assert found == Tolerance(pytest.approx(2e-2 * factor), 1e-2)
    assert carry_tolerance(Tolerance(2e-2, 1e-2), np.full(3, 50)) == Tolerance(2e-2, 1e-2), "numbers are exact"
    assert carry_tolerance(Tolerance(math.inf, 0.0, 0.25), np.full(3, size)).atol == math.inf


def ranking() -> ModelProto:
    """A rotation of 128 dimensions, after which the ten tokens (of 20) with the largest norm stay."""
    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["hidden"]),
        helper.make_node("Mul", ["hidden", "hidden"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["importance"], axes=[2], keepdims=0),
        helper.make_node("TopK", ["importance", "ten"], ["largest", "places"], axis=1),
        helper.make_node("Unsqueeze", ["places", "two"], ["column"]),
        helper.make_node("Expand", ["column", "wide"], ["all"]),
        helper.make_node("GatherElements", ["hidden", "all"], ["short"], axis=1),
    ]
    numbers = {"ten": [10], "two": [2], "wide": [1, 1, 128]}
    constants = [graphs.constant(name, value) for name, value in numbers.items()]
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(128, 128))).Q
    constants.append(graphs.constant("weights", rotation, np.float32))
    return graphs.model_of(nodes, {"x": ["rows", 20, 128]}, {"short": ["rows", 10, 128]}, constants)


def test_int8_is_not_kept_away_by_tokens_that_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(1).normal(size=(4, 20, 128))
    x *= np.linspace(1.0, 1.001, 20)[:, None] / np.linalg.norm(x, axis=2, keepdims=True)  # all about as important
    feeds = [{"x": x.astype(np.float32)}]
    assert int8_from_segment(ranking(), feeds).treatments == {"x": "plain"}
    monkeypatch.setattr(quantize, "choices_of", lambda model: ())
    assert int8_from_segment(ranking(), feeds).treatments == {"x": "fp32"}, "what it came to before"
