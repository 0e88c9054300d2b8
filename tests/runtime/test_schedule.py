"""The pool's rule by itself, and what it gains in simulation: one executor, scripted latencies, no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.runtime.costs import BatchCosts
from offramp.runtime.schedule import (
    CALL_MS,
    MIN_GAIN,
    MIN_ROWS_SEEN,
    Plan,
    SurvivalEstimate,
    choose,
    plan_from_costs,
    plan_without_costs,
)

SIZES = (1, 2, 4, 8, 16, 32)


@dataclass
class Line:
    """Rows that wait."""

    segment: int
    rows: int
    since_ms: float = 0.0
    full: int = 8
    patience_ms: float = 20.0


lines = st.lists(
    st.builds(
        Line,
        st.integers(0, 4),
        st.integers(1, 12),
        st.integers(0, 100).map(float),
        st.sampled_from([1, 8]),
        st.just(20.0),
    ),
    max_size=6,
)


@given(queues=lines, max_wait_ms=st.sampled_from([0.0, 5.0, 50.0]))
def test_the_rule_as_it_is_written(queues: list[Line], max_wait_ms: float) -> None:
    now = 100.0
    ripe = [q for q in queues if q.rows >= q.full or now - q.since_ms >= max_wait_ms]
    late = [q for q in ripe if q.segment and now - q.since_ms > q.patience_ms]
    full = [q for q in ripe if q.rows >= q.full or now - q.since_ms > q.patience_ms]
    candidates = late or full or ripe
    chosen, wake_ms = choose(queues, now, max_wait_ms)
    if not candidates:
        assert chosen is None
        assert wake_ms == min([q.since_ms + max_wait_ms for q in queues], default=inf)
        return
    assert chosen is not None
    deepest = max(q.segment for q in candidates)
    assert chosen.segment == deepest
    assert chosen.since_ms == min(q.since_ms for q in candidates if q.segment == deepest)


def test_it_never_idles_and_prefers_depth_only_where_a_batch_is_full_or_late() -> None:
    assert choose([Line(0, 1), Line(2, 1)], 1.0, 0.0)[0] == Line(2, 1)
    assert choose([Line(0, 8), Line(2, 1)], 1.0, 0.0)[0] == Line(0, 8)
    assert choose([Line(0, 8), Line(2, 8), Line(3, 1)], 1.0, 0.0)[0] == Line(2, 8)
    assert choose([Line(0, 8), Line(1, 1), Line(2, 8, 20.0)], 21.0, 0.0)[0] == Line(1, 1)
    assert choose([], 1.0, 0.0) == (None, inf)


def test_a_rare_shape_gets_its_turn() -> None:
    rare, busy = Line(0, 1, since_ms=0.0), Line(0, 8, since_ms=15.0)
    assert choose([busy, rare], 19.0, 0.0)[0] is busy
    assert choose([busy, rare], 21.0, 0.0)[0] is rare


def costs_of(latency_ms: Callable[[int], float], num_segments: int) -> BatchCosts:
    return BatchCosts(SIZES, (tuple(latency_ms(size) for size in SIZES),) * num_segments)


def weight_bound(size: int) -> float:
    return 1 + 0.02 * size


def compute_bound(size: int) -> float:
    return 0.05 + 2.0 * size


def simulate(
    costs: BatchCosts, plan: Plan, survival: float, arrivals_ms: np.ndarray | None = None, num_rows: int = 6000
) -> tuple[float, np.ndarray]:
    """Rows per millisecond and latency of every row; without arrivals, clients wait for each answer."""
    final = len(costs.ms) - 1
    depth = np.minimum(np.random.default_rng(0).geometric(1 - survival, num_rows) - 1, final)
    is_closed, num_clients = arrivals_ms is None, 16 * plan.batch_rows
    start = np.zeros(num_rows) if arrivals_ms is None else arrivals_ms
    lines: list[list[tuple[float, int]]] = [[] for _ in costs.ms]
    latency_ms = np.full(num_rows, np.nan)
    now, admitted, answered = 0.0, 0, 0

    def admit() -> None:
        nonlocal admitted
        while admitted < num_rows and (admitted - answered < num_clients if is_closed else start[admitted] <= now):
            if is_closed:
                start[admitted] = now
            lines[0].append((start[admitted], admitted))
            admitted += 1

    while answered < num_rows:
        admit()
        queues = [Line(k, len(w), w[0][0], plan.batch_rows, plan.patience_ms) for k, w in enumerate(lines) if w]
        chosen, _ = choose(queues, now, 0.0)
        if chosen is None:
            now = start[admitted]
            continue
        segment = chosen.segment
        batch, lines[segment] = lines[segment][: plan.batch_rows], lines[segment][plan.batch_rows :]
        while batch:
            now += costs.latency_ms(segment, len(batch)) + CALL_MS
            left = [row for _, row in batch if depth[row] == segment]
            latency_ms[left] = now - start[left]
            answered += len(left)
            batch = [(now, row) for _, row in batch if depth[row] > segment]
            segment += 1
            if batch and plan.regroup[segment]:
                lines[segment] += batch
                break
    return num_rows / now, latency_ms


@pytest.mark.parametrize(("num_segments", "survival", "batch"), [(3, 0.5, 8), (6, 0.6, 8), (6, 0.7, 32), (3, 0.3, 16)])
def test_the_predicted_gain_is_what_a_saturated_executor_gets(num_segments: int, survival: float, batch: int) -> None:
    costs = costs_of(weight_bound, num_segments)
    plan = plan_from_costs(costs, [survival] * (num_segments - 1), batch)
    assert all(plan.regroup[1:])
    pooled, _ = simulate(costs, plan, survival)
    plain, _ = simulate(costs, plan_without_costs(num_segments, batch), survival)
    assert pooled / plain == pytest.approx(plan.gain, rel=0.04)
    reach = survival ** np.arange(num_segments)
    by_formula = sum(costs.latency_ms(k, batch * s) for k, s in enumerate(reach)) / sum(
        s * costs.latency_ms(k, batch) for k, s in enumerate(reach)
    )
    assert 0.8 * by_formula < plan.gain < 1.02 * by_formula  # which takes every batch to be the average one


def test_impatience_gives_the_gain_away() -> None:
    costs = costs_of(weight_bound, 6)
    plan = plan_from_costs(costs, [0.6] * 5, 8)
    one_latency = replace(plan, patience_ms=costs.latency_ms(0, 8))
    plain, _ = simulate(costs, plan_without_costs(6, 8), 0.6)
    assert simulate(costs, plan, 0.6)[0] / plain > 1.5
    assert simulate(costs, one_latency, 0.6)[0] / plain < 1.2


@pytest.mark.parametrize(("load", "at_most"), [(0.3, 1.02), (0.6, 1.1), (1.2, 0.2)])
def test_waiting_is_paid_for_by_nobody_below_saturation(load: float, at_most: float) -> None:
    costs = costs_of(weight_bound, 3)
    plan, without = plan_from_costs(costs, [0.5, 0.5], 8), plan_without_costs(3, 8)
    capacity, _ = simulate(costs, without, 0.5)
    arrivals = np.cumsum(np.random.default_rng(1).exponential(1 / (load * capacity), 6000))
    pooled, plain = (np.percentile(simulate(costs, p, 0.5, arrivals)[1], 99) for p in (plan, without))
    assert pooled / plain <= at_most


def test_nothing_is_regrouped_where_latency_grows_with_rows() -> None:
    costs = costs_of(compute_bound, 3)
    plan = plan_from_costs(costs, [0.5, 0.5], 32)
    assert not any(plan.regroup)
    assert plan.gain < MIN_GAIN
    assert plan.batch_rows < 32  # a smaller batch answers sooner and is as good
    proportional = BatchCosts((1, 32), ((10.0, 320.0),) * 3)
    assert plan_from_costs(proportional, [0.5, 0.5], 32).batch_rows == 1


def test_only_the_segments_that_gain_wait() -> None:
    flat, steep = (1.0,) * len(SIZES), tuple(1.0 * size for size in SIZES)
    plan = plan_from_costs(BatchCosts(SIZES, (flat, steep, flat)), [0.5, 0.5], 8)
    assert plan.regroup == (False, False, True)


def test_rows_of_another_size_are_judged_by_it() -> None:
    costs = BatchCosts(SIZES, (tuple(1 + max(0, size - 8) * 0.5 for size in SIZES),) * 3, row_size=4)
    assert any(plan_from_costs(costs, [0.5, 0.5], 8, row_size=4).regroup)
    assert not any(plan_from_costs(costs, [0.5, 0.5], 8, row_size=64).regroup)


@pytest.mark.parametrize("survival", [0.0, 1.0])
def test_all_or_none_leaving_gains_nothing(survival: float) -> None:
    plan = plan_from_costs(costs_of(weight_bound, 3), [survival] * 2, 32)
    assert not any(plan.regroup)


@given(
    survival=st.lists(st.floats(0, 1), max_size=5),
    slope=st.floats(0, 3),
    batch=st.integers(1, 100),
    row_size=st.integers(0, 9),
)
def test_every_plan_makes_sense(survival: list[float], slope: float, batch: int, row_size: int) -> None:
    plan = plan_from_costs(costs_of(lambda size: 1 + slope * size, len(survival) + 1), survival, batch, row_size)
    assert 1 <= plan.batch_rows <= batch
    assert len(plan.regroup) == len(survival) + 1
    assert not plan.regroup[0]
    assert 0 < plan.patience_ms < inf
    assert not any(plan.regroup) or plan.gain >= MIN_GAIN


def test_survival_is_believed_once_enough_was_seen_and_follows_a_change() -> None:
    estimate = SurvivalEstimate(2)
    estimate.observe(0, MIN_ROWS_SEEN - 1, 0)
    assert estimate.rates() == (1.0, 1.0)
    for _ in range(100):
        estimate.observe(0, 100, 25)
    assert estimate.rates() == (pytest.approx(0.25, abs=0.01), 1.0)
    for _ in range(400):
        estimate.observe(0, 100, 75)
    assert estimate.rates()[0] == pytest.approx(0.75, abs=0.01)
