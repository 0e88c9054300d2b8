"""Thresholds: the fastest ones whose accuracy on a trace stays within a stated drop.

This is the empirical rule and nothing more: the drop is held on the rows it was chosen on. On new rows it is
usually larger, the more so the fewer rows and the more exits there are, because the thresholds that happened
to be lucky here are the ones chosen. There is no safety margin on purpose: one without a probability attached
would look like a guarantee. State a smaller drop, and look at the standard error that `calibrate` reports.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import LEARNED, SCORES
from offramp.errors import DataError, OptionError
from offramp.policy import Policy
from offramp.trace import UNKNOWN, Trace
from offramp.tuning.replay import cumulative_costs_ms, expected_cost_ms, replay, scores_at
from offramp.tuning.search import fastest_quotas, search_from_levels

Reference = Literal["label", "full_depth"]  # what a right answer is: the label, or what the final exit says

# Scores that are not further apart than this are one level, which leaves or stays together: a threshold is
# then at least half of it away from every score of the trace. Score heads in numpy and in ONNX Runtime 1.31
# (CPU) differed by at most 5.4e-7, on 2 to 1,000 classes and 20,000 to 300,000 random rows.
MIN_GAP = 2.0**-19
NUM_TICKS = 2**30  # a full pass in whole ticks: sums over 2^23 rows are exact in float64, so ties are ties


def fastest_thresholds(
    trace: Trace,
    score: str,
    max_drop: float,
    temperatures: tuple[float, ...] = (),
    reference: Reference = "label",
) -> Policy:
    """The cheapest threshold policy on `score` that loses at most `max_drop` of accuracy on `trace`.

    Cheap is the mean of the recorded costs; accuracy is the share of right rows, and the drop is against full
    depth: 0.01 allows 10 of 1,000 rows. With reference "label" only labelled rows count; with "full_depth"
    all rows do, so that the drop is the share of changed answers. An exit where no row leaves is closed, and so is
    one without a learned confidence when that is the score.

    With up to two exits before the final one the result is the optimum, unless one of them is wrong on more
    than 1,000 rows that a later exit gets right; otherwise no change of one or two thresholds improves it.
    Raises DataError when no row counts or costs or scores make no sense, OptionError for other arguments.
    """
    policy = Policy.thresholds(score, [None] * (trace.num_exits - 1), temperatures)
    policy.check_exits(trace.num_exits)
    check_drop(max_drop)
    counted, right = right_rows(trace, reference)
    early = _early_exits(trace, score)
    scores = score_columns(trace, score, policy.inverse_temperatures(trace.num_exits))[counted]  # (L, E)
    grouped = [levels_from_scores(scores[:, k], score) for k in early]
    levels = np.array([levels for levels, _ in grouped], np.int64).reshape(-1, len(counted)).T
    num_losses = int(Decimal(repr(float(max_drop))) * len(counted))  # in floats 0.29 * 100 is 28.999…
    kept = [*early, trace.num_exits - 1]
    search = search_from_levels(levels, right[counted][:, kept], _ticks(trace)[kept], num_losses)
    quotas = fastest_quotas(search)
    limits: list[float | None] = [None] * (trace.num_exits - 1)
    for k, (_, edges), quota in zip(early, grouped, quotas, strict=False):
        limits[k] = limit_from_quota(edges, quota, score)
    return replace(policy, limits=tuple(limits))


def thresholds_for_speedup(trace: Trace, score: str, target: float, temperatures: tuple[float, ...] = ()) -> Policy:
    """The strictest threshold, one for all exits, that makes a row of `trace` cost at most 1 / `target` of full depth.

    Costs are the recorded ones. A stricter threshold never costs less, so it is found by bisection over the levels of
    all scores. Exits without a learned confidence stay closed when that is the score. Raises OptionError when `target`
    is not above 1 or beyond what leaving at the first exit reaches, DataError when no early exit has the score.
    """
    closed = Policy.thresholds(score, [None] * (trace.num_exits - 1), temperatures)
    closed.check_exits(trace.num_exits)
    if not 1 < target < math.inf:
        raise OptionError(f"thresholds: got a target speedup of {target}, expected a number above 1")
    early = _early_exits(trace, score)
    scores = score_columns(trace, score, closed.inverse_temperatures(trace.num_exits))
    _, edges = levels_from_scores(scores[:, early].ravel(), score)

    def policy(quota: int) -> Policy:
        limit = limit_from_quota(edges, quota, score)
        return replace(closed, limits=tuple(limit if k in early else None for k in range(trace.num_exits - 1)))

    def speedup(quota: int) -> float:
        return float(cumulative_costs_ms(trace)[-1]) / expected_cost_ms(replay(policy(quota), trace).exit_index, trace)

    if speedup(len(edges)) < target:
        raise OptionError(
            f"thresholds: got a target speedup of {target}; with every row leaving at the first exit this trace "
            f"reaches {speedup(len(edges)):.2f}; ask for less, or train an earlier exit"
        )
    return policy(bisect_left(range(len(edges)), target, key=speedup))


def score_columns(trace: Trace, score: str, inverse_temperatures: NDArray[np.float32]) -> NDArray[np.float32]:
    """The score called `score` of every row and exit, (N, E); NaN for exits without a learned confidence.

    A learned confidence does not change with the temperature. Raises DataError when no early exit has one.
    """
    check_score(score, trace.has_learned)
    return trace.learned if score == LEARNED else scores_at(trace, inverse_temperatures)[:, :, SCORES.index(score)]


def check_score(score: str, has_learned: Sequence[bool]) -> None:
    """Raise DataError when no exit before the final one has `score`; `has_learned` per exit."""
    if score == LEARNED and not any(has_learned[:-1]):
        raise DataError(
            f"thresholds on score {LEARNED!r}: no exit before the final one has a learned confidence; export a model "
            f"that returns one beside its logits, or use one of {', '.join(SCORES)}"
        )


def _early_exits(trace: Trace, score: str) -> list[int]:
    """The exits before the final one that have the score."""
    return [k for k in range(trace.num_exits - 1) if score != LEARNED or trace.has_learned[k]]


def right_rows(trace: Trace, reference: Reference) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The rows that count, (L,), and which exit is right about which row of the trace, (N, E).

    Raises DataError when no row counts, OptionError for another reference.
    """
    if trace.is_regression:
        raise DataError(
            "thresholds: got a trace of a regression, which has no right and wrong rows, so its exits cannot be placed "
            "or thresholds chosen by accuracy; `offramp calibrate --score learned` knows errors"
        )
    if reference == "full_depth":
        counted = np.arange(len(trace.labels))
        right = trace.predictions == trace.predictions[:, -1:]
    elif reference == "label":
        counted = np.flatnonzero(trace.labels != UNKNOWN)
        right = trace.predictions == trace.labels[:, None]
    else:
        raise OptionError(f"thresholds: got reference {reference!r}, expected one of {get_args(Reference)}")
    if len(counted) == 0:
        raise DataError(
            f"thresholds: got {len(trace.labels)} rows, none that counts with reference {reference!r}; "
            f"record a trace of labelled data, or use reference 'full_depth' for data without labels"
        )
    return counted, right


def check_drop(max_drop: float) -> None:
    """Raise OptionError unless `max_drop` is a share of the rows."""
    if not 0 <= max_drop <= 1:
        raise OptionError(f"thresholds: got a drop of {max_drop}, expected 0 to 1; 0.01 is one row in a hundred")


def levels_from_scores(scores: NDArray[np.float32], score: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Group scores (N,) into levels more than MIN_GAP apart, the surest first.

    Returns the level of every row (N,) and the edges (G,) that `limit_from_quota` takes: per level, halfway to the
    next one, what small is sure of, whatever the score. Raises DataError for scores outside [0, 1].
    """
    is_rounded = (scores >= -MIN_GAP) & (scores <= 1 + MIN_GAP)  # False for NaN
    if not is_rounded.all():
        raise DataError(f"thresholds: got {score} outside [0, 1] in the trace, expected scores; record it again")
    values = scores.astype(np.float64).clip(0, 1)
    doubt = values if score == "entropy" else -values  # small is sure
    distinct, position = np.unique(doubt, return_inverse=True)
    is_last = np.append(np.diff(distinct) > MIN_GAP, True)
    last = np.flatnonzero(is_last)  # (G,)
    following = np.append(distinct[last[:-1] + 1], distinct[-1] + MIN_GAP)
    level = np.cumsum(is_last) - is_last
    return level[position], (distinct[last] + following) / 2


def limit_from_quota(edges: NDArray[np.float64], quota: int, score: str) -> float | None:
    """The threshold that lets the levels below `quota` leave; a float32 number, as scores are."""
    if quota == 0:
        return None
    edge = edges[quota - 1] if score == "entropy" else -edges[quota - 1]
    return float(np.float32(edge.clip(0, 1)))


def _ticks(trace: Trace) -> NDArray[np.int64]:
    """What leaving at each exit costs, (E,), in whole parts of a full pass."""
    costs = cumulative_costs_ms(trace)
    ticks: NDArray[np.int64] = np.rint(costs / costs[-1] * NUM_TICKS).astype(np.int64)
    return ticks
