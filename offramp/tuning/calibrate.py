"""Calibration without a certificate: from a trace to a policy, with a report of what it does on that trace.

For those who name the drop or the speedup they want and take the risk; `certify` is the way that shows what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import SCORES
from offramp.errors import DataError, OptionError
from offramp.policy import POLICY_SCORES, Policy
from offramp.scores import scores_from_logits
from offramp.trace import UNKNOWN, Trace
from offramp.tuning.regression import fastest_values, value_errors
from offramp.tuning.replay import (
    Replay,
    accuracy,
    cumulative_costs_ms,
    exit_shares,
    expected_cost_ms,
    mean_depth,
    replay,
)
from offramp.tuning.temperature import ECE_LIMIT, expected_calibration_error, temperature_if_needed
from offramp.tuning.thresholds import Reference, fastest_thresholds, right_rows, thresholds_for_speedup


@dataclass(frozen=True)
class CalibrateOptions:
    """How to calibrate. Raises OptionError when made with values that make no sense.

    With reference "full_depth" labels are not needed: a right answer is the final exit's, and temperatures stay those
    of the trace. Of a regression `max_drop` is the mean absolute error that may be lost. An exit is scaled when its
    calibration error is above `ece_limit`; 1 scales none.
    With a `target_speedup` (above 1) one threshold for all exits is chosen to reach it, whatever is lost.
    """

    score: str = "max_prob"
    max_drop: float = 0.01
    reference: Reference = "label"
    ece_limit: float = ECE_LIMIT
    target_speedup: float = 1.0  # 1: the fastest policy within max_drop

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < math.inf:
            raise OptionError(f"calibrate: got a drop of {self.max_drop}, expected a number from 0")
        if self.score not in POLICY_SCORES:
            raise OptionError(f"calibrate: got score {self.score!r}, expected one of {', '.join(POLICY_SCORES)}")
        if self.reference not in get_args(Reference):
            raise OptionError(f"calibrate: got reference {self.reference!r}, expected one of {get_args(Reference)}")
        if not 0 <= self.ece_limit <= 1:
            raise OptionError(f"calibrate: got a limit of {self.ece_limit} on the calibration error, expected 0 to 1")
        if not 1 <= self.target_speedup < math.inf:
            raise OptionError(f"calibrate: got a target speedup of {self.target_speedup}, expected a number above 1")


@dataclass(frozen=True)
class ExitReport:
    """One exit on the trace; what needs labels is None without them."""

    exit_index: int
    temperature: float
    ece_before: float | None  # at temperature 1
    ece_after: float | None  # at `temperature`
    threshold: float | None  # None: closed, or the final exit
    share: float  # of the rows, that leave here
    accuracy: float | None  # of this exit over all rows, had they all left here; None of a regression
    error: float | None  # of a regression, the same: mean absolute
    changed: float | None  # share of the rows leaving here whose answer full depth would not give; not of a regression


@dataclass(frozen=True)
class CalibrationReport:
    """What a policy does on some rows; on rows that chose it without a test, expect a larger drop on others.

    `drop` is against full depth, in the sense of the reference: of accuracy, or, for a regression, what is added to the
    mean absolute error. Values have no accuracy, and classes no error. Its standard error is that of independent
    rows and leaves the choice out of account; it is 0 where nothing changed.
    """

    fingerprint: str
    backend: str
    precision: str
    num_rows: int
    num_labelled: int
    exits: tuple[ExitReport, ...]
    accuracy_full_depth: float | None
    accuracy_policy: float | None
    error_full_depth: float | None  # mean absolute, of a regression
    error_policy: float | None
    drop: float
    drop_standard_error: float
    mean_depth: float  # in segments
    expected_ms: float  # per row, from the segment times in the trace
    expected_speedup: float  # full depth ÷ policy, both from those times; `offramp bench` measures it


@dataclass(frozen=True)
class Calibration:
    """The policy, and the report about it."""

    policy: Policy
    report: CalibrationReport


def calibrate(trace: Trace, options: CalibrateOptions) -> Calibration:
    """Choose temperatures, then thresholds, and report what they do on `trace`.

    Raises DataError when the trace has no rows that count, or costs or scores that make no sense.
    """
    _errors(trace, options.reference)  # raises before anything is fitted
    keeps_temperatures = options.reference == "full_depth" or trace.is_regression
    temperatures = (
        tuple(trace.temperatures.tolist()) if keeps_temperatures else scaled_temperatures(trace, options.ece_limit)
    )
    if trace.is_regression:
        Policy.thresholds(options.score, [1.0] * (trace.num_exits - 1)).check_values()
    if options.target_speedup > 1:
        policy = thresholds_for_speedup(trace, options.score, options.target_speedup, temperatures)
    elif trace.is_regression:
        policy = fastest_values(trace, options.max_drop, temperatures, options.reference)
    else:
        policy = fastest_thresholds(trace, options.score, options.max_drop, temperatures, options.reference)
    return Calibration(policy, report_on(trace, policy, options.reference))


def report_on(trace: Trace, policy: Policy, reference: Reference) -> CalibrationReport:
    """What `policy` does on `trace`. Raises DataError as `calibrate` does."""
    counted, errors = _errors(trace, reference)
    decided = replay(policy, trace)
    losses = errors[counted, decided.exit_index[counted]] - errors[counted, -1]  # (L,); of classes in {-1, 0, 1}
    expected_ms = expected_cost_ms(decided.exit_index, trace)
    return CalibrationReport(
        fingerprint=trace.fingerprint,
        backend=trace.backend,
        precision=trace.precision,
        num_rows=len(trace.labels),
        num_labelled=int(trace.known.sum()),
        exits=_exit_reports(trace, policy, decided),
        accuracy_full_depth=_accuracy(trace.predictions[:, -1], trace),
        accuracy_policy=_accuracy(decided.prediction, trace),
        error_full_depth=_error(np.full(len(trace.labels), trace.num_exits - 1), trace),
        error_policy=_error(decided.exit_index, trace),
        drop=float(losses.mean()),
        drop_standard_error=float(losses.std() / math.sqrt(len(losses))),
        mean_depth=mean_depth(decided.exit_index),
        expected_ms=expected_ms,
        expected_speedup=float(cumulative_costs_ms(trace)[-1] / expected_ms),
    )


def _errors(trace: Trace, reference: Reference) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rows that count, (L,), and how wrong every exit is about every row, (N, E): 0 or 1, or by how much."""
    if trace.is_regression:
        return value_errors(trace, reference)
    counted, right = right_rows(trace, reference)
    return counted, (~right).astype(np.float64)


def scaled_temperatures(trace: Trace, ece_limit: float = ECE_LIMIT) -> tuple[float, ...]:
    """The temperature of every exit, the final one included, fitted where its calibration error is above the limit.

    A trace without logits keeps its own.

    Raises DataError when no row has a label.
    """
    if not trace.has_logits:
        return tuple(trace.temperatures.tolist())
    temperatures = []
    for k in range(trace.num_exits):
        error = _calibration_error(trace, k, 1.0)
        if error is None:
            raise DataError(f"temperatures: got {len(trace.labels)} rows, none with a label; record labelled data")
        temperatures.append(temperature_if_needed(trace.logits[:, k], trace.labels, error, ece_limit))
    return tuple(temperatures)


def _calibration_error(trace: Trace, exit_index: int, temperature: float) -> float | None:
    """The calibration error of one exit at `temperature` on the labelled rows."""
    known = trace.labels != UNKNOWN
    if not known.any():
        return None
    scores = trace.scores[known, exit_index]
    if trace.has_logits:
        scores = scores_from_logits(trace.logits[known, exit_index], 1 / temperature)
    correct = trace.predictions[known, exit_index] == trace.labels[known]
    return expected_calibration_error(scores[:, SCORES.index("max_prob")], correct)


def _exit_reports(trace: Trace, policy: Policy, decided: Replay) -> tuple[ExitReport, ...]:
    shares = exit_shares(decided.exit_index, trace.num_exits)
    reports = []
    for k, temperature in enumerate(policy.temperatures):
        leavers = decided.exit_index == k
        changed = trace.predictions[leavers, k] != trace.predictions[leavers, -1]
        reports.append(
            ExitReport(
                exit_index=k,
                temperature=temperature,
                ece_before=_calibration_error(trace, k, 1.0),
                ece_after=_calibration_error(trace, k, temperature),
                threshold=policy.limits[k] if k < len(policy.limits) else None,
                share=float(shares[k]),
                accuracy=_accuracy(trace.predictions[:, k], trace),
                error=_error(np.full(len(trace.labels), k), trace),
                changed=float(changed.mean()) if len(changed) and not trace.is_regression else None,
            )
        )
    return tuple(reports)


def _accuracy(predictions: NDArray[np.int64], trace: Trace) -> float | None:
    return accuracy(predictions, trace.labels) if (trace.labels != UNKNOWN).any() else None


def _error(exit_index: NDArray[np.int64], trace: Trace) -> float | None:
    """The mean absolute error when rows leave at `exit_index` (N,); None without targets."""
    if not trace.is_regression or not trace.known.any():
        return None
    counted, errors = value_errors(trace, "label")
    return float(errors[counted, exit_index[counted]].mean())
