from dataclasses import replace

import numpy as np
import pytest
from traces import random_trace, trace_by_hand, trace_from_logits

from offramp.certificate import RISKS, VALUED
from offramp.errors import DataError, OptionError
from offramp.trace import UNKNOWN
from offramp.tuning.losses import COUNTED, losses_from_trace

UNSCALED = np.ones(3, np.float32)


def hand_trace():
    """Four rows, three exits; the last row has no label."""
    return trace_by_hand(
        predictions=[[1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 1]],
        confidences=[[0.9, 0.6, 0.8]] * 4,
        labels=[1, 1, 0, UNKNOWN],
    )


@pytest.mark.parametrize(
    ("risk", "counts", "values"),
    [
        ("consistency", [1, 1, 1, 1], [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]),
        ("accuracy_gap", [1, 1, 1, 0], [[0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]),
        ("accuracy_gap_signed", [1, 1, 1, 0], [[-1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]),
        ("missed_detection", [0, 1, 1, 1], [[0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]),
    ],
)
def test_counted_losses_by_hand(risk, counts, values):
    table = losses_from_trace(hand_trace(), risk, UNSCALED, 1 if risk == "missed_detection" else UNKNOWN)
    assert table.counts.tolist() == [bool(count) for count in counts]
    assert table.values.tolist() == values
    assert table.is_counted == (risk in COUNTED)


def test_probability_losses_by_hand():
    table = losses_from_trace(hand_trace(), "hellinger", UNSCALED)
    p, q = np.array([0.1, 0.9]), np.array([0.8, 0.2])  # row 0: exit 0 and the final exit
    assert table.values[0, 0] == pytest.approx(np.sqrt(((np.sqrt(p) - np.sqrt(q)) ** 2).sum() / 2), abs=1e-6)
    table = losses_from_trace(hand_trace(), "brier", UNSCALED)
    label = np.array([0, 1])
    assert table.values[0, 0] == pytest.approx((((p - label) ** 2).sum() - ((q - label) ** 2).sum()) / 2, abs=1e-6)
    assert table.values[3].tolist() == [0, 0, 0]  # it has no label


def test_probabilities_are_those_at_the_policy_s_temperatures():
    trace = random_trace(50, 3, seed=1)
    hot = losses_from_trace(trace, "hellinger", np.full(3, 1e-6, np.float32))
    assert hot.values.max() < 1e-3  # all exits say one third each
    assert losses_from_trace(trace, "hellinger", UNSCALED).values.max() > 0.5


@pytest.mark.parametrize("risk", RISKS)
def test_full_depth_loses_nothing_and_no_loss_is_above_one(risk):
    trace = random_trace(300, 3, seed=2)
    if risk in VALUED:
        nothing = {"predictions": np.zeros_like(trace.predictions), "labels": np.full(300, UNKNOWN)}
        targets = trace.labels.astype(np.float32)
        trace = replace(trace, logits=trace.logits[:, :, :1], targets=targets, **nothing)
    table = losses_from_trace(trace, risk, UNSCALED, 2 if risk == "missed_detection" else UNKNOWN)
    assert (table.values[:, -1] == 0).all()
    assert -1 <= table.values.min() <= table.values.max() <= 1
    exit_index = np.arange(300) % 3
    expected = [table.values[row, exit_index[row]] for row in range(300) if table.counts[row]]
    assert table.of(exit_index).tolist() == expected
    some = np.array([5, 3, 8])
    assert table.rows(some).of(exit_index[some]).tolist() == [
        table.values[row, exit_index[row]] for row in some if table.counts[row]
    ]


def test_rows_that_say_nothing_are_refused():
    unlabelled = trace_from_logits(np.zeros((2, 3, 2)), [UNKNOWN, UNKNOWN])
    with pytest.raises(DataError, match=r"none with a label.*--risk consistency"):
        losses_from_trace(unlabelled, "accuracy_gap", UNSCALED)
    with pytest.raises(DataError, match="none with what the risk is about"):
        losses_from_trace(unlabelled, "missed_detection", UNSCALED, 1)
    with pytest.raises(OptionError, match="--class"):
        losses_from_trace(unlabelled, "missed_detection", UNSCALED)
    with pytest.raises(OptionError, match="expected one of consistency"):
        losses_from_trace(unlabelled, "accuracy", UNSCALED)
