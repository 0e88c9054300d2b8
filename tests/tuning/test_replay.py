from dataclasses import replace as changed

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import Said, lets_go, random_policies
from traces import random_trace, trace_by_hand

from offramp.errors import DataError, OptionError
from offramp.policy import FINAL, Policy
from offramp.scores import scores_from_logits
from offramp.trace import UNKNOWN
from offramp.tuning.replay import (
    accuracy,
    cumulative_costs_ms,
    exit_shares,
    expected_cost_ms,
    mean_depth,
    replay,
    scores_at,
)

SCORE_NAMES = ("max_prob", "margin", "entropy")
LIMITS = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=3, max_size=3)
RANDOM = random_trace(40, 4, seed=3)


def hand_trace():
    return trace_by_hand(
        predictions=[[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0]],
        confidences=[[0.9, 0.95, 0.99], [0.6, 0.8, 0.9], [0.7, 0.6, 0.7], [0.8, 0.7, 0.9]],
        labels=[1, 1, 0, UNKNOWN],
        costs_ms=[1, 2, 4],
    )


def row_by_row(policy, trace):
    """The slow reference: one row at a time, one condition at a time."""
    scores = scores_at(trace, policy.inverse_temperatures(trace.num_exits))
    for row in range(len(trace.logits)):
        one = slice(row, row + 1)
        heard = [Said(trace.logits[one, k], trace.predictions[one, k], scores[one, k]) for k in range(trace.num_exits)]
        early = range(trace.num_exits - 1)
        yield next((k for k in early if lets_go(policy, heard[: k + 1], trace.num_exits)), trace.num_exits - 1)


def test_replay_by_hand():
    trace = hand_trace()
    result = replay(Policy.thresholds("max_prob", [0.75, 0.75]), trace)
    assert result.exit_index.tolist() == [0, 1, 2, 0]
    assert result.prediction.tolist() == [1, 1, 1, 1]
    assert result.reason.tolist() == ["max_prob", "max_prob", FINAL, "max_prob"]
    assert mean_depth(result.exit_index) == (1 + 2 + 3 + 1) / 4
    assert exit_shares(result.exit_index, 3).tolist() == [0.5, 0.25, 0.25]
    assert expected_cost_ms(result.exit_index, trace) == (1 + 3 + 7 + 1) / 4
    assert accuracy(result.prediction, trace.labels) == pytest.approx(2 / 3)


def test_entropy_fires_when_small():
    # binary entropy at 0.9 is 0.469, at 0.8 0.722, at 0.7 0.881
    result = replay(Policy.thresholds("entropy", [0.5, 0.75]), hand_trace())
    assert result.exit_index.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("policy", [Policy.full_depth(), Policy.thresholds("margin", [None, None])])
def test_all_closed_is_full_depth(policy):
    trace = hand_trace()
    result = replay(policy, trace)
    assert (result.exit_index == 2).all()
    assert (result.prediction == trace.predictions[:, -1]).all()
    assert set(result.reason) == {FINAL}
    assert expected_cost_ms(result.exit_index, trace) == 7


@settings(deadline=None)
@given(random_policies(RANDOM.num_exits))
def test_replay_is_the_row_by_row_rule(policy):
    assert replay(policy, RANDOM).exit_index.tolist() == list(row_by_row(policy, RANDOM))


@settings(deadline=None)
@given(st.sampled_from(SCORE_NAMES), LIMITS, st.integers(0, 2), st.one_of(st.none(), st.floats(0, 1)))
def test_a_stricter_threshold_never_lets_a_row_leave_earlier(score, limits, exit_index, other):
    sign = -1 if score == "entropy" else 1  # a small entropy is sure, so there strict is low
    strict = list(limits)
    if limits[exit_index] is None or other is None:
        strict[exit_index] = None
    else:
        strict[exit_index] = sign * max(sign * limits[exit_index], sign * other)
    loose = replay(Policy.thresholds(score, limits), RANDOM).exit_index
    tight = replay(Policy.thresholds(score, strict), RANDOM).exit_index
    assert (tight >= loose).all()
    assert expected_cost_ms(tight, RANDOM) >= expected_cost_ms(loose, RANDOM)


def test_recorded_scores_are_used_where_the_temperature_is_the_recorded_one():
    trace = hand_trace()
    marked = changed(trace, scores=np.zeros_like(trace.scores), temperatures=np.array([1.0, 2.0, 1.0]))
    scores = scores_at(marked, Policy(temperatures=(1.0, 3.0, 1.0)).inverse_temperatures(3))
    assert (scores[:, [0, 2]] == 0).all()
    np.testing.assert_array_equal(scores[:, 1], scores_from_logits(trace.logits[:, 1], np.float32(1 / 3)))
    assert (marked.scores == 0).all(), "the trace is not written to"


def test_temperature_changes_who_leaves_but_no_prediction():
    trace = hand_trace()
    cold = replay(Policy.thresholds("max_prob", [0.95, 0.95], (0.5, 0.5, 0.5)), trace)
    warm = replay(Policy.thresholds("max_prob", [0.95, 0.95], (2.0, 2.0, 2.0)), trace)
    assert (cold.exit_index <= warm.exit_index).all()
    assert cold.exit_index.tolist() == [0, 2, 2, 2]  # odds 9 : 1 squared are 0.988; 4 : 1 squared 0.941
    assert (warm.prediction == trace.predictions[:, -1]).all()


def test_replay_of_no_rows_is_empty_and_has_no_means():
    empty = random_trace(0, 3, seed=0)
    result = replay(Policy.thresholds("max_prob", [0.5, 0.5]), empty)
    assert result.exit_index.shape == result.prediction.shape == result.reason.shape == (0,)
    for statistic in (mean_depth, lambda e: exit_shares(e, 3), lambda e: expected_cost_ms(e, empty)):
        with pytest.raises(DataError, match="0 rows"):
            statistic(result.exit_index)
    with pytest.raises(DataError, match="none with a label"):
        accuracy(result.prediction, empty.labels)


def test_replay_refuses_a_policy_for_another_model():
    with pytest.raises(OptionError, match="3 thresholds"):
        replay(Policy.thresholds("max_prob", [0.5, 0.5, 0.5]), hand_trace())


@pytest.mark.parametrize("costs_ms", [[0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, np.nan, 1.0]])
def test_costs_that_make_no_sense_are_a_data_error(costs_ms):
    with pytest.raises(DataError, match="the time of every segment"):
        cumulative_costs_ms(changed(hand_trace(), costs_ms=np.array(costs_ms)))
