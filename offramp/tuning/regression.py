"""Regressions: thresholds that lose a stated error on a trace, and what the trace tells of the exits.

As with `thresholds`, an error is held on the rows it was chosen on and promised on no others; `certify` is for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import LEARNED
from offramp.errors import DataError
from offramp.policy import Policy
from offramp.trace import Trace
from offramp.tuning.losses import absolute_errors
from offramp.tuning.path import learned_path, policy_at, sureness_of
from offramp.tuning.replay import cumulative_costs_ms
from offramp.tuning.thresholds import Reference

_LEAST_BUDGET = 1e-9  # of a path, in losses: an error of 0 is allowed, a path in 0 steps is not


@dataclass(frozen=True)
class ValueDiagnostics:
    """One exit of a regression; the first four are None without targets."""

    exit_index: int
    error: float | None  # mean absolute
    rmse: float | None
    bias: float | None  # mean of value - target
    sure_rank: float | None  # rank correlation of the learned confidence with being right; None where it has none
    deviation: float  # mean distance from the final exit's value


def value_errors(trace: Trace, reference: Reference) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rows that count, (L,), and how far every exit is off, (N, E): from the target, or from full depth's value.

    Raises DataError when no row counts.
    """
    known = trace.known if reference == "label" else np.ones(len(trace.labels), np.bool_)
    if not known.any():
        raise DataError(
            f"regression: got {len(known)} rows, none with a target; record a trace of labelled data, or use reference "
            "'full_depth' for data without labels"
        )
    return np.flatnonzero(known), absolute_errors(
        trace, trace.targets if reference == "label" else trace.logits[:, -1, 0]
    )


def fastest_values(
    trace: Trace, max_loss: float, temperatures: tuple[float, ...] = (), reference: Reference = "label"
) -> Policy:
    """Thresholds on the learned confidence with which `trace` loses at most `max_loss` of mean absolute error.

    In the unit of the targets, and against full depth. Found greedily, by what saves most cost per error (`path`): no
    cheaper choice is promised not to exist. Raises DataError, and OptionError when no exit has a confidence.
    """
    counted, errors = value_errors(trace, reference)
    base = Policy(LEARNED, temperatures=temperatures)
    lost = errors[counted] - errors[counted, -1:]
    unit = float(np.abs(lost).max()) or 1.0
    budget = max(max_loss / unit * len(counted), _LEAST_BUDGET)
    sureness = sureness_of(base, trace)[:, counted]
    return policy_at(base, learned_path(sureness, lost / unit, cumulative_costs_ms(trace), budget)[-1])


def diagnose_values(trace: Trace) -> tuple[ValueDiagnostics, ...]:
    """What each exit of a regression is worth on the rows with a target, N >= 1."""
    rows = trace.rows(trace.known)
    signed = rows.logits[:, :, 0].astype(np.float64) - rows.targets[:, None]
    deviation = absolute_errors(trace, trace.logits[:, -1, 0]).mean(axis=0)
    found = []
    for k in range(trace.num_exits):
        off = signed[:, k]
        has = len(off) > 0
        found.append(
            ValueDiagnostics(
                exit_index=k,
                error=float(np.abs(off).mean()) if has else None,
                rmse=float(np.sqrt((off**2).mean())) if has else None,
                bias=float(off.mean()) if has else None,
                sure_rank=rank_correlation(rows.learned[:, k], -np.abs(off)) if has and trace.has_learned[k] else None,
                deviation=float(deviation[k]),
            )
        )
    return tuple(found)


def rank_correlation(left: NDArray[np.floating], right: NDArray[np.floating]) -> float | None:
    """Spearman's coefficient of (L,) and (L,), equal values sharing their ranks; None where one never changes."""
    ranks = [mid_ranks(values) - (len(values) / 2) for values in (left, right)]
    spread = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / spread if spread else None


def mid_ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Of every value the number of smaller ones and half of the equal ones, itself included; in (0, N)."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - counts / 2)[position]
    return ranks
