"""Runners for tests of the pool: fake segments whose answer says whose it is, and engines that wait for a signal."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.policy import Policy
from offramp.runtime import Answer, BatchCosts, FakeEngine, Pool, Result, Runner, SegmentOutput, fake_runner

NUM_SEGMENTS = 3
STAYS = 4  # a number that goes to full depth; odd ones leave first
SURE = 5.0  # logits this far apart: max_prob 0.993
POLICY = Policy.thresholds("max_prob", [0.9] * (NUM_SEGMENTS - 1))
PATIENCE_S = 30.0  # for what happens at once unless something is broken


def answer(exit_index: int) -> Callable[[dict[str, NDArray[Any]]], NDArray[np.float32]]:
    """Logits (number, …): exit k is sure of the numbers whose bit k is set."""

    def logits(inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        number = inputs["x"].astype(np.int64)
        return np.stack([number, number - SURE * (number >> exit_index & 1)], axis=1).astype(np.float32)

    return logits


def numbered_runner(policy: Policy = POLICY) -> Runner:
    return fake_runner([answer(k) for k in range(NUM_SEGMENTS)], policy)


def exit_of(number: int) -> int:
    """Where a row leaves under POLICY."""
    return 0 if number & 1 else 1 if number & 2 else 2


def request(*numbers: int) -> dict[str, NDArray[np.float32]]:
    return {"x": np.array(numbers, np.float32)}


def numbers_of(result: Result) -> list[int]:
    return [int(number) for number in result.outputs["logits"][:, 0]]


def flat_costs(size: int = 8, num_segments: int = NUM_SEGMENTS) -> BatchCosts:
    """Weight-bound to the utmost: a full batch costs what a row costs."""
    return BatchCosts((1, size), ((1.0, 1.01),) * num_segments)


class Gated(FakeEngine):
    """A fake segment that says when it begins, and goes on when it is told to."""

    def __init__(self, exit_index: int) -> None:
        super().__init__(answer(exit_index))
        self.begun = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
        self.begun.release()
        assert self._go.acquire(timeout=PATIENCE_S)
        return super().run(carry, rows, inverse_temperature)

    def let_go(self, times: int = 1) -> None:
        self._go.release(times)

    def wait_begun(self) -> None:
        assert self.begun.acquire(timeout=PATIENCE_S)


def gated_runner(policy: Policy = POLICY) -> tuple[Runner, Gated]:
    """A runner whose first segment is gated."""
    runner, gate = numbered_runner(policy), Gated(0)
    runner.engines = (gate, *runner.engines[1:])
    return runner, gate


def rows_run(runner: Runner, segment: int) -> list[int]:
    """How many rows each call of a segment had."""
    engine = runner.engines[segment]
    assert isinstance(engine, FakeEngine)
    return [len(call.rows) for call in engine.calls]


def occupy(pool: Pool, gate: Gated, number: int = STAYS) -> Answer:
    """Let the first segment begin with one row, and wait there."""
    answer = pool.submit(request(number))
    gate.wait_begun()
    return answer
