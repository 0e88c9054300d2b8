import itertools
import time
from dataclasses import replace as changed

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import random_trace, trace_by_hand, trace_from_logits

from offramp.bundle import SCORES
from offramp.errors import DataError, OptionError
from offramp.policy import Policy
from offramp.scores import scores_from_logits
from offramp.trace import UNKNOWN
from offramp.tuning import search
from offramp.tuning.replay import accuracy, expected_cost_ms, replay
from offramp.tuning.thresholds import MIN_GAP, fastest_thresholds, thresholds_for_speedup

# confidences (4, 3): exit 0 ranks the rows, exit 1 tells only the last one apart
TWO_EXITS = [[0.9, 0.9, 0.9], [0.8, 0.9, 0.9], [0.7, 0.9, 0.9], [0.6, 0.8, 0.9]]


def num_right(policy, trace):
    return int((replay(policy, trace).prediction == trace.labels).sum())


def cost_ms(policy, trace):
    return expected_cost_ms(replay(policy, trace).exit_index, trace)


def brute_force(trace, score, num_losses):
    """The slow reference: replay every combination of thresholds, one on every score and none."""
    column = SCORES.index(score)
    choices = [[None, *np.unique(trace.scores[:, k, column]).tolist()] for k in range(trace.num_exits - 1)]
    wanted = num_right(Policy.full_depth(), trace) - num_losses
    policies = [Policy.thresholds(score, limits) for limits in itertools.product(*choices)]
    return min(cost_ms(policy, trace) for policy in policies if num_right(policy, trace) >= wanted)


def test_thresholds_by_hand():
    # exit 0 is wrong on the row of confidence 0.7, exit 1 on the row of confidence 0.8; full depth never
    trace = trace_by_hand([[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 1]], TWO_EXITS, [1, 1, 1, 1])
    policy = fastest_thresholds(trace, "max_prob", max_drop=0.0)
    assert policy.limits == (pytest.approx(0.75), pytest.approx(0.85))
    assert replay(policy, trace).exit_index.tolist() == [0, 0, 1, 2]


def test_a_row_to_lose_goes_where_it_saves_most():
    trace = trace_by_hand([[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 1]], TWO_EXITS, [1, 1, 1, 1])
    policy = fastest_thresholds(trace, "max_prob", max_drop=0.25)
    assert replay(policy, trace).exit_index.tolist() == [0, 0, 0, 0]
    assert policy.limits[1] is None, "nobody is left to leave at exit 1"
    assert policy.limits[0] == pytest.approx(0.6, abs=MIN_GAP)


@pytest.mark.parametrize(("max_drop", "shares"), [(0.29, 29), (0.2899, 28), (0.0, 0)])
def test_the_drop_is_counted_in_whole_rows(max_drop, shares):
    confidences = np.linspace(0.6, 0.9, 100)[:, None].repeat(2, axis=1)
    trace = trace_by_hand([[0, 1]] * 100, confidences, [1] * 100)  # exit 0 always wrong, the final one never
    policy = fastest_thresholds(trace, "max_prob", max_drop)
    assert (replay(policy, trace).exit_index == 0).sum() == shares


def test_an_exit_that_does_not_pay_is_closed():
    trace = trace_by_hand([[0, 1, 1]] * 4, TWO_EXITS, [1, 1, 1, 1])
    policy = fastest_thresholds(trace, "max_prob", max_drop=0.0)
    assert policy.limits == (None, pytest.approx(0.8, abs=MIN_GAP))


def test_an_early_exit_that_is_better_earns_rows_to_lose_elsewhere():
    # exit 0 is right where full depth is wrong (row 0), which pays for its mistake on row 2
    trace = trace_by_hand([[1, 0, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1]], TWO_EXITS, [1, 1, 1, 1])
    policy = fastest_thresholds(trace, "max_prob", max_drop=0.0)
    assert (replay(policy, trace).exit_index == 0).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    score=st.sampled_from(SCORES),
    shape=st.sampled_from([(1, 2), (12, 2), (14, 3)]),
    num_losses=st.integers(0, 3),
)
def test_up_to_two_early_exits_are_as_fast_as_brute_force(seed, score, shape, num_losses):
    costs_ms = np.random.default_rng(seed).uniform(0.5, 2, shape[1])
    trace = random_trace(*shape, seed, costs_ms=costs_ms)
    num_losses = min(num_losses, shape[0])
    policy = fastest_thresholds(trace, score, min(num_losses / shape[0] + 1e-9, 1.0))
    assert num_right(policy, trace) >= num_right(Policy.full_depth(), trace) - num_losses
    assert cost_ms(policy, trace) == pytest.approx(brute_force(trace, score, num_losses), rel=1e-8)


@pytest.mark.parametrize("seed", range(8))
def test_three_early_exits_are_as_fast_as_brute_force_on_these(seed):
    """Not so for every trace: the search stops where no pair of exits improves."""
    trace = random_trace(8, 4, seed, costs_ms=np.random.default_rng(seed).uniform(0.5, 2, 4))
    policy = fastest_thresholds(trace, "max_prob", 0.125)
    assert num_right(policy, trace) >= num_right(Policy.full_depth(), trace) - 1
    assert cost_ms(policy, trace) == pytest.approx(brute_force(trace, "max_prob", 1), rel=1e-8)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(SCORES), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_a_larger_drop_is_never_slower(seed, score, drops):
    trace = random_trace(60, 3, seed)
    strict, loose = (fastest_thresholds(trace, score, drop) for drop in sorted(drops))
    assert cost_ms(strict, trace) >= cost_ms(loose, trace)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(SCORES), st.sampled_from([(), (0.7, 1.0, 1.5, 2.0)]))
def test_no_threshold_is_near_a_score(seed, score, temperatures):
    """So a score off by what numpy and an engine may differ by never changes a decision."""
    trace = random_trace(200, 4, seed)
    policy = fastest_thresholds(trace, score, 0.02, temperatures)
    trace = changed(trace, temperatures=np.array(temperatures or (1.0,) * 4))
    noise = np.random.default_rng(seed).uniform(-1, 1, trace.scores.shape) * 0.45 * MIN_GAP
    recorded = changed(trace, scores=scores_of(trace, policy))
    disturbed = changed(recorded, scores=(recorded.scores + noise).astype(np.float32).clip(0, 1))
    assert replay(policy, recorded).exit_index.tolist() == replay(policy, disturbed).exit_index.tolist()


def scores_of(trace, policy):
    inverse = policy.inverse_temperatures(trace.num_exits)
    return np.stack([scores_from_logits(trace.logits[:, k], t) for k, t in enumerate(inverse)], axis=1)


def test_equal_scores_leave_together():
    trace = trace_by_hand([[1, 1], [0, 1], [1, 1]], [[0.8, 0.9], [0.8, 0.9], [0.9, 0.9]], [1, 1, 1])
    policy = fastest_thresholds(trace, "max_prob", max_drop=0.0)
    assert replay(policy, trace).exit_index.tolist() == [1, 1, 0]


def test_scores_closer_than_the_gap_leave_together():
    trace = trace_by_hand([[1, 1], [0, 1]], [[0.8, 0.9], [0.7, 0.9]], [1, 1])
    scores = trace.scores.copy()
    scores[:, 0, 0] = 0.8, 0.8 - 2**-20
    policy = fastest_thresholds(changed(trace, scores=scores), "max_prob", max_drop=0.0)
    assert policy.limits == (None,)


def test_thresholds_survive_json_and_are_float32():
    policy = fastest_thresholds(random_trace(200, 4, seed=1), "margin", 0.02)
    assert Policy.from_json(policy.to_json()) == policy
    assert all(limit is None or limit == float(np.float32(limit)) for limit in policy.limits)


def test_the_same_policy_for_any_order_of_rows():
    trace = random_trace(150, 4, seed=5)
    order = np.random.default_rng(0).permutation(150)
    fields = ("logits", "scores", "predictions", "labels")
    shuffled = changed(trace, **{name: getattr(trace, name)[order] for name in fields})
    assert fastest_thresholds(trace, "max_prob", 0.02) == fastest_thresholds(shuffled, "max_prob", 0.02)


def test_one_exit_has_no_thresholds():
    assert fastest_thresholds(random_trace(10, 1, seed=0), "max_prob", 0.1) == Policy("max_prob")


def test_temperatures_are_the_policys():
    trace = random_trace(100, 3, seed=2)
    policy = fastest_thresholds(trace, "max_prob", 0.02, (2.0, 0.5, 1.0))
    assert policy.temperatures == (2.0, 0.5, 1.0)
    drop = accuracy(trace.predictions[:, -1], trace.labels) - accuracy(replay(policy, trace).prediction, trace.labels)
    assert drop <= 0.02 + 1e-12


def test_only_labelled_rows_count():
    trace = random_trace(100, 3, seed=4)
    half = changed(trace, labels=np.where(np.arange(100) < 50, trace.labels, UNKNOWN))
    first = fastest_thresholds(trace.rows(np.arange(50)), "max_prob", 0.04)
    assert fastest_thresholds(half, "max_prob", 0.04) == first


def test_full_depth_as_reference_needs_no_labels_and_bounds_changed_answers():
    trace = random_trace(200, 3, seed=6)
    unlabelled = changed(trace, labels=np.full(200, UNKNOWN))
    policy = fastest_thresholds(unlabelled, "max_prob", 0.05, reference="full_depth")
    num_changed = (replay(policy, trace).prediction != trace.predictions[:, -1]).sum()
    assert 0 < num_changed <= 10
    assert policy == fastest_thresholds(trace, "max_prob", 0.05, reference="full_depth")


def test_no_labels_is_a_data_error_that_names_the_way_out():
    trace = changed(random_trace(5, 3, seed=0), labels=np.full(5, UNKNOWN))
    with pytest.raises(DataError, match="'full_depth' for data without labels"):
        fastest_thresholds(trace, "max_prob", 0.01)
    for reference in ("label", "full_depth"):
        with pytest.raises(DataError, match="got 0 rows"):
            fastest_thresholds(random_trace(0, 3, seed=0), "max_prob", 0.01, reference=reference)


def test_arguments_that_make_no_sense_are_option_errors():
    trace = random_trace(5, 3, seed=0)
    for drop in (-0.01, 1.01, float("nan")):
        with pytest.raises(OptionError, match="got a drop of"):
            fastest_thresholds(trace, "max_prob", drop)
    with pytest.raises(OptionError, match="got score 'sure'"):
        fastest_thresholds(trace, "sure", 0.01)
    with pytest.raises(OptionError, match="2 temperatures"):
        fastest_thresholds(trace, "max_prob", 0.01, (1.0, 1.0))
    with pytest.raises(OptionError, match="got reference 'labels'"):
        fastest_thresholds(trace, "max_prob", 0.01, reference="labels")


@pytest.mark.parametrize("value", [np.nan, 1.1, -0.1])
def test_scores_that_make_no_sense_are_a_data_error(value):
    trace = random_trace(5, 2, seed=0)
    scores = trace.scores.copy()
    scores[3, 0, 0] = value
    with pytest.raises(DataError, match=r"max_prob outside \[0, 1\]"):
        fastest_thresholds(changed(trace, scores=scores), "max_prob", 0.01)


def test_a_grid_coarser_than_the_choices_stays_within_the_drop_and_near_the_optimum(monkeypatch):
    trace = random_trace(2000, 3, seed=8)
    exact = fastest_thresholds(trace, "max_prob", 0.01)
    monkeypatch.setattr(search, "GRID_ONE_PAIR", 32)
    coarse = fastest_thresholds(trace, "max_prob", 0.01)
    assert num_right(coarse, trace) >= num_right(Policy.full_depth(), trace) - 20
    assert cost_ms(exact, trace) <= cost_ms(coarse, trace) <= 1.01 * cost_ms(exact, trace)


def test_a_thousand_rows_and_twelve_exits_take_seconds_not_minutes():
    trace = random_trace(1000, 12, seed=9)
    start = time.process_time()
    policy = fastest_thresholds(trace, "max_prob", 0.01)
    assert time.process_time() - start < 6  # 1.2 s of processor time when this was written
    assert num_right(policy, trace) >= num_right(Policy.full_depth(), trace) - 10
    assert cost_ms(policy, trace) < 12


def test_saturated_scores_are_one_level():
    logits = np.array([[[40.0, 0.0], [40.0, 0.0]], [[50.0, 0.0], [0.0, 9.0]]])
    trace = trace_from_logits(logits, [0, 1])
    assert fastest_thresholds(trace, "max_prob", 0.0).limits == (None,)
    assert fastest_thresholds(trace, "max_prob", 0.5).limits == (pytest.approx(1 - MIN_GAP / 2, abs=1e-7),)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(SCORES), st.floats(1.05, 4))
def test_a_target_speedup_is_met_by_the_strictest_common_threshold(seed, score, target):
    trace = random_trace(30, 4, seed)
    everybody = Policy.thresholds(score, [1.0 if score == "entropy" else 0.0] * 3)
    if cost_ms(Policy.full_depth(), trace) / cost_ms(everybody, trace) < target:
        with pytest.raises(OptionError, match="with every row leaving at the first exit"):
            thresholds_for_speedup(trace, score, target)
        return
    policy = thresholds_for_speedup(trace, score, target)
    full = cost_ms(Policy.full_depth(), trace)
    assert full / cost_ms(policy, trace) >= target
    (limit,) = set(policy.limits)
    values = np.unique(trace.scores[:, :-1, SCORES.index(score)]).tolist()
    sign = -1 if score == "entropy" else 1  # a small entropy is sure
    loosest = min(sign * value for value in values if sign * value > sign * limit)  # it leaves at the limit
    for value in [value for value in values if sign * value > loosest + MIN_GAP]:
        assert full / cost_ms(Policy.thresholds(score, [value] * 3), trace) < target


@pytest.mark.parametrize("target", [1.0, 0.5, float("nan"), float("inf")])
def test_a_target_that_is_no_speedup_is_refused(target):
    with pytest.raises(OptionError, match="expected a number above 1"):
        thresholds_for_speedup(random_trace(10, 3, 0), "margin", target)


def test_learned_thresholds_are_those_of_any_score_that_says_the_same() -> None:
    trace = random_trace(200, 3, 5)
    same = changed(trace, learned=trace.scores[:, :, SCORES.index("max_prob")])
    expected = fastest_thresholds(trace, "max_prob", 0.02)
    found = fastest_thresholds(same, "learned", 0.02)
    assert any(limit is not None for limit in found.limits)
    assert (found.score, found.limits) == ("learned", expected.limits)


def test_exits_without_a_learned_confidence_stay_closed() -> None:
    trace = random_trace(200, 4, 6)
    learned = trace.scores[:, :, SCORES.index("max_prob")].copy()
    learned[:, [1, 3]] = np.nan
    policy = fastest_thresholds(changed(trace, learned=learned), "learned", 0.05)
    assert policy.limits[1] is None
    assert None not in (policy.limits[0], policy.limits[2])
    assert set(replay(policy, changed(trace, learned=learned)).exit_index.tolist()) == {0, 2, 3}
    faster = thresholds_for_speedup(changed(trace, learned=learned), "learned", 1.3)
    assert faster.limits[1] is None
    assert faster.limits[0] == faster.limits[2]
    with pytest.raises(DataError, match="no exit before the final one has a learned confidence"):
        fastest_thresholds(trace, "learned", 0.05)
    with pytest.raises(OptionError, match=r"at exits 0, 2; .* at exits \(none\)"):
        replay(policy, trace)
