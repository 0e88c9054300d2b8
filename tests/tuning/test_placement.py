"""Placement: the optimum by brute force, what it costs, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from offramp.errors import DataError, OptionError
from offramp.policy import Policy
from offramp.trace import UNKNOWN
from offramp.tuning.losses import losses_from_trace
from offramp.tuning.placement import place
from offramp.tuning.placement_data import Costs, Placement, PlacementOptions
from offramp.tuning.replay import replay
from tests.tuning.traces import random_trace, trace_by_hand

FREE = math.inf  # no bound on the worst case


def random_costs(num_exits: int, seed: int) -> Costs:
    random = np.random.default_rng(seed)
    segments = random.uniform(1, 2, num_exits)
    exits = random.uniform(0, 0.8, num_exits - 1)
    return Costs(tuple(segments.tolist()), tuple(exits.tolist()), float(segments.sum() - exits.sum()) * 0.98)


def price(costs: Costs, kept: tuple[int, ...], left_at: int) -> float:
    """What a row pays that leaves at `left_at`, segment by segment."""
    paid = 0.0
    for k in range(left_at + 1):
        paid += costs.segments_ms[k]
        if k < left_at and k not in kept:
            paid -= costs.exits_ms[k]
    return paid


def lost_rows(trace, options: PlacementOptions) -> np.ndarray:
    return losses_from_trace(trace, options.risk, np.ones(trace.num_exits, np.float32)).values > 0


def by_brute_force(trace, costs: Costs, options: PlacementOptions) -> float:
    """The least total cost over all subsets and all thresholds between the scores that were seen."""
    final = trace.num_exits - 1
    lost = lost_rows(trace, options)
    sure = trace.scores[:, :, 0].astype(np.float64)
    best = math.inf
    for kept in itertools.chain.from_iterable(itertools.combinations(range(final), n) for n in range(final + 1)):
        if price(costs, kept, final) > options.max_worst_case * costs.uncut_ms:
            continue
        prices = np.array([price(costs, kept, k) for k in range(final + 1)])
        for limits in itertools.product(*([*np.unique(sure[:, k]), 2.0] for k in kept)):
            exit_index = np.full(len(sure), final)
            for k, limit in reversed(list(zip(kept, limits, strict=True))):
                exit_index[sure[:, k] >= limit] = k
            left = exit_index < final
            if lost[left, exit_index[left]].sum() <= options.max_lost(len(trace.labels)):
                best = min(best, float(prices[exit_index].sum()))
    return best


def replayed(trace, costs: Costs, placement: Placement) -> tuple[float, int]:
    """Total cost and losses of a placement's policy, as the runtime would decide."""
    decided = replay(placement.policy, trace.exits(placement.kept))
    left_at = np.array(placement.kept)[decided.exit_index]
    total = sum(price(costs, placement.kept, int(k)) for k in left_at)
    lost = lost_rows(trace, placement.options)
    return total, int(lost[np.arange(len(left_at)), left_at].sum())


@pytest.mark.parametrize("risk", ["consistency", "accuracy_gap"])
@pytest.mark.parametrize("seed", range(100))
def test_a_placement_is_the_optimum_that_brute_force_finds(seed: int, risk) -> None:
    random = np.random.default_rng(seed)
    num_exits = int(random.integers(2, 5))
    trace = random_trace(int(random.integers(3, 8)), num_exits, seed)
    costs = random_costs(num_exits, seed)
    options = PlacementOptions(
        risk=risk,
        max_risk=float(random.uniform(0.4, 0.8)),
        confidence=float(random.uniform(0.1, 0.3)),
        max_worst_case=FREE if seed % 2 else float(random.uniform(1.05, 1.4)),
    )
    placement = place(trace, costs, options)
    assert placement.is_complete
    total, lost = replayed(trace, costs, placement)
    assert lost == placement.lost <= placement.max_lost == options.max_lost(len(trace.labels))
    assert placement.worst_case <= options.max_worst_case
    assert total == pytest.approx(placement.expected_ms * len(trace.labels), rel=1e-6)
    assert total == pytest.approx(by_brute_force(trace, costs, options), rel=1e-6)


def placed(num_rows: int = 600, num_exits: int = 5, seed: int = 0, **options) -> Placement:
    options = PlacementOptions(max_risk=0.1, **options)
    return place(random_trace(num_rows, num_exits, seed), random_costs(num_exits, seed), options)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_never_worse_than_all_exits_none_or_any_forced_choice(seed: int) -> None:
    free = placed(seed=seed, max_worst_case=FREE)
    assert free.expected_ms <= min(free.all_exits_ms, free.no_exits_ms)
    for keep in ((), (0,), (1, 3), (0, 1, 2, 3), (2, 4)):
        forced = placed(seed=seed, max_worst_case=FREE, is_chosen=False, keep=keep)
        assert forced.kept == tuple(sorted({*keep, 4}))
        assert free.expected_ms <= forced.expected_ms + 1e-9
    assert forced.policy.score == "max_prob"
    assert len(forced.policy.limits) == 1


def test_the_bound_on_the_worst_case_drops_exits_and_costs_latency() -> None:
    free = placed(max_worst_case=FREE)
    bound = placed(max_worst_case=1.1)
    assert bound.worst_case <= 1.1 < free.worst_case
    assert len(bound.kept) < len(free.kept)
    assert bound.expected_ms >= free.expected_ms
    assert [a.is_allowed for a in bound.alternatives] == [a.worst_case <= 1.1 for a in bound.alternatives]


def test_the_waterfall_ends_at_what_is_expected() -> None:
    placement = placed(max_worst_case=FREE)
    kept = [found for found in placement.exits if found.is_kept]
    assert [found.exit_index for found in kept] == list(placement.kept[:-1])
    end = placement.no_exits_ms - sum(found.saves_ms for found in kept) + sum(found.costs_ms for found in kept)
    assert end == pytest.approx(placement.expected_ms, rel=1e-6)
    assert sum(found.share for found in kept) <= 1
    for found in placement.exits:  # no exit is worth dropping or adding
        assert found.toggled_ms is None or found.toggled_ms >= placement.expected_ms - 1e-9
        assert found.exit_ms == placement.costs.exits_ms[found.exit_index]


def test_alternatives_are_the_best_of_each_size() -> None:
    trace, costs = random_trace(200, 4, 0), random_costs(4, 0)
    placement = placed(num_rows=200, num_exits=4, max_worst_case=FREE)
    assert [found.num_kept for found in placement.alternatives] == [0, 1, 2, 3]
    for found in placement.alternatives:
        options = PlacementOptions(max_risk=0.1, max_worst_case=FREE, is_chosen=False)
        sets = itertools.combinations(range(3), found.num_kept)
        best = min(place(trace, costs, replace(options, keep=keep)).expected_ms for keep in sets)
        assert found.expected_ms == pytest.approx(best, rel=1e-9)
        assert found.worst_case == pytest.approx(costs.worst_case(found.kept))
    document = json.loads(json.dumps(placement.document()))
    assert document["alternatives"][0]["kept"] == []
    assert Policy.from_json(json.dumps(document["policy"])) == placement.policy


def test_temperatures_follow_their_exits() -> None:
    trace = random_trace(300, 4, 1)
    options = PlacementOptions(max_risk=0.1, max_worst_case=FREE, is_chosen=False, keep=(1,))
    placement = place(trace, random_costs(4, 1), options, (1.0, 2.0, 3.0, 0.5))
    assert placement.policy.temperatures == (2.0, 0.5)


def test_an_exit_without_a_learned_score_is_dropped() -> None:
    trace = random_trace(300, 4, 1)
    learned = trace.scores[:, :, 0].copy()
    learned[:, 1] = np.nan
    trace = replace(trace, learned=learned)
    options = PlacementOptions("learned", max_risk=0.1, max_worst_case=FREE)
    assert 1 not in place(trace, Costs((1, 1, 1, 1), (0, 0, 0), 4), options).kept
    with pytest.raises(OptionError, match=r"exits \[1\] have no score 'learned'"):
        place(trace, Costs((1, 1, 1, 1), (0, 0, 0), 4), replace(options, is_chosen=False, keep=(1,)))


def test_an_exit_that_costs_more_than_it_saves_goes() -> None:
    trace = trace_by_hand([[1, 1, 1]] * 900, [[0.9, 0.9, 0.9]] * 900, [1] * 900)
    assert place(trace, Costs((1, 1, 1), (0.5, 0.5), 2), PlacementOptions(max_worst_case=FREE)).kept == (0, 2)
    unsure = trace_by_hand([[0, 1, 1]] * 900, [[0.9, 0.9, 0.9]] * 900, [1] * 900)
    placement = place(unsure, Costs((1, 1, 1), (0.5, 0.5), 2), PlacementOptions(max_worst_case=FREE))
    assert placement.kept == (1, 2)
    assert placement.expected_ms == pytest.approx(1.5)
    assert placement.exits[0].toggled_ms == pytest.approx(2.0)  # closed, and still paid for
    assert (placement.exits[0].saves_ms, placement.exits[0].costs_ms) == (0.0, 0.5)


def test_bad_arguments_are_refused_with_what_mends_them() -> None:
    trace, costs = random_trace(600, 3, 0), Costs((1.0, 1.0, 1.0), (0.1, 0.1), 2.0)
    with pytest.raises(DataError, match="takes 449: not even a policy without a loss"):
        place(random_trace(448, 3, 0), costs, PlacementOptions())
    with pytest.raises(OptionError, match=r"1\.400 times the uncut model already"):
        place(trace, costs, PlacementOptions())
    with pytest.raises(DataError, match="none with a label, for risk"):
        place(replace(trace, labels=np.full(600, UNKNOWN)), costs, PlacementOptions(risk="accuracy_gap"))
    with pytest.raises(DataError, match="got costs of 3 segments and a trace of 4 exits"):
        place(random_trace(600, 4, 0), costs, PlacementOptions())
    with pytest.raises(OptionError, match=r"--keep: got \[3\]"):
        place(trace, costs, PlacementOptions(is_chosen=False, keep=(3,)))
    with pytest.raises(DataError, match="expected a time per segment"):
        Costs((1.0, 1.0), (-0.1,), 2.0)
    for wrong in ({"score": "x"}, {"risk": "x"}, {"max_risk": 0.0}, {"confidence": 1.0}, {"max_worst_case": 0.0}):
        with pytest.raises(OptionError, match="place: got"):
            PlacementOptions(**wrong)
