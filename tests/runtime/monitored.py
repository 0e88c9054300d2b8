"""A runner whose rows say where they leave and whether full depth disagrees, for tests of the monitor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.policy import Policy
from offramp.runtime import Baseline, FakeEngine, Monitor, MonitorOptions, Runner, SegmentOutput, fake_runner
from offramp.runtime.monitor_states import FULL_DEPTH

NUM_EXITS = 4
SHARES = (0.35, 0.25, 0.15, 0.25)
POLICY = Policy.thresholds("max_prob", [0.9] * (NUM_EXITS - 1))
BASELINE = Baseline((1750, 1250, 750, 1250), max_risk=0.02)
OPTIONS = MonitorOptions()
DISAGREES = 100.0  # added to a row's number: the final exit says class 1, all others 0


def answer(exit_index: int) -> Callable[[dict[str, NDArray[Any]]], NDArray[np.float32]]:
    """Sure from the exit on that the row's number names."""

    def logits(inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        number = inputs["x"] % DISAGREES
        is_sure = number <= exit_index
        says_one = (inputs["x"] >= DISAGREES) & (exit_index == NUM_EXITS - 1)
        first = np.where(is_sure | (exit_index == NUM_EXITS - 1), 5.0, 0.5)
        return np.stack([np.where(says_one, 0.0, first), np.where(says_one, first, 0.0)], axis=1).astype(np.float32)

    return logits


def monitored_runner(monitor: Monitor | None = None, policy: Policy = POLICY) -> Runner:
    runner = fake_runner([answer(k) for k in range(NUM_EXITS)], policy)
    runner.monitor = monitor
    return runner


def monitor_of(
    baseline: Baseline | None = BASELINE, options: MonitorOptions = OPTIONS, seed: int = 0, **rest: Any
) -> Monitor:
    """A monitor whose audits can be foretold."""
    return Monitor(baseline, options, rng=Random(seed), **rest)


def rows(exits: Sequence[int], losses: Sequence[bool] = ()) -> dict[str, NDArray[np.float32]]:
    """Rows that the policy lets go at `exits`; full depth disagrees with those that are `losses`."""
    numbers = np.asarray(exits, np.float32)
    if len(losses):
        numbers = numbers + np.asarray(losses) * np.float32(DISAGREES)
    return {"x": numbers}


def draw(rng: np.random.Generator, num_rows: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Exits of rows that are independent of each other."""
    return rng.choice(len(shares), num_rows, p=shares).tolist()


def trip(runner: Runner, source: str = "") -> None:
    """Send rows with losses until the monitor has had enough."""
    assert runner.monitor is not None
    for _ in range(500):
        runner.run(rows([0] * 20, [True] * 20), source)
        if runner.monitor.state_of(source) == FULL_DEPTH:
            return
    raise AssertionError("no alarm")


class Pruning(FakeEngine):
    """Says which share of its tokens a row kept."""

    def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
        out = super().run(carry, rows, inverse_temperature)

        class Kept(SegmentOutput):
            retention = np.full(len(rows), 0.25, np.float32)

        return Kept(*out[:5])
