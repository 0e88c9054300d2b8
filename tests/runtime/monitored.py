"""A runner whose rows say where they leave and whether full depth disagrees, for tests of the monitor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.policy import Policy
from offramp.runtime import Baseline, Monitor, MonitorOptions, Runner, fake_runner

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
