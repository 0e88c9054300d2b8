"""Replay: what a policy does with the rows of a trace, and what that costs and gets right.

The decisions are made by `Policy.decide`, the function the runtime calls, exit by exit on the rows that are
still there. Nothing is executed: scores come from the trace, or from its logits at other temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.errors import DataError
from offramp.policy import FINAL, Policy
from offramp.scores import scores_from_logits
from offramp.trace import UNKNOWN, Trace


@dataclass(frozen=True)
class Replay:
    """Where every row left, with which answer and why; as the runtime would report it."""

    exit_index: NDArray[np.int64]  # (N,) in [0, E)
    prediction: NDArray[np.int64]  # (N,)
    reason: NDArray[np.str_]  # (N,)


class Recorded(NamedTuple):
    """What a trace says about S rows at one exit, as a policy wants it: see policy.ExitOutput."""

    logits: NDArray[np.float32]
    prediction: NDArray[np.int64]
    scores: NDArray[np.float32]
    learned: NDArray[np.float32] | None


def scores_at(trace: Trace, inverse_temperatures: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores (N, E, 3) of a trace at `inverse_temperatures` (E,).

    An exit whose temperature is the recorded one keeps the engine's own scores; others are computed.
    """
    recorded = np.reciprocal(trace.temperatures).astype(np.float32)
    scores = trace.scores.copy()
    for k in np.flatnonzero(recorded != inverse_temperatures):
        scores[:, k] = scores_from_logits(trace.logits[:, k], inverse_temperatures[k])
    return scores


def recorded_output(
    trace: Trace, scores: NDArray[np.float32], exit_index: int, rows: NDArray[np.int64] | slice
) -> Recorded:
    """What exit `exit_index` said about `rows` of `trace`, whose scores (N, E, 3) are `scores`."""
    learned = trace.learned[rows, exit_index] if trace.has_learned[exit_index] else None
    return Recorded(
        trace.logits[rows, exit_index], trace.predictions[rows, exit_index], scores[rows, exit_index], learned
    )


def replay(policy: Policy, trace: Trace) -> Replay:
    """What `policy` does with every row of `trace`, each treated as its source is.

    Raises OptionError when it is for another number of exits, or for a score that the trace has not.
    """
    if not policy.sources:
        return _replay_alone(policy, trace)
    exit_index = np.full(len(trace.logits), trace.num_exits - 1, np.int64)
    reason = np.full(len(trace.logits), FINAL, object)
    for source in np.unique(trace.sources).tolist():
        rows = np.flatnonzero(trace.sources == source)
        decided = _replay_alone(policy.for_source(source), trace.rows(rows))
        exit_index[rows], reason[rows] = decided.exit_index, decided.reason
    return Replay(exit_index, trace.predictions[np.arange(len(exit_index)), exit_index], reason.astype(np.str_))


def _replay_alone(policy: Policy, trace: Trace) -> Replay:
    """What a policy without sources does with every row."""
    policy.check_exits(trace.num_exits)
    policy.check_learned(trace.has_learned)
    if trace.is_regression:
        policy.check_values()
    scores = scores_at(trace, policy.inverse_temperatures(trace.num_exits))
    num_rows, final = len(trace.logits), trace.num_exits - 1
    exit_index = np.full(num_rows, final, np.int64)
    live = np.arange(num_rows)
    reasons, state = [], None
    for k in range(final):
        leaves, reason, state = policy.decide(k, recorded_output(trace, scores, k, live), state)
        exit_index[live[leaves]] = k
        live = live[~leaves]
        state = state.rows(~leaves) if state else None
        reasons.append(reason)
    prediction = trace.predictions[np.arange(num_rows), exit_index]
    return Replay(exit_index, prediction, np.array([*reasons, FINAL])[exit_index])


def mean_depth(exit_index: NDArray[np.int64]) -> float:
    """Segments executed per row, on average over `exit_index` (N,). Raises DataError when N = 0."""
    _check_rows(len(exit_index))
    return float(exit_index.mean()) + 1


def exit_shares(exit_index: NDArray[np.int64], num_exits: int) -> NDArray[np.float64]:
    """Share of the rows `exit_index` (N,) that left at each exit, (E,). Raises DataError when N = 0."""
    _check_rows(len(exit_index))
    return np.bincount(exit_index, minlength=num_exits) / len(exit_index)


def accuracy(prediction: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Share of the labelled rows whose prediction (N,) is the label (N,). Raises DataError without any."""
    known = labels != UNKNOWN
    if not known.any():
        raise DataError(f"accuracy: got {len(labels)} rows, none with a label; record a trace of labelled data")
    return float((prediction == labels)[known].mean())


def cumulative_costs_ms(trace: Trace) -> NDArray[np.float64]:
    """What a row costs that leaves at exit k, (E,): all segments up to k.

    Raises DataError when a cost is negative or not finite, or when all of them are 0.
    """
    costs = trace.costs_ms
    if not (np.isfinite(costs).all() and (costs >= 0).all() and costs.any()):
        raise DataError(f"trace: got costs_ms {costs.tolist()}, expected the time of every segment, above 0")
    return np.cumsum(costs)


def expected_cost_ms(exit_index: NDArray[np.int64], trace: Trace) -> float:
    """Mean cost of rows that left at `exit_index` (N,). Raises DataError as above, and when N = 0."""
    _check_rows(len(exit_index))
    return float(cumulative_costs_ms(trace)[exit_index].mean())


def _check_rows(num_rows: int) -> None:
    if num_rows == 0:
        raise DataError("replay: got a trace of 0 rows, expected at least 1; record it again with data")
