"""Losses: what it costs in risk when a row leaves at an exit instead of the final one, for every row and exit.

Of classes and probabilities, or of the values of a regression; all relative to full depth, so that never leaving early
has no loss and a safe policy always exists (Jazbec et al., "Fast yet Safe", NeurIPS 2024, section 3). The risk of a
policy is the mean of the losses where its rows leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.certificate import RISKS, VALUED
from offramp.errors import DataError, OptionError
from offramp.trace import UNKNOWN, Trace
from offramp.tuning.temperature import softmax

COUNTED = ("consistency", "accuracy_gap", "missed_detection")  # losses of 0 and 1: counted, tested exactly
LABELLED = ("accuracy_gap", "accuracy_gap_signed", "brier", "error_gap")  # need labels, or targets


@dataclass(frozen=True)
class LossTable:
    """The loss of every row, had it left at each exit."""

    counts: NDArray[np.bool_]  # (N,): does the row count for the risk
    values: NDArray[np.float64]  # (N, E) at most 1; the last column is 0, and so are rows that do not count
    is_counted: bool  # only 0 and 1

    def of(self, exit_index: NDArray[np.int64]) -> NDArray[np.float64]:
        """The losses (M,) of the M rows that count when the rows leave at `exit_index` (N,)."""
        return self.values[np.arange(len(exit_index)), exit_index][self.counts]

    def rows(self, keep: NDArray[np.int64]) -> LossTable:
        """The table of the rows `keep`."""
        return LossTable(self.counts[keep], self.values[keep], self.is_counted)


def losses_from_trace(
    trace: Trace,
    risk: str,
    inverse_temperatures: NDArray[np.float32],
    class_index: int = UNKNOWN,
    value_range: float = 1.0,
) -> LossTable:
    """The losses of `risk` (one of certificate.RISKS) on `trace`; probabilities are at `inverse_temperatures` (E,).

    Of a regression distances are clipped to `value_range` and divided by it, which makes them losses of at most 1. How
    much nearer an early value is counts back, up to that range, too.

    Rows that count are all of them, those with a label for a risk that needs it, and for a missed detection those
    that full depth assigns to `class_index`. Raises OptionError, and DataError when no row counts.
    """
    if risk not in RISKS:
        raise OptionError(f"losses: got risk {risk!r}, expected one of {', '.join(RISKS)}")
    _check_kind(trace, risk)
    if (risk == "missed_detection") != (class_index != UNKNOWN):
        raise OptionError("losses: a missed detection is one of a class, and no other risk is; name it with --class")
    counts = np.ones(len(trace.labels), np.bool_)
    if risk in LABELLED:
        counts = trace.known
    elif risk == "missed_detection":
        counts = trace.predictions[:, -1] == class_index
    if not counts.any():
        lacking = "a label" if risk in LABELLED else "what the risk is about"
        raise DataError(
            f"losses: got {len(trace.labels)} rows, none with {lacking}, for risk {risk!r}; record a trace of other "
            f"data, or use --risk {'deviation' if trace.is_regression else 'consistency'}, which needs no labels"
        )
    if risk in ("consistency", "missed_detection"):
        values = (trace.predictions != trace.predictions[:, -1:]).astype(np.float64)
    elif risk in ("accuracy_gap", "accuracy_gap_signed"):
        wrong = (trace.predictions != trace.labels[:, None]).astype(np.float64)
        values = wrong - wrong[:, -1:]  # in {-1, 0, 1}
        values = values.clip(0, 1) if risk == "accuracy_gap" else values
    elif risk in VALUED:
        reference = trace.targets if risk == "error_gap" else trace.logits[:, -1, 0]
        errors = absolute_errors(trace, reference)
        values = (errors - errors[:, -1:]).clip(-value_range, value_range) / value_range
    else:
        values = _probability_losses(trace, inverse_temperatures, risk)
    values[~counts] = 0
    return LossTable(counts, values, risk in COUNTED)


def absolute_errors(trace: Trace, reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """How far every exit's value (N, E) of a regression is from `reference` (N,)."""
    return np.abs(trace.logits[:, :, 0].astype(np.float64) - reference[:, None])


def _check_kind(trace: Trace, risk: str) -> None:
    """Raise OptionError for a risk of classes where there are values, and the other way round."""
    if trace.is_regression != (risk in VALUED):
        kind, expected = ("a regression", VALUED) if trace.is_regression else ("classes", set(RISKS) - set(VALUED))
        raise OptionError(
            f"losses: got risk {risk!r} for a trace of {kind}; expected --risk {' or '.join(sorted(expected))}"
        )


def _probability_losses(trace: Trace, inverse_temperatures: NDArray[np.float32], risk: str) -> NDArray[np.float64]:
    """Hellinger distance to the final exit's probabilities in [0, 1], or half the Brier score lost, in [-1, 1]."""
    final = softmax(trace.logits[:, -1].astype(np.float64) * inverse_temperatures[-1])  # (N, C)
    values = np.zeros(trace.predictions.shape)
    for k in range(trace.num_exits - 1):
        probabilities = softmax(trace.logits[:, k].astype(np.float64) * inverse_temperatures[k])
        if risk == "hellinger":
            overlap = np.sqrt(probabilities * final).sum(axis=1)
            values[:, k] = np.sqrt((1 - overlap).clip(0, 1))
        else:
            values[:, k] = (brier_scores(probabilities, trace.labels) - brier_scores(final, trace.labels)) / 2
    return values


def brier_scores(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Squared distance (M,) of probabilities (M, C) from the one-hot labels (M,), in [0, 2] (Brier 1950)."""
    hit = probabilities[np.arange(len(labels)), labels]
    score: NDArray[np.float64] = (probabilities**2).sum(axis=1) - 2 * hit + 1
    return score
