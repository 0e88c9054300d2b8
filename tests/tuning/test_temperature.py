import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import DataError, OptionError
from offramp.trace import UNKNOWN
from offramp.tuning.temperature import (
    LOG_TEMPERATURE_RANGE,
    expected_calibration_error,
    fit_temperature,
    nll,
    temperature_if_needed,
)

COLDEST, HOTTEST = (math.exp(end) for end in LOG_TEMPERATURE_RANGE)


def sampled(num_rows, num_classes, temperature, seed=0):
    """Logits, and labels drawn from softmax(logits / temperature)."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(num_rows, num_classes)) * 3
    gumbel = generator.gumbel(size=logits.shape)
    return logits, (logits / temperature + gumbel).argmax(axis=1)


def test_nll_by_hand():
    logits = np.log([[0.25, 0.75], [0.5, 0.5]])
    assert nll(logits, np.array([1, 0])) == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)
    # at temperature 1/2 the odds 1 : 3 become 1 : 9
    assert nll(logits[:1], np.array([1]), 0.5) == pytest.approx(-math.log(0.9))


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.95, 0.55])
    correct = np.array([True, True, False, True])
    # two bins of the fifteen are filled: |2/3 - 0.95| for three rows, |1 - 0.55| for one
    expected = (3 * (0.95 - 2 / 3) + 0.45) / 4
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected)


def test_calibration_error_of_one_bin_is_the_mean_difference():
    confidence = np.array([0.9, 0.3, 1.0, 0.0])
    correct = np.array([True, False, True, False])
    assert expected_calibration_error(confidence, correct, num_bins=1) == pytest.approx(0.05)


def test_calibration_bins_are_closed_above():
    confidence = np.array([0.5, 0.51])  # in halves: (0, 0.5] and (0.5, 1]
    correct = np.array([True, False])
    assert expected_calibration_error(confidence, correct, num_bins=2) == pytest.approx((0.5 + 0.51) / 2)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_calibration_error_is_a_share(rows):
    confidence, correct = (np.array(column) for column in zip(*rows, strict=True))
    assert 0 <= expected_calibration_error(confidence, correct) <= 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 6.0])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_known_temperature_is_found(temperature, num_classes):
    logits, labels = sampled(40_000, num_classes, temperature)
    # log T has a standard error below 0.01 at this size
    assert math.log(fit_temperature(logits, labels)) == pytest.approx(math.log(temperature), abs=0.04)


def test_fit_is_the_best_of_a_dense_grid():
    logits, labels = sampled(300, 4, 1.9, seed=1)
    grid = np.exp(np.linspace(*LOG_TEMPERATURE_RANGE, 3001))
    best = min(grid, key=lambda temperature: nll(logits, labels, temperature))
    assert fit_temperature(logits, labels) == pytest.approx(best, rel=0.002)


def test_always_right_is_bounded_below_and_always_wrong_above():
    logits = np.array([[3.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, np.array([0, 1])) == pytest.approx(COLDEST, rel=1e-5)
    assert fit_temperature(logits, np.array([1, 0])) == pytest.approx(HOTTEST, rel=1e-5)


def test_logits_that_say_nothing_keep_temperature_one():
    assert fit_temperature(np.zeros((5, 3)), np.array([0, 1, 2, 0, 1])) == 1.0


def test_huge_float32_logits_stay_finite():
    logits = np.array([[3e38, -3e38], [-3e38, 3e38]], np.float32)
    assert fit_temperature(logits, np.array([0, 0])) == pytest.approx(HOTTEST, rel=1e-5)


def test_rows_without_a_label_are_left_out():
    logits, labels = sampled(500, 3, 2.0)
    more = np.concatenate([logits, logits[::-1] * 9])
    unknown = np.concatenate([labels, np.full(500, UNKNOWN)])
    assert fit_temperature(more, unknown) == fit_temperature(logits, labels)


def test_scaling_only_above_the_limit():
    logits, labels = sampled(500, 3, 2.0)
    assert temperature_if_needed(logits, labels, calibration_error=0.02) == 1.0
    assert temperature_if_needed(logits, labels, calibration_error=0.021) == fit_temperature(logits, labels)
    assert temperature_if_needed(logits, labels, calibration_error=1.0, ece_limit=1.0) == 1.0


def test_no_labelled_rows_is_a_data_error():
    with pytest.raises(DataError, match="none with a label"):
        fit_temperature(np.zeros((0, 2)), np.zeros(0, np.int64))
    with pytest.raises(DataError, match="got 2 rows"):
        nll(np.zeros((2, 2)), np.full(2, UNKNOWN))
    with pytest.raises(DataError, match="got 0 rows"):
        expected_calibration_error(np.zeros(0), np.zeros(0, np.bool_))


def test_shapes_that_do_not_fit_are_an_option_error():
    with pytest.raises(OptionError, match=r"\(3, 2\) and labels \(2,\)"):
        fit_temperature(np.zeros((3, 2)), np.zeros(2, np.int64))
