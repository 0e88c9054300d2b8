"""The frontier: what the policy and its alternatives take and get right, by replay; and where the time goes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.errors import DataError
from offramp.policy import Policy
from offramp.report.findings import Alternative, DroppedExit, Kind, Step, Waterfall
from offramp.trace import UNKNOWN, Trace
from offramp.tuning import alternatives as tuning
from offramp.tuning.path import exits_along, grid_path, open_exits, policy_at, sureness_of
from offramp.tuning.replay import (
    Replay,
    accuracy,
    cumulative_costs_ms,
    exit_shares,
    expected_cost_ms,
    mean_depth,
    replay,
)

NUM_SWEPT = 40  # points of the sweep, about; spread evenly over time


def alternatives(trace: Trace, policy: Policy, tuned: Sequence[tuning.Alternative]) -> tuple[Alternative, ...]:
    """The policy, full depth, the uncut model where it was timed, each exit alone, other ways to choose, and a sweep.

    `tuned` is what `offramp calibrate --compare` compares.
    """
    num_rows, final = len(trace.labels), trace.num_exits - 1
    found = [
        _replayed("this policy", "chosen", trace, replay(policy, trace).exit_index),
        _replayed("full depth", "full depth", trace, np.full(num_rows, final)),
    ]
    if math.isfinite(trace.uncut_ms):
        found.append(Alternative("uncut model", "uncut", trace.uncut_ms, found[1].accuracy, 1.0, None))
    found += [_replayed(f"exit {k} alone", "exit alone", trace, np.full(num_rows, k)) for k in range(final)]
    for other in tuned:
        if any(limit is not None for limit in other.policy.limits) and other.policy != policy:
            kind: Kind = "fixed 0.9" if other.name.startswith("fixed") else "tuned"
            point = _replayed(other.name, kind, trace, replay(other.policy, trace).exit_index)
            found.append(replace(point, known=other.known))
    return (*found, *_swept(trace, replace(policy, limits=(), sources={}, patience=0)))


def _swept(trace: Trace, base: Policy) -> Iterator[Alternative]:
    """One threshold for all exits, from strict to loose: the grid that certificates walk along, thinned out."""
    path = grid_path(base.score, open_exits(base, trace))
    grain = float(cumulative_costs_ms(trace)[-1]) / NUM_SWEPT
    last_ms = math.inf
    for position, exit_index in enumerate(exits_along(sureness_of(base, trace), path)):
        ms = expected_cost_ms(exit_index, trace)
        if ms <= last_ms - grain or position in (0, len(path) - 1):
            last_ms = ms
            limits = [limit for limit in policy_at(base, path[position]).limits if limit is not None]
            name = f"one threshold, {base.score} {limits[0]:.6f}" if limits else "one threshold, closed"
            yield _replayed(name, "sweep", trace, exit_index)


def measured_alternatives(document: Any) -> tuple[Alternative, ...]:
    """The points that `offramp bench --json` timed, one row per request. Raises DataError for anything else."""
    try:
        return tuple(
            Alternative(
                f"{name}, on the clock", "measured", float(sizes["1"]["mean_ms"]), _share(sizes["1"]), None, None
            )
            for name, sizes in document.items()
        )
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise DataError(
            f"report: the benchmark does not look like one ({exc!r}); expected what `offramp bench BUNDLE "
            "--batch-sizes 1 "
            f"--json` prints"
        ) from exc


def waterfall_from_shares(trace: Trace, decided: Replay) -> Waterfall:
    """What the rows leaving at each exit save, in ms per row of all rows."""
    costs = cumulative_costs_ms(trace)
    savings = saved_ms(trace, decided.exit_index)
    steps = [Step("uncut model", trace.uncut_ms, "level")] if math.isfinite(trace.uncut_ms) else []
    steps.append(Step("full depth", float(costs[-1]), "level"))
    steps += [Step(f"leaving at exit {k}", -float(savings[k]), "saving") for k in range(trace.num_exits - 1)]
    return Waterfall((*steps, Step("this policy", expected_cost_ms(decided.exit_index, trace), "level")), "trace")


def waterfall_from_placement(document: Any) -> Waterfall:
    """What `offramp place` found, as it wrote it in reports/placement.json. Raises DataError for anything else."""
    try:
        steps = [
            Step("uncut model", float(document["costs"]["uncut_ms"]), "level"),
            Step("one segment, no early exit", float(document["no_exits_ms"]), "level"),
        ]
        for exit_ in document["exits"]:
            if exit_["is_kept"]:
                steps.append(Step(f"exit {exit_['exit_index']} costs", float(exit_["costs_ms"]), "cost"))
                steps.append(Step(f"exit {exit_['exit_index']} saves", -float(exit_["saves_ms"]), "saving"))
        dropped = tuple(
            DroppedExit(int(exit_["exit_index"]), None if exit_["toggled_ms"] is None else float(exit_["toggled_ms"]))
            for exit_ in document["exits"]
            if not exit_["is_kept"]
        )
        steps.append(Step("as placed", float(document["expected_ms"]), "level"))
        return Waterfall(tuple(steps), "placement", dropped, float(document["worst_case"]))
    except (KeyError, TypeError, ValueError) as exc:
        raise DataError(
            f"report: the placement does not look like one ({exc!r}); expected what `offramp place BUNDLE -o PLACED` "
            f"writes as reports/placement.json"
        ) from exc


def saved_ms(trace: Trace, exit_index: NDArray[np.int64]) -> NDArray[np.float64]:
    """(E,) what the rows that leave at each exit save against full depth, per row of all rows."""
    costs = cumulative_costs_ms(trace)
    saved: NDArray[np.float64] = exit_shares(exit_index, trace.num_exits) * (costs[-1] - costs)
    return saved


def _replayed(name: str, kind: Kind, trace: Trace, exit_index: NDArray[np.int64]) -> Alternative:
    prediction = trace.predictions[np.arange(len(exit_index)), exit_index]
    return Alternative(
        name,
        kind,
        expected_cost_ms(exit_index, trace),
        accuracy(prediction, trace.labels) if (trace.labels != UNKNOWN).any() else None,
        float((prediction == trace.predictions[:, -1]).mean()),
        mean_depth(exit_index),
    )


def _share(figures: Mapping[str, Any]) -> float | None:
    found = figures["accuracy"]
    return None if found is None else float(found)
