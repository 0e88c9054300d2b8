"""A pool under a monitor: the same answers, audits, figures and evidence as of a runner, one request after another."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monitored import BASELINE, NUM_EXITS, POLICY, Pruning, draw, monitor_of, monitored_runner, rows, trip
from pooling import PATIENCE_S, STAYS, flat_costs, gated_runner, occupy, request

from offramp.errors import DeadlineError
from offramp.policy import FINAL, Policy
from offramp.runtime import Monitor, MonitorOptions, Pool, Result, Snapshot
from offramp.runtime.monitor_states import FULL_DEPTH, NORMAL
from offramp.runtime.monitor_watch import AUDIT
from offramp.runtime.monitor_watch import FULL_DEPTH as FORCED

OFTEN = MonitorOptions(audit_rate=0.3, suspect_audit_rate=0.3, false_alarm=1e-300, audits_between_alarms=1e99)


def assert_same(left: Result, right: Result) -> None:
    np.testing.assert_array_equal(left.outputs["logits"], right.outputs["logits"])
    for name in ("prediction", "exit_index", "score"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert left.reason == right.reason


def without_process(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, processes=(), time_s=0.0)


@given(
    drawn=st.lists(
        st.lists(st.tuples(st.integers(0, NUM_EXITS - 1), st.booleans()), max_size=6), min_size=1, max_size=25
    ),
    seed=st.integers(0, 1000),
    max_batch=st.integers(1, 9),
    workers=st.integers(1, 2),
    pays=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_a_pool_answers_and_notes_what_a_runner_does(
    drawn: list[list[tuple[int, bool]]], seed: int, max_batch: int, workers: int, pays: bool
) -> None:
    """Evidence included: it does not depend on the order in which rows end."""
    requests = [rows([e for e, _ in found], [is_loss for _, is_loss in found]) for found in drawn]
    sources = ["web" if len(found) % 2 else "" for found in drawn]
    policy = replace(POLICY, sources={"web": Policy.thresholds("max_prob", [None, 0.9, 0.9])})
    alone, pooled = (monitored_runner(monitor_of(options=OFTEN, seed=seed), policy) for _ in range(2))
    expected = [alone.run(asked, source) for asked, source in zip(requests, sources, strict=True)]
    costs = flat_costs(num_segments=NUM_EXITS) if pays else None
    with Pool(pooled, max_batch, workers=workers, costs=costs) as pool:
        answers = [pool.submit(asked, source) for asked, source in zip(requests, sources, strict=True)]
        for answer, right in zip(answers, expected, strict=True):
            assert_same(answer.result(PATIENCE_S), right)
    assert alone.monitor is not None
    assert pooled.monitor is not None
    assert without_process(pooled.monitor.snapshot()) == without_process(alone.monitor.snapshot())


def test_full_depth_is_in_force_for_whoever_asks_after_an_answer() -> None:
    monitor = monitor_of()
    runner = monitored_runner(monitor)
    with Pool(runner, max_batch=4) as pool:
        assert FORCED not in pool.submit(rows([0])).result(PATIENCE_S).reason
        for _ in range(3000):
            pool.submit(rows([0] * 4, [True] * 4)).result(PATIENCE_S)
            if monitor.state_of() == FULL_DEPTH:
                break
        result = pool.submit(rows([0, 3])).result(PATIENCE_S)
    assert result.exit_index.tolist() == [NUM_EXITS - 1] * 2
    assert result.reason == [FORCED, FINAL]


def test_a_pool_recovers_by_recertification() -> None:
    monitor = monitor_of(options=MonitorOptions(cool_down=20))
    runner = monitored_runner(monitor)
    trip(runner)
    rng = np.random.default_rng(0)
    with Pool(runner, max_batch=8) as pool:
        num_rows = 0
        while monitor.state_of() != NORMAL:
            answers = [pool.submit(rows(draw(rng, 1))) for _ in range(8)]
            for answer in answers:
                answer.result(PATIENCE_S)
            num_rows += 8
    assert 149 <= num_rows <= 400
    assert monitor.snapshot().streams[""].cause == "certified again"


def test_requests_that_are_refused_or_taken_back_are_no_evidence() -> None:
    runner, gate = gated_runner()
    runner.monitor = monitor = monitor_of(replace(BASELINE, exit_counts=(1, 1, 1)))
    with Pool(runner, max_batch=1) as pool:
        first = occupy(pool, gate, 1)
        late, taken_back = pool.submit(request(2, 2), deadline_ms=1), pool.submit(request(3))
        assert taken_back.cancel()
        time.sleep(0.01)
        gate.let_go()
        assert first.result(PATIENCE_S)
        with pytest.raises(DeadlineError):
            late.result(PATIENCE_S)
        with pytest.raises(CancelledError):
            taken_back.result(PATIENCE_S)
    found = monitor.snapshot().total
    assert (found.rows, found.failed) == (1, 2)
    assert not monitor._pending[""]


def test_a_monitor_may_come_and_go() -> None:
    runner, gate = gated_runner()
    with Pool(runner, max_batch=4) as pool:
        first = occupy(pool, gate)
        runner.monitor = monitor = Monitor()
        second = pool.submit(request(1))
        gate.let_go(2)
        assert first.result(PATIENCE_S)
        assert second.result(PATIENCE_S)
        assert monitor.snapshot().total.rows == 1
        runner.monitor = None
        gate.let_go(1)
        assert pool.submit(request(1)).result(PATIENCE_S)
    assert monitor.snapshot().total.rows == 1


@pytest.mark.parametrize("number", [1, STAYS])
def test_what_began_under_a_monitor_ends_under_it(number: int) -> None:
    """Though the runner has none by then: audits are not lost, and nobody waits for it in vain."""
    runner, gate = gated_runner()
    everyone = MonitorOptions(audit_rate=1.0)
    runner.monitor = monitor = monitor_of(replace(BASELINE, exit_counts=(1, 1, 1)), everyone)
    with Pool(runner) as pool:
        answer = occupy(pool, gate, number)
        runner.monitor = None
        gate.let_go()
        result = answer.result(PATIENCE_S)
    assert (result.exit_index.tolist(), result.reason) == ([2], [AUDIT if number == 1 else FINAL])
    assert monitor.snapshot().total.exits == ((1, 0, 0) if number == 1 else (0, 0, 1))
    assert not monitor._pending[""]


def test_asyncio_and_retention() -> None:
    monitor = Monitor()
    runner = monitored_runner(monitor)
    runner.engines = tuple(Pruning(engine._answer) for engine in runner.engines)  # type: ignore[attr-defined]

    async def ask() -> None:
        with Pool(runner, max_batch=4) as pool:
            await asyncio.gather(*(pool.submit(rows([k])) for k in range(NUM_EXITS)))

    asyncio.run(ask())
    assert monitor.snapshot().total.rows == NUM_EXITS
