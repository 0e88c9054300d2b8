"""Temperature scaling: how wrong the confidence of one exit is, and the scalar that mends it.

The temperature divides the logits before softmax (Guo et al. 2017, arXiv 1706.04599, section 4.2). It changes
no prediction. A low calibration error is a diagnostic, not a promise: thresholds are chosen elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from offramp.errors import DataError, OptionError
from offramp.trace import UNKNOWN

NUM_BINS = 15  # Guo et al. 2017, section 5; the same in arXiv 2510.12856, section 7.2
ECE_LIMIT = 0.02  # arXiv 2510.12856, section 7.2: an exit is scaled when its error is above this
# Beyond a factor of 20 either way float32 softmax is one-hot or flat. A fit at an end of the range means
# that the data has no optimum: the exit is always right, or never better than chance.
LOG_TEMPERATURE_RANGE = (-3.0, 3.0)
# A function value known to 2e-16 locates its minimum to about its square root, 1.5e-8 (Brent 1973,
# "Algorithms for Minimization without Derivatives", chapter 5); sampling error is above 1e-4 at 10^7 rows.
LOG_TEMPERATURE_TOLERANCE = 1e-6
_SHRINK = (math.sqrt(5) - 1) / 2  # golden section: each step keeps this share of the interval


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """(…, C) to probabilities."""
    scaled = np.asarray(logits, np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def nll(logits: NDArray[np.floating], labels: NDArray[np.int64], temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of `labels` (N,) under `logits` (N, C) / temperature.

    Rows without a label are left out. Raises DataError when none has one.
    """
    return _mean_nll(*_labelled_rows(logits, labels), temperature)


def expected_calibration_error(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> float:
    """Mean distance of confidence from accuracy, over bins of equal width (Guo et al. 2017, equation 3).

    confidence (N,) in [0, 1], correct (N,); bins are closed above. Raises DataError when N = 0.
    """
    if len(confidence) == 0:
        raise DataError("calibration error: got 0 rows, expected at least 1; record a trace with labels")
    bins = bins_of_equal_width(confidence, num_bins)
    surplus = np.bincount(bins, confidence - correct.astype(np.float64), num_bins)  # (num_bins,)
    return float(np.abs(surplus).sum() / len(confidence))


def bins_of_equal_width(confidence: NDArray[np.floating], num_bins: int = NUM_BINS) -> NDArray[np.int64]:
    """The bin of every confidence (N,) in [0, 1], (N,) in 0 … num_bins - 1; bins are closed above."""
    bins = np.ceil(np.asarray(confidence, np.float64) * num_bins).astype(np.int64) - 1
    return bins.clip(0, num_bins - 1)


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """The temperature that minimises the negative log-likelihood of `labels` (N,) under `logits` (N, C).

    Rows without a label are left out. The result lies within exp(LOG_TEMPERATURE_RANGE), and is 1 when no
    other temperature is better. Raises DataError when no row has a label.
    """
    rows, classes = _labelled_rows(logits, labels)

    def loss(log_temperature: float) -> float:  # one minimum: convex in 1 / T, and log T is monotone in it
        return _mean_nll(rows, classes, math.exp(log_temperature))

    best = _golden_section(loss, *LOG_TEMPERATURE_RANGE, LOG_TEMPERATURE_TOLERANCE)
    return math.exp(best) if loss(best) < loss(0.0) else 1.0


def temperature_if_needed(
    logits: NDArray[np.floating],
    labels: NDArray[np.int64],
    calibration_error: float,
    ece_limit: float = ECE_LIMIT,
) -> float:
    """`fit_temperature` where the `calibration_error` at temperature 1 is above `ece_limit`, else 1.

    A limit of 0 scales wherever there is any error, a limit of 1 never. Raises DataError when it has to
    scale and no row has a label.
    """
    return fit_temperature(logits, labels) if calibration_error > ece_limit else 1.0


def _labelled_rows(
    logits: NDArray[np.floating], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The labelled rows, (L, C) float64 with the maximum of each row at 0, and their labels (L,)."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise OptionError(f"temperature: got logits {logits.shape} and labels {labels.shape}, expected (N, C) and (N,)")
    known = labels != UNKNOWN
    if not known.any():
        raise DataError(f"temperature: got {len(labels)} rows, none with a label; record a trace of labelled data")
    rows = logits[known].astype(np.float64)
    return rows - rows.max(axis=1, keepdims=True), labels[known]


def _mean_nll(rows: NDArray[np.float64], classes: NDArray[np.int64], temperature: float) -> float:
    """`nll` of rows (L, C) whose maxima are 0."""
    scaled = rows / temperature
    log_total = np.log(np.exp(scaled).sum(axis=1))  # (L,) >= 0
    return float(np.mean(log_total - scaled[np.arange(len(classes)), classes]))


def _golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    """Where a function with one minimum in [low, high] has it (Kiefer 1953), within `tolerance`."""
    left, right = high - _SHRINK * (high - low), low + _SHRINK * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _SHRINK * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _SHRINK * (high - low)
            at_right = function(right)
    return (low + high) / 2
