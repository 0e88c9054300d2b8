"""Scores in numpy: by hand, at the edges, against the score head of a segment, and row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import DataError
from offramp.scores import log_probabilities, scores_from_logits
from offramp.tuning.thresholds import MIN_GAP


def test_scores_by_hand():
    scores = scores_from_logits(np.log(np.array([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]], np.float32)), 1.0)
    entropy = [-sum(p * math.log(p) for p in row) / math.log(3) for row in ((0.7, 0.2, 0.1), (0.4, 0.4, 0.2))]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[0.7, 0.5, entropy[0]], [0.4, 0, entropy[1]]], rtol=1e-6, atol=1e-7)


def test_inverse_temperature_scales_the_log_odds():
    logits = np.log(np.array([[0.25, 0.75]], np.float32))
    np.testing.assert_allclose(scores_from_logits(logits, 2.0)[0, :2], [0.9, 0.8], rtol=1e-6)


def test_scores_of_flat_and_extreme_rows():
    flat = scores_from_logits(np.zeros((1, 7), np.float32), 1.0)
    np.testing.assert_allclose(flat, [[1 / 7, 0, 1]], atol=1e-6)
    sure = scores_from_logits(np.array([[500.0, -500.0, 0.0]], np.float32), 20.0)
    np.testing.assert_array_equal(sure, [[1, 1, 0]])


@given(st.lists(st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4), max_size=8), st.floats(0.05, 20))
def test_scores_stay_in_range(rows, inverse_temperature):
    scores = scores_from_logits(np.array(rows, np.float32).reshape(-1, 4), inverse_temperature)
    assert scores.shape == (len(rows), 3)
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("num_classes", [2, 3, 37, 500])
def test_scores_are_those_of_the_segments_score_head(num_classes):
    """Within half of MIN_GAP, the distance that thresholds keep from the scores of a trace."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from offramp.export.score_head import score_head

    nodes, constants = score_head(num_classes, opset=20)
    float32 = onnx.TensorProto.FLOAT
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "head",
        [value("logits", float32, ["rows", num_classes]), value("inverse_temperature", float32, [])],
        [value("scores", float32, ["rows", 3])],
        constants,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = (np.random.default_rng(0).normal(size=(2000, num_classes)) * 4).astype(np.float32)
    inverse = np.float32(1 / 1.37)
    (scores,) = session.run(["scores"], {"logits": logits, "inverse_temperature": np.asarray(inverse)})
    assert np.abs(scores - scores_from_logits(logits, inverse)).max() < MIN_GAP / 2


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_scores_need_two_classes(shape):
    with pytest.raises(DataError, match="at least 2 classes"):
        scores_from_logits(np.zeros(shape, np.float32), 1.0)


@given(st.integers(2, 40000), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_row_is_scored_alone(num_classes, rows, seed):
    """The same bits whatever rows are beside it, and however many fit into a block."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, num_classes)).astype(np.float32)
    target = random.integers(num_classes, size=rows)
    inverse = np.float32(0.8)
    alone = [scores_from_logits(logits[row : row + 1], inverse)[0] for row in range(rows)]
    np.testing.assert_array_equal(scores_from_logits(logits, inverse), alone)
    said = [log_probabilities(logits[row : row + 1], target[row : row + 1], inverse)[0] for row in range(rows)]
    np.testing.assert_array_equal(log_probabilities(logits, target, inverse), said)


def test_log_probabilities_are_those_of_float64():
    logits = (np.random.default_rng(1).normal(size=(5, 3000)) * 9).astype(np.float32)
    target = np.array([0, 2999, 17, 17, 5])
    scaled = logits.astype(np.float64) / 1.5
    wanted = scaled[np.arange(5), target] - np.log(np.exp(scaled).sum(axis=1))
    inverse = np.float32(1 / 1.5)
    np.testing.assert_allclose(log_probabilities(logits, target, inverse), wanted, rtol=1e-5)
    max_prob = scores_from_logits(logits, inverse)[:, 0]
    np.testing.assert_allclose(log_probabilities(logits, target, inverse, max_prob), wanted, rtol=1e-5)


def test_only_what_is_wanted_is_computed():
    logits = np.random.default_rng(2).normal(size=(3, 7)).astype(np.float32)
    whole = scores_from_logits(logits, 1.0)
    for wanted, columns in ((("max_prob",), [0]), (("margin",), [0, 1]), (("entropy",), [0, 2]), ((), [0])):
        found = scores_from_logits(logits, 1.0, wanted)
        np.testing.assert_array_equal(found[:, columns], whole[:, columns])
        assert np.isnan(np.delete(found, columns, axis=1)).all()
