"""Diagnostics of a trace: can the exits' confidence be believed, do they agree, does going on help or harm?

Diagnostics, not promises: a well calibrated exit may still waste time and a badly calibrated one may rank its rows well
(Kubaty et al. 2025, "Failure Prediction Is a Better Performance Proxy for Early-Exit Networks Than Calibration"), so
thresholds are chosen and certified elsewhere. What needs labels is measured on the rows that have one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.errors import DataError
from offramp.trace import Trace
from offramp.tuning.losses import brier_scores
from offramp.tuning.regression import ValueDiagnostics, diagnose_values, mid_ranks
from offramp.tuning.temperature import (
    ECE_LIMIT,
    NUM_BINS,
    bins_of_equal_width,
    expected_calibration_error,
    fit_temperature,
    nll,
    softmax,
)
from offramp.tuning.vector_scaling import VectorScaling, vector_scaling


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows of similar confidence: what a reliability diagram draws."""

    low: float
    high: float
    num_rows: int
    confidence: float  # mean
    accuracy: float


@dataclass(frozen=True)
class Quality:
    """How far one exit's probabilities can be believed, at one temperature."""

    temperature: float
    nll: float
    brier: float  # in [0, 2]
    ece: float
    adaptive_ece: float
    classwise_ece: float
    failure_auroc: float | None  # None when all rows are right, or all wrong
    reliability: tuple[ReliabilityBin, ...]  # the bins of `ece` that have rows


@dataclass(frozen=True)
class ExitDiagnostics:
    """One exit on the labelled rows. `scaled` is in-sample: its one parameter was fitted on the same rows."""

    exit_index: int
    accuracy: float
    needs_scaling: bool  # its calibration error at temperature 1 is above the limit (arXiv 2510.12856, section 7.2)
    fitted_temperature: float  # what would minimise the negative log-likelihood
    unscaled: Quality
    scaled: Quality  # at the fitted temperature where it needs scaling, at 1 otherwise
    vector: VectorScaling


@dataclass(frozen=True)
class Overthinking:
    """What going on does to rows that an early exit had right (Kaya et al. 2019, arXiv 1810.07052, section 4).

    Shares of all labelled rows; wasteful and destructive ones exclude each other. An oracle that stops every row at
    its first right exit would need `oracle_depth` segments on average and be right on `oracle_accuracy`.
    """

    wasteful: float  # an earlier exit was right, and so is the end
    destructive: float  # an earlier exit was right, and the end is wrong
    share_of_errors: float | None  # destructive rows ÷ rows the end has wrong; None when it has none
    oracle_accuracy: float
    oracle_depth: float
    confusion_auroc: float | None  # how well `confusion` tells rows the end has wrong from the others


@dataclass(frozen=True)
class Diagnostics:
    """All of it; `exits` is empty and `overthinking` None for a trace without labels, or of a regression.

    That has `values`, and no agreement: no two exits give quite the same value.
    """

    num_rows: int
    num_labelled: int
    agreement: tuple[tuple[float, ...], ...]  # (E, E): share of rows to which two exits give the same answer
    exits: tuple[ExitDiagnostics, ...] = ()
    overthinking: Overthinking | None = None
    values: tuple[ValueDiagnostics, ...] = ()

    def document(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def diagnose(trace: Trace, ece_limit: float = ECE_LIMIT) -> Diagnostics:
    """Measure everything on `trace`. Raises DataError when it has no rows, or only one with a label."""
    if not len(trace.labels):
        raise DataError("diagnosing: got a trace of 0 rows, expected some; record it again with `offramp trace`")
    if not trace.has_logits:
        raise DataError("diagnosing: got a trace without logits, as those of decoders are; `offramp score` has figures")
    known = trace.known
    counts = len(trace.labels), int(known.sum())
    if trace.is_regression:
        return Diagnostics(*counts, (), values=diagnose_values(trace))
    agreement = exit_agreement(trace.predictions)
    if not known.any():
        return Diagnostics(*counts, tuple(map(tuple, agreement.tolist())))
    rows = trace.rows(known)
    exits = tuple(diagnose_exit(rows.logits[:, k], rows.labels, k, ece_limit) for k in range(trace.num_exits))
    temperatures = np.array([found.scaled.temperature for found in exits])
    return Diagnostics(*counts, tuple(map(tuple, agreement.tolist())), exits, overthinking(rows, temperatures))


def diagnose_exit(
    logits: NDArray[np.floating], labels: NDArray[np.int64], exit_index: int, ece_limit: float = ECE_LIMIT
) -> ExitDiagnostics:
    """What the logits (L, C) of one exit are worth against `labels` (L,). Raises DataError when L < 2."""
    vector = vector_scaling(logits, labels)
    unscaled = quality(logits, labels, 1.0)
    needs_scaling = unscaled.ece > ece_limit
    fitted = fit_temperature(logits, labels)
    return ExitDiagnostics(
        exit_index=exit_index,
        accuracy=float((logits.argmax(axis=1) == labels).mean()),
        needs_scaling=needs_scaling,
        fitted_temperature=fitted,
        unscaled=unscaled,
        scaled=quality(logits, labels, fitted) if needs_scaling else unscaled,
        vector=vector,
    )


def quality(logits: NDArray[np.floating], labels: NDArray[np.int64], temperature: float) -> Quality:
    """The measures of softmax(logits (L, C) / temperature) against `labels` (L,)."""
    probabilities = softmax(logits, temperature)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    return Quality(
        temperature=temperature,
        nll=nll(logits, labels, temperature),
        brier=float(brier_scores(probabilities, labels).mean()),
        ece=expected_calibration_error(confidence, correct),
        adaptive_ece=adaptive_calibration_error(confidence, correct),
        classwise_ece=classwise_calibration_error(probabilities, labels),
        failure_auroc=failure_auroc(confidence, correct),
        reliability=reliability_bins(confidence, correct),
    )


def adaptive_calibration_error(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> float:
    """As the expected calibration error, over bins of equal mass (Nguyen & O'Connor 2015, arXiv 1508.05154, section 3).

    Rows of equal confidence share a bin, so the order of the rows does not matter. Raises DataError when N = 0.
    """
    if not len(confidence):
        raise DataError("calibration error: got 0 rows, expected at least 1; record a trace with labels")
    bins = (mid_ranks(confidence) * num_bins / len(confidence)).astype(np.int64)  # ranks in (0, N)
    surplus = np.bincount(bins, np.asarray(confidence, np.float64) - correct, num_bins)
    return float(np.abs(surplus).sum() / len(confidence))


def classwise_calibration_error(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], num_bins: int = NUM_BINS
) -> float:
    """The calibration error of every class's probability, averaged (Kull et al. 2019, arXiv 1910.12656, section 2)."""
    count, num_classes = probabilities.shape
    bins = bins_of_equal_width(probabilities, num_bins) + num_bins * np.arange(num_classes)  # (L, C)
    surplus = probabilities.copy()
    surplus[np.arange(count), labels] -= 1
    sums = np.bincount(bins.ravel(), surplus.ravel(), num_bins * num_classes)
    return float(np.abs(sums).sum() / (count * num_classes))


def failure_auroc(confidence: NDArray[np.floating], correct: NDArray[np.bool_]) -> float | None:
    """How often a right row is surer than a wrong one, ties counting half; None when there is only one kind.

    The area under the ROC curve by ranks (Mann & Whitney 1947).
    """
    num_right = int(correct.sum())
    num_wrong = len(correct) - num_right
    if not num_right or not num_wrong:
        return None
    below = mid_ranks(confidence)[correct].sum() - num_right**2 / 2  # pairs with a wrong row below, or beside
    return float(below / (num_right * num_wrong))


def reliability_bins(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> tuple[ReliabilityBin, ...]:
    """The bins of `expected_calibration_error` that have rows, in their order."""
    bins = bins_of_equal_width(confidence, num_bins)
    counts = np.bincount(bins, minlength=num_bins)
    means = [np.bincount(bins, values, num_bins) / counts.clip(1) for values in (confidence, correct)]
    return tuple(
        ReliabilityBin(k / num_bins, (k + 1) / num_bins, int(counts[k]), float(means[0][k]), float(means[1][k]))
        for k in np.flatnonzero(counts).tolist()
    )


def exit_agreement(predictions: NDArray[np.int64]) -> NDArray[np.float64]:
    """(E, E): share of the rows `predictions` (N, E), N >= 1, to which two exits give the same answer."""
    return np.stack([(predictions == column[:, None]).mean(axis=0) for column in predictions.T])


def confusion(trace: Trace, temperatures: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,): how far the early exits are from the end, the sum over them of the L1 distance of their probabilities.

    Kaya et al. 2019, arXiv 1810.07052, section 5, without their normalisation, which orders rows alike.
    """
    final = softmax(trace.logits[:, -1], temperatures[-1])
    total = np.zeros(len(final))
    for k in range(trace.num_exits - 1):
        total += np.abs(softmax(trace.logits[:, k], temperatures[k]) - final).sum(axis=1)
    return total


def overthinking(trace: Trace, temperatures: NDArray[np.float64]) -> Overthinking:
    """What going on does to the rows of a trace that are all labelled, N >= 1."""
    right = trace.predictions == trace.labels[:, None]  # (N, E)
    earlier, final = right[:, :-1].any(axis=1), right[:, -1]
    destructive, wrong = earlier & ~final, ~final
    ever = right.any(axis=1)
    depth = np.where(ever, right.argmax(axis=1), trace.num_exits - 1) + 1
    return Overthinking(
        wasteful=float((earlier & final).mean()),
        destructive=float(destructive.mean()),
        share_of_errors=float(destructive.sum() / wrong.sum()) if wrong.any() else None,
        oracle_accuracy=float(ever.mean()),
        oracle_depth=float(depth.mean()),
        confusion_auroc=failure_auroc(-confusion(trace, temperatures), final),
    )
