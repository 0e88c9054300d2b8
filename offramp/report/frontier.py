"""The frontier: what the policy and its alternatives take and get right, by replay; and where the time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import LEARNED
from offramp.errors import DataError
from offramp.policy import Policy
from offramp.report.findings import Alternative, DroppedExit, Kind, Step, Waterfall
from offramp.trace import UNKNOWN, Trace
from offramp.tuning.replay import (
    Replay,
    accuracy,
    cumulative_costs_ms,
    exit_shares,
    expected_cost_ms,
    mean_depth,
    replay,
)

FIXED = 0.9  # what people take who do not calibrate
# 1 - 10^-x, with x falling by equal factors: fine where policies differ, however sure the exits are. A linear grid of
# thresholds has nearly all of its points where nothing changes.
NUM_SWEPT = 49
_SWEEP_FROM, _SWEEP_TO = 6.0, 0.05


def sweep_thresholds() -> list[float]:
    """Sureness wanted of every exit, in [0, 1), from the strictest on."""
    return [1 - 10**-x for x in np.geomspace(_SWEEP_FROM, _SWEEP_TO, NUM_SWEPT).tolist()]


def global_policy(trace: Trace, score: str, sureness: float, temperatures: tuple[float, ...]) -> Policy:
    """One threshold for all exits that have the score; for entropy, where small is sure, 1 - `sureness`."""
    limit = 1 - sureness if score == "entropy" else sureness
    has_score = trace.has_learned if score == LEARNED else (True,) * trace.num_exits
    return Policy.thresholds(score, [limit if has else None for has in has_score[:-1]], temperatures)


def alternatives(trace: Trace, policy: Policy, decided: Replay) -> tuple[Alternative, ...]:
    """The policy, full depth, the uncut model where it was timed, each exit alone, 0.9 everywhere, and a sweep."""
    rows, final = np.arange(len(trace.labels)), trace.num_exits - 1
    found = [
        _replayed("this policy", "chosen", trace, decided.exit_index),
        _replayed("full depth", "full depth", trace, np.full(len(rows), final)),
    ]
    if math.isfinite(trace.uncut_ms):
        found.append(Alternative("uncut model", "uncut", trace.uncut_ms, found[1].accuracy, 1.0, None))
    found += [_replayed(f"exit {k} alone", "exit alone", trace, np.full(len(rows), k)) for k in range(final)]
    fixed = global_policy(trace, "max_prob", FIXED, policy.temperatures)
    found.append(_replayed(f"{FIXED} everywhere", "fixed 0.9", trace, replay(fixed, trace).exit_index))
    for sureness in sweep_thresholds():
        swept = global_policy(trace, policy.score, sureness, policy.temperatures)
        name = f"{policy.score} {_limit_text(sureness, policy.score)} everywhere"
        found.append(_replayed(name, "sweep", trace, replay(swept, trace).exit_index))
    return tuple(found)


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
    steps = [Step("full depth", float(costs[-1]), "level")]
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


def decided_by_source(policy: Policy, trace: Trace) -> Replay:
    """What the policy does with every row, each under the rules of its source."""
    decided = replay(policy.for_source(""), trace)
    for source in sorted(set(policy.sources) & set(np.unique(trace.sources).tolist())):
        rows = trace.sources == source
        own = replay(policy.for_source(source), trace)
        for name in ("exit_index", "prediction"):
            getattr(decided, name)[rows] = getattr(own, name)[rows]
        decided = replace(decided, reason=np.where(rows, own.reason, decided.reason))
    return decided


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


def _limit_text(sureness: float, score: str) -> str:
    limit, sign = (1 - sureness, "≤") if score == "entropy" else (sureness, "≥")
    return f"{sign} {limit:.6f}".rstrip("0")


def _share(figures: Mapping[str, Any]) -> float | None:
    found = figures["accuracy"]
    return None if found is None else float(found)
