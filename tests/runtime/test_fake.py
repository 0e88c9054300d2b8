"""FakeEngine and fake_runner, as a user's tests meet them."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.errors import OptionError
from offramp.policy import Policy
from offramp.runtime import FakeEngine, fake_runner
from offramp.runtime.fake import logits_from_max_prob
from offramp.scores import scores_from_logits

ONE = np.float32(1)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_logits_from_max_prob_give_that_probability(num_classes: int) -> None:
    wanted = np.array([0.5, 0.75, 0.99])
    scores = scores_from_logits(logits_from_max_prob(wanted, num_classes), ONE)
    np.testing.assert_allclose(scores[:, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("max_prob", [0.4, 1.0, float("nan")])
def test_an_impossible_probability_is_refused(max_prob: float) -> None:
    with pytest.raises(OptionError, match="at least 1 / 2 and below 1"):
        fake_runner([max_prob])


@pytest.mark.parametrize("logits", [[[0.0, 1.0]], [0.0, 1.0], [[0.0], [1.0]], [[0.0, 1.0], [np.nan, 0.0]]])
def test_an_answer_of_the_wrong_shape_is_refused(logits: object) -> None:
    engine = FakeEngine(lambda inputs: logits)
    with pytest.raises(OptionError, match=r"answer to 2 rows .* expected finite logits \(2, classes\)"):
        engine.run({"x": np.zeros(2)}, np.arange(2), ONE)


def test_the_example_of_the_docstring() -> None:
    runner = fake_runner([0.6, 0.95], Policy.thresholds("max_prob", [0.9]))
    assert runner.run({"x": np.zeros(3, np.float32)}).exit_index.tolist() == [1, 1, 1]
    assert runner.backend == "fake"


def test_scripted_retention() -> None:
    runner = fake_runner([0.6, 0.6, 0.6], learned=[None, 0.5], retention=[1.0, lambda inputs: inputs["x"]])
    assert [spec.row_outputs.keys() for spec in runner.manifest.exits] == [
        {"retention"},
        {"learned", "retention"},
        set(),
    ]
    trace = runner.record([{"x": np.array([0.25, 1.0], np.float32)}])
    np.testing.assert_array_equal(trace.retention, np.array([[1, 0.25, np.nan], [1, 1, np.nan]], np.float32))
    np.testing.assert_array_equal(trace.learned, np.array([[np.nan, 0.5, np.nan]] * 2, np.float32))


def test_scripted_learned_confidences() -> None:
    """A number, a function of the rows that are still here, or none: the last exit has none."""
    learned = [lambda inputs: inputs["x"], 0.5]
    runner = fake_runner([0.6, 0.6, 0.6], Policy.thresholds("learned", [0.9, 0.6]), learned=learned)
    result = runner.run({"x": np.array([0.25, 0.95, 1.0], np.float32)})
    assert result.exit_index.tolist() == [2, 0, 0]
    np.testing.assert_array_equal(result.score, np.array([np.nan, 0.95, 1.0], np.float32))
    trace = runner.record([{"x": np.array([0.25, 1.0], np.float32)}])
    np.testing.assert_array_equal(trace.learned, np.array([[0.25, 0.5, np.nan], [1, 0.5, np.nan]], np.float32))
    with pytest.raises(OptionError, match="at exits 2"):
        fake_runner([0.6] * 4, Policy.thresholds("learned", [0.9, 0.6, 0.5]), learned=learned)


@pytest.mark.parametrize("learned", [[0.5], [0.5, np.nan], [0.5, 1.5]])
def test_impossible_learned_confidences_are_refused(learned: list[float]) -> None:
    engine = FakeEngine(lambda inputs: np.zeros((2, 2)), lambda inputs: learned)
    with pytest.raises(OptionError, match=r"its learned of 2 rows .* expected \(2,\) in \[0, 1\]"):
        engine.run({"x": np.zeros(2)}, np.arange(2), ONE)
