"""No request is lost, answered twice or with another's row: step by step on a clock of our own, and in real threads."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray
from policies import random_policies
from pooling import NUM_SEGMENTS, PATIENCE_S, POLICY, answer, flat_costs, numbered_runner, request

import offramp.runtime.pool as pool_module
from offramp.errors import BackendError, ClosedError, DeadlineError, QueueFullError
from offramp.policy import Policy
from offramp.runtime import Admission, Answer, FakeEngine, Pool, Result, Runner, SegmentOutput

SPOILED = 13  # a row that breaks the segment it comes to
numbers = st.lists(st.integers(0, 40), min_size=1, max_size=6)
policies = st.just(POLICY) | random_policies(NUM_SEGMENTS, with_sources=True)


class Breaking(FakeEngine):
    """Fails every batch that has a spoiled row in it."""

    def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
        if SPOILED in carry["x"][rows]:
            raise BackendError("spoiled")
        return super().run(carry, rows, inverse_temperature)


@dataclass
class Asked:
    """A request, and what its answer may be."""

    answer: Answer
    expected: Result
    deadline_ms: float
    is_cancelled: bool = False
    calls: int = 0  # of its callback


class Stepped(Pool):
    """A pool without threads, whose batches run when the test says so."""

    def _work(self) -> None:
        self._is_over = True  # nobody waits for more than there is

    def step(self) -> bool:
        batch = self._next_batch()
        if batch is not None:
            self._replan(batch[0], batch[1])
            self._run(*batch)
        return batch is not None


class PoolMachine(RuleBasedStateMachine):
    """A pool beside the list of what was asked of it."""

    @initialize(
        policy=policies,
        max_batch=st.integers(1, 9),
        pays=st.booleans(),
        max_rows=st.integers(1, 40),
        breaking=st.sampled_from([None, 0, 1, 2]),
    )
    def open(self, policy: Policy, max_batch: int, pays: bool, max_rows: int, breaking: int | None) -> None:
        self.runner = numbered_runner(policy)
        if breaking is not None:
            engines = list(self.runner.engines)
            engines[breaking] = Breaking(answer(breaking))
            self.runner.engines = tuple(engines)
        self.is_breaking = breaking is not None
        self.now_s = 0.0
        self.monkeypatch = pytest.MonkeyPatch()
        self.monkeypatch.setattr(pool_module, "monotonic", lambda: self.now_s)
        self.pool = Stepped(self.runner, max_batch, costs=flat_costs(), admission=Admission(max_rows))
        if pays:
            self.pool._epoch.survival.observe(0, 100, 50)
            self.pool._epoch.survival.observe(1, 100, 50)
        self.asked: list[Asked] = []
        self.is_closed = self.is_refusing = False

    @rule(rows=numbers, source=st.sampled_from(["", "a"]), deadline_ms=st.sampled_from([inf, inf, 1.0, 5.0]))
    def submit(self, rows: list[int], source: str, deadline_ms: float) -> None:
        waiting = self.pool.num_rows
        try:
            given = self.pool.submit(request(*rows), source, deadline_ms)
        except QueueFullError:
            assert waiting + len(rows) > self.pool.admission.max_rows
            return
        except ClosedError:
            assert self.is_closed
            return
        assert not self.is_closed
        assert waiting + len(rows) <= self.pool.admission.max_rows
        expected = numbered_runner(self.runner.policy).run(request(*rows), source)
        asked = Asked(given, expected, self.now_s * 1e3 + deadline_ms)
        given.add_done_callback(lambda _: setattr(asked, "calls", asked.calls + 1))
        self.asked.append(asked)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.asked))
        was_done = asked.answer.done()
        if asked.answer.cancel():
            assert asked.is_cancelled or not was_done
            asked.is_cancelled = True

    @rule(policy=policies)
    def swap(self, policy: Policy) -> None:
        self.runner.policy = policy

    @rule()
    def step(self) -> None:
        self.pool.step()

    @rule(ms=st.sampled_from([0.5, 3.0]))
    def wait(self, ms: float) -> None:
        self.now_s += ms / 1e3

    @precondition(lambda self: len(getattr(self, "asked", ())) > 3)
    @rule(drain=st.booleans())
    def close(self, drain: bool) -> None:
        self.pool.close(drain)
        self.is_closed, self.is_refusing = True, self.is_refusing or not drain

    @invariant()
    def rows_are_counted(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.num_rows == sum(a.answer.num_rows for a in self.asked if not a.answer.done())

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        while self.pool.step():
            pass
        self.pool.close()
        for asked in self.asked:
            self.check(asked)
        self.monkeypatch.undo()

    def check(self, asked: Asked) -> None:
        assert asked.calls == 1
        assert asked.answer.cancelled() == asked.is_cancelled
        if asked.is_cancelled:
            return
        error = asked.answer.exception(0)
        if isinstance(error, DeadlineError):
            assert asked.deadline_ms <= self.now_s * 1e3
        elif isinstance(error, ClosedError):
            assert self.is_refusing
        elif error is not None:
            assert isinstance(error, BackendError)
            assert self.is_breaking
        else:
            tiny.assert_same(asked.answer.result(0), asked.expected)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@contextmanager
def slow_pool(max_batch: int, workers: int, seed: int) -> Iterator[tuple[Runner, Pool]]:
    """A pool whose engines take a little while, now and then longer, so that threads meet anywhere."""
    chance = random.Random(seed)

    class Slow(Breaking):
        def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
            time.sleep(chance.choice([0, 0, 1e-4, 1e-3]))
            return super().run(carry, rows, inverse_temperature)

    runner = numbered_runner()
    runner.engines = tuple(Slow(answer(k)) for k in range(NUM_SEGMENTS))
    with Pool(runner, max_batch, workers=workers, costs=flat_costs()) as pool:
        pool._epoch.survival.observe(0, 100, 50)
        pool._epoch.survival.observe(1, 100, 50)
        yield runner, pool


@given(
    requests=st.lists(
        st.tuples(numbers, st.sampled_from([inf, inf, 0.5, 1e4]), st.sampled_from("aaaabcs")), min_size=1, max_size=60
    ),
    max_batch=st.integers(1, 8),
    workers=st.integers(1, 3),
    drain=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_everything_is_answered_or_refused_for_a_reason(
    requests: list[tuple[list[int], float, str]], max_batch: int, workers: int, drain: bool, seed: int
) -> None:
    """b: cancelled soon after; c: cancelled at once; s: the policy is swapped before."""
    asked: list[Asked] = []
    with slow_pool(max_batch, workers, seed) as (runner, pool):
        for rows, deadline_ms, then in requests:
            if then == "s":
                runner.policy = Policy.full_depth() if runner.policy is POLICY else POLICY
            given = pool.submit(request(*rows), deadline_ms=deadline_ms)
            one = Asked(given, numbered_runner(runner.policy).run(request(*rows)), deadline_ms)
            given.add_done_callback(lambda _, one=one: setattr(one, "calls", one.calls + 1))
            asked.append(one)
            if then in "bc":
                time.sleep(2e-4 if then == "b" else 0)
                one.is_cancelled = given.cancel()
        pool.close(drain)
        assert pool.num_rows == 0
    is_breaking = any(SPOILED in rows for rows, _, _ in requests)
    for one in asked:
        assert one.calls == 1
        assert one.answer.cancelled() == one.is_cancelled
        try:
            tiny.assert_same(one.answer.result(PATIENCE_S), one.expected)
        except CancelledError:
            assert one.is_cancelled
        except DeadlineError:
            assert one.deadline_ms == 0.5
        except ClosedError:
            assert not drain
        except BackendError:
            assert is_breaking
