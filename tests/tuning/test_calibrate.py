from dataclasses import replace as changed

import numpy as np
import pytest
from traces import random_trace, trace_by_hand

from offramp.errors import DataError, OptionError
from offramp.trace import UNKNOWN
from offramp.tuning.calibrate import CalibrateOptions, calibrate
from offramp.tuning.replay import replay
from offramp.tuning.temperature import fit_temperature


def test_report_by_hand():
    trace = trace_by_hand(
        predictions=[[1, 1], [0, 1], [1, 1], [1, 0]],
        confidences=[[0.9, 0.9], [0.8, 0.9], [0.7, 0.9], [0.6, 0.9]],
        labels=[1, 1, 1, 1],
        costs_ms=[1, 3],
    )
    result = calibrate(trace, CalibrateOptions(max_drop=0.0, ece_limit=1.0))
    # all leave at exit 0: its mistake on row 1 is paid for by row 3, which full depth gets wrong
    report = result.report
    assert report.drop == 0.0
    assert report.drop_standard_error == pytest.approx(np.sqrt(0.5 / 4))  # losses 0, 1, 0, -1
    assert (report.accuracy_full_depth, report.accuracy_policy) == (0.75, 0.75)
    assert (report.mean_depth, report.expected_ms, report.expected_speedup) == (1.0, 1.0, 4.0)
    first, final = report.exits
    assert (first.share, first.accuracy, first.changed) == (1.0, 0.75, 0.5)
    assert (final.share, final.accuracy, final.changed, final.threshold) == (0.0, 0.75, None, None)
    assert final.ece_before == final.ece_after == pytest.approx(0.15)  # sure to 0.9, right on 3 of 4
    assert result.policy.temperatures == (1.0, 1.0)


def test_exits_above_the_limit_are_scaled_and_better_for_it():
    trace = random_trace(2000, 3, seed=1)
    distorted = changed(trace, logits=trace.logits * np.array([4, 1, 1], np.float32)[:, None])
    result = calibrate(distorted, CalibrateOptions(max_drop=0.02))
    overconfident = result.report.exits[0]
    assert overconfident.temperature == fit_temperature(distorted.logits[:, 0], trace.labels) > 2
    assert overconfident.ece_after < overconfident.ece_before / 2
    for each in result.report.exits:
        assert (each.temperature == 1.0) == (each.ece_before <= 0.02)


def test_a_target_speedup_replaces_the_bound_on_the_drop():
    result = calibrate(random_trace(500, 4, seed=1), CalibrateOptions(max_drop=0.0, target_speedup=2.0))
    assert 2.0 <= result.report.expected_speedup < 2.1
    assert len(set(result.policy.limits)) == 1
    with pytest.raises(OptionError, match=r"target speedup of 0\.5"):
        CalibrateOptions(target_speedup=0.5)


def test_scaling_can_be_turned_off():
    result = calibrate(random_trace(500, 3, seed=1), CalibrateOptions(ece_limit=1.0))
    assert result.policy.temperatures == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("score", ["max_prob", "margin", "entropy"])
def test_report_agrees_with_replay_and_keeps_the_drop(score):
    trace = random_trace(1000, 4, seed=2, costs_ms=[1, 1, 2, 2])
    result = calibrate(trace, CalibrateOptions(score=score, max_drop=0.02))
    decided = replay(result.policy, trace)
    report = result.report
    assert report.drop <= 0.02
    assert report.accuracy_full_depth - report.accuracy_policy == pytest.approx(report.drop)
    assert report.mean_depth == pytest.approx(decided.exit_index.mean() + 1)
    assert sum(each.share for each in report.exits) == pytest.approx(1)
    assert report.expected_speedup == pytest.approx(6 / np.cumsum([1, 1, 2, 2])[decided.exit_index].mean())
    assert 1 < report.expected_speedup < 6


def test_without_labels_full_depth_is_the_reference():
    trace = random_trace(500, 3, seed=3)
    unlabelled = changed(trace, labels=np.full(500, UNKNOWN), temperatures=np.array([2.0, 1.0, 1.5]))
    report = calibrate(unlabelled, CalibrateOptions(reference="full_depth", max_drop=0.05)).report
    assert [each.temperature for each in report.exits] == [2.0, 1.0, 1.5]
    assert report.num_labelled == 0
    assert report.accuracy_policy is report.accuracy_full_depth is report.exits[0].ece_before is None
    assert 0 < report.drop <= 0.05
    assert report.drop == pytest.approx(sum(each.share * (each.changed or 0) for each in report.exits))
    with pytest.raises(DataError, match="full_depth"):
        calibrate(unlabelled, CalibrateOptions())


@pytest.mark.parametrize(
    "options", [{"score": "sure"}, {"max_drop": -1}, {"reference": "none"}, {"ece_limit": float("nan")}]
)
def test_options_are_checked_when_made(options):
    with pytest.raises(OptionError, match="got"):
        CalibrateOptions(**options)


def test_one_row_is_enough():
    report = calibrate(random_trace(1, 3, seed=5), CalibrateOptions(max_drop=0.0)).report
    assert report.num_rows == 1
    assert report.drop <= 0
