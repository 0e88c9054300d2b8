"""How fast the monitor notices, how often it is wrong, and whether only a recertification leads out of full depth.

Physics: to tell a share p from a share q takes about ln(c) / KL(q, p) rows, c the rows between false alarms that one is
ready to accept: for 15 points on an exit of 35 %, ln(1e6) / 0.054 = 256 rows, plus what the widened interval takes away
and less what a Shiryaev-Roberts sum, which begins a bet at every row, is ahead. A risk three times 2 % takes
ln(1e4) / 0.027 = 345 audits by that count, and it scales with 1 / risk. Requests are audits / rate.

Simulated: independent rows of a policy with four exits, baselines from 5,000 rows each, changes after 5,000 requests.
Every request goes through `Monitor.begin`, `Watch.hold` and `Monitor.observe`, as the runner calls them, one row each;
what lies between, the engines, is left out, except in the part with whole runners on FakeEngines. Unless said otherwise
the policy's risk is half of what was certified, which is where a certificate with a few hundred rows puts it.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from machine import describe_machine
from numpy.typing import NDArray

from offramp.policy import Policy
from offramp.runtime import Baseline, Monitor, MonitorOptions, Result, Runner, fake_runner
from offramp.runtime.engine import SegmentOutput
from offramp.runtime.monitor_states import FULL_DEPTH, NORMAL, RECOVERY, SUSPECT
from offramp.runtime.runner import Setting

SHARES = (0.35, 0.25, 0.15, 0.25)
SHIFTED = {15: (0.2, 0.25, 0.15, 0.4), 5: (0.3, 0.25, 0.15, 0.3)}  # points moved from the first exit to the last
FINAL = len(SHARES) - 1
POLICY = Policy.thresholds("max_prob", [0.9] * FINAL)
SETTING = Setting(POLICY, {}, (np.float32(1),) * len(SHARES))
BASELINE = Baseline((1750, 1250, 750, 1250), max_risk=0.02)
BASELINE_ROWS = 5000
CHANGE = 5000  # requests before it
RESULTS = Path(__file__).parent / "results" / "monitor.json"

_LEAVES = np.ones(1, np.bool_)
_SCORES = np.full((1, 3), 0.95, np.float32)
_CLASS = (np.zeros(1, np.int64), np.ones(1, np.int64))


def result(exit_index: int, prediction: NDArray[np.int64]) -> Result:
    return Result({}, prediction, np.array([exit_index]), np.array([0.95], np.float32), ["max_prob"])


_EARLY = [result(k, _CLASS[0]) for k in range(len(SHARES))]


class Outcome(NamedTuple):
    """One stream, up to its first alarm or its end."""

    alarm: int | None  # the request that it came with
    cause: str
    audits_after: int  # of rows since CHANGE
    suspect: int  # requests that began in that state
    audits: int


def answered(monitor: Monitor, exit_index: int, is_loss: bool) -> bool:
    """One request of one row, as a runner would take it; whether it was audited."""
    watch = monitor.begin("", 1, SETTING)
    if watch.audited is None:
        monitor.observe(watch, _EARLY[exit_index])
        return False
    if exit_index < FINAL:
        watch.hold(exit_index, [0], SegmentOutput(None, _SCORES, _CLASS[0], _SCORES), _LEAVES)
    monitor.observe(watch, result(FINAL, _CLASS[is_loss]))
    return True


def watched(monitor: Monitor, exits: Sequence[int], losses: Sequence[bool]) -> Outcome:
    """A stream up to its first alarm."""
    audits = after = suspect = 0
    for t, (exit_index, is_loss) in enumerate(zip(exits, losses, strict=True)):
        suspect += monitor.state_of() == SUSPECT
        is_audited = answered(monitor, exit_index, is_loss)
        audits += is_audited
        after += is_audited and t >= CHANGE
        if monitor.state_of() == FULL_DEPTH:
            (stream,) = monitor.snapshot().streams.values()
            return Outcome(t, stream.cause, after, suspect, audits)
    return Outcome(None, "", after, suspect, audits)


def new_monitor(rng: np.random.Generator, max_risk: float = 0.02, **options: Any) -> Monitor:
    """A monitor whose baseline is a sample of its own."""
    counts = tuple(rng.multinomial(BASELINE_ROWS, SHARES).tolist())
    monitor = Monitor(Baseline(counts, max_risk), MonitorOptions(**options), rng=Random(int(rng.integers(2**31))))
    monitor.attach(len(SHARES))
    monitor.policy_changed(POLICY)
    return monitor


def rows_of(
    rng: np.random.Generator, num_rows: int, risk: float, shares: Sequence[float] = SHARES
) -> tuple[list[int], list[bool]]:
    """Where rows leave, and whether full depth disagrees: for a share `risk` of all rows, none of the last exit."""
    exits = rng.choice(len(shares), num_rows, p=shares)
    is_loss = (exits < FINAL) & (rng.random(num_rows) < risk / (1 - shares[FINAL]))
    return exits.tolist(), is_loss.tolist()


def in_control(streams: int, requests: int, risk: float) -> dict[str, Any]:
    """Streams in which nothing happens."""
    outcomes = []
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        outcomes.append(watched(new_monitor(rng), *rows_of(rng, requests, risk)))
    return {
        "streams": streams,
        "requests": requests,
        "risk": risk,
        "alarms": sum(found.alarm is not None for found in outcomes),
        "suspect_share": round(sum(found.suspect for found in outcomes) / (streams * requests), 4),
        "audits_mean": round(float(np.mean([found.audits for found in outcomes])), 1),
    }


def detected(
    streams: int,
    requests: int,
    after: Callable[[np.random.Generator], tuple[list[int], list[bool]]],
    max_risk: float = 0.02,
) -> dict[str, Any]:
    """Streams that change after CHANGE requests into what `after` draws: delays from there, in requests and audits."""
    delays, audits, causes, early = [], [], set(), 0
    for seed in range(streams):
        rng = np.random.default_rng(1000 + seed)
        before, then = rows_of(rng, CHANGE, max_risk / 2), after(rng)
        found = watched(new_monitor(rng, max_risk), *(left + right for left, right in zip(before, then, strict=True)))
        if found.alarm is not None and found.alarm < CHANGE:
            early += 1
        elif found.alarm is not None:
            causes.add(found.cause)
            delays.append(found.alarm - CHANGE + 1)
            audits.append(found.audits_after)
        else:  # not yet: at least so many
            delays.append(requests)
            audits.append(found.audits_after)
    missed = streams - early - sum(delay < requests for delay in delays)
    return {
        "streams": streams,
        "false_before": early,
        "missed": missed,
        "median_requests": float(np.median(delays)),
        "p90_requests": float(np.percentile(delays, 90)),
        "median_audits": float(np.median(audits)),
        "p90_audits": float(np.percentile(audits, 90)),
        "causes": sorted(causes),
    }


def shift_of(points: int, streams: int, requests: int) -> dict[str, Any]:
    return detected(streams, requests, lambda rng: rows_of(rng, requests, 0.01, SHIFTED[points]))


def threefold(max_risk: float, streams: int, requests: int) -> dict[str, Any]:
    return detected(streams, requests, lambda rng: rows_of(rng, requests, 3 * max_risk), max_risk)


def kept_back(streams: int, requests: int, risk: float) -> dict[str, Any]:
    """Streams that trip at once and stay as they are: does the policy ever come back? Of bad ones at most 5 % may."""
    back = []
    for seed in range(streams):
        rng = np.random.default_rng(2000 + seed)
        monitor = new_monitor(rng)
        for exit_index, is_loss in zip(*rows_of(rng, 2000, 0.5), strict=True):
            answered(monitor, exit_index, is_loss)
            if monitor.state_of() == FULL_DEPTH:
                break
        for t, row in enumerate(zip(*rows_of(rng, requests, risk), strict=True)):
            answered(monitor, *row)
            if monitor.state_of() == NORMAL:
                back.append(t + 1)
                break
    return {
        "streams": streams,
        "risk": risk,
        "requests": requests,
        "came_back": len(back),
        "median_rows_until_back": float(np.median(back)) if back else None,
    }


def fake_answer(exit_index: int) -> Callable[[dict[str, NDArray[Any]]], NDArray[Any]]:
    """Sure from the exit on that a row's number names; beyond 100 the final exit says something else."""

    def logits(inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
        number = inputs["x"]
        sure = np.where((number % 100 <= exit_index) | (exit_index == FINAL), 5.0, 0.5)
        is_one = (number >= 100) & (exit_index == FINAL)
        return np.stack([np.where(is_one, 0, sure), np.where(is_one, sure, 0)], axis=1)

    return logits


def monitored_runner(monitor: Monitor | None) -> Runner:
    """A runner on FakeEngines."""
    runner = fake_runner([fake_answer(k) for k in range(len(SHARES))], POLICY)
    runner.monitor = monitor
    return runner


def end_to_end(streams: int, requests: int) -> dict[str, Any]:
    """Whole runners: drift after 1,000 requests, over again after another 3,000; what was answered while."""
    early_in_full_depth = later = 0
    next_is_full, back, wrong_back = 0, [], 0
    for seed in range(streams):
        rng = np.random.default_rng(3000 + seed)
        monitor = new_monitor(rng, cool_down=3000)
        runner = monitored_runner(monitor)
        spans = [rows_of(rng, 1000, 0.01), rows_of(rng, 3000, 0.1, SHIFTED[15]), rows_of(rng, requests, 0.002)]
        numbers = np.concatenate([np.array(exits) + 100 * np.array(losses) for exits, losses in spans])
        has_tripped = False
        for t, number in enumerate(numbers.astype(np.float32)):
            is_full = monitor.state_of() in (FULL_DEPTH, RECOVERY)
            answer = runner.run({"x": number[None]})
            early_in_full_depth += is_full and int(answer.exit_index[0]) < FINAL
            next_is_full += is_full and not has_tripped and int(answer.exit_index[0]) == FINAL
            has_tripped |= is_full
            if is_full and monitor.state_of() == NORMAL:
                back.append(t)
                wrong_back += t < 4000
        later += has_tripped
    return {
        "streams": streams,
        "tripped": later,
        "next_request_at_full_depth": next_is_full,
        "answered_early_in_full_depth": early_in_full_depth,
        "back_after_the_drift": len(back) - wrong_back,
        "back_within_it": wrong_back,
        "median_request_of_return": float(np.median(back)) if back else None,
    }


def main() -> None:
    """Print a line per part, and at the end one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few streams: shows the script, no result")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    logging.disable()  # a line per change of state
    few, streams, long = (2, 3, 3000) if options.quick else (100, 201, 30_000)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "in_control": lambda: in_control(few, long, 0.01),
        "in_control_at_the_limit": lambda: in_control(few, long, 0.02),
        "shift_15_points": lambda: shift_of(15, streams, 5000),
        "shift_5_points": lambda: shift_of(5, few, long),
        "threefold_of_1_percent": lambda: threefold(0.01, few, long),
        "threefold_of_2_percent": lambda: threefold(0.02, streams, long),
        "threefold_of_5_percent": lambda: threefold(0.05, few, long),
        "kept_back_at_risk_2.4_percent": lambda: kept_back(few, long, 0.024),
        "back_at_risk_1_percent": lambda: kept_back(few, long, 0.01),
        "end_to_end": lambda: end_to_end(2 if options.quick else 20, 1000 if options.quick else 3000),
    }
    summary: dict[str, Any] = {
        "bench": "monitor",
        "machine": describe_machine(),
        "options": asdict(MonitorOptions()),
    }
    for name, part in parts.items():
        summary[name] = part()
        print(name, " ".join(f"{key} {value}" for key, value in summary[name].items()), flush=True)
    if options.save:
        RESULTS.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
