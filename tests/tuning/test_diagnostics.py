"""Diagnostics against slow, obvious references."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import random_trace, trace_by_hand

from offramp.errors import DataError
from offramp.trace import UNKNOWN
from offramp.tuning.diagnostics import (
    adaptive_calibration_error,
    classwise_calibration_error,
    confusion,
    diagnose,
    exit_agreement,
    failure_auroc,
    overthinking,
    quality,
    reliability_bins,
)
from offramp.tuning.losses import brier_scores
from offramp.tuning.temperature import NUM_BINS, expected_calibration_error, softmax

# rounding in the sums of at most 60 numbers below 1
NEAR = 1e-12
answers = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.61, 0.9, 1.0]) | st.floats(0, 1), st.booleans()))


def columns(rows):
    confidence, correct = zip(*rows, strict=True)
    return np.array(confidence), np.array(correct)


def bin_of(value: float, num_bins: int) -> int:
    """Closed above; 0 belongs to the first."""
    return next(k for k in range(num_bins) if value <= (k + 1) / num_bins or k == num_bins - 1)


@given(rows=answers.filter(len))
def test_reliability_bins_are_those_of_the_calibration_error(rows) -> None:
    confidence, correct = columns(rows)
    found = reliability_bins(confidence, correct)
    assert sum(point.num_rows for point in found) == len(rows)
    for point in found:
        inside = [(c, right) for c, right in rows if point.low < c <= point.high or (c == 0 and point.low == 0)]
        assert len(inside) == point.num_rows
        assert point.confidence == pytest.approx(np.mean([c for c, _ in inside]), abs=NEAR)
        assert point.accuracy == pytest.approx(np.mean([right for _, right in inside]), abs=NEAR)
    error = sum(point.num_rows * abs(point.confidence - point.accuracy) for point in found) / len(rows)
    assert expected_calibration_error(confidence, correct) == pytest.approx(error, abs=NEAR)


@given(rows=answers.filter(len), num_bins=st.integers(1, 20), data=st.data())
def test_adaptive_bins_have_equal_mass_and_heed_no_order(rows, num_bins: int, data) -> None:
    confidence, correct = columns(rows)
    bins: dict[int, list[float]] = {}
    for c, right in rows:
        middle = sum(other < c for other, _ in rows) + sum(other == c for other, _ in rows) / 2
        bins.setdefault(math.floor(middle * num_bins / len(rows)), []).append(c - right)
    expected = sum(abs(sum(gaps)) for gaps in bins.values()) / len(rows)
    assert adaptive_calibration_error(confidence, correct, num_bins) == pytest.approx(expected, abs=1e-9)
    order = np.array(data.draw(st.permutations(range(len(rows)))))
    again = adaptive_calibration_error(confidence[order], correct[order], num_bins)
    assert again == pytest.approx(expected, abs=1e-9)


def test_adaptive_bins_of_different_confidences_have_as_many_rows_each() -> None:
    confidence = np.linspace(0.9, 1.0, 60)  # one or two bins of equal width
    correct = np.arange(60) % 20 != 0
    groups = zip(np.split(confidence, NUM_BINS), np.split(correct, NUM_BINS), strict=True)
    expected = sum(abs(c.sum() - right.sum()) for c, right in groups) / 60
    assert adaptive_calibration_error(confidence, correct) == pytest.approx(expected)
    with pytest.raises(DataError, match="0 rows"):
        adaptive_calibration_error(np.empty(0), np.empty(0, bool))


@given(seed=st.integers(0, 1000), num_rows=st.integers(1, 40), num_classes=st.integers(2, 5))
@settings(max_examples=50)
def test_class_by_class_and_row_by_row(seed: int, num_rows: int, num_classes: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_rows, num_classes)) * 2
    labels = random.integers(0, num_classes, num_rows)
    p = softmax(logits, 0.7)
    for row, scaled in zip(p, logits / 0.7, strict=True):
        assert row == pytest.approx([math.exp(z) / sum(map(math.exp, scaled)) for z in scaled], rel=1e-12)
    brier = np.mean([sum((p[i, c] - (labels[i] == c)) ** 2 for c in range(num_classes)) for i in range(num_rows)])
    assert brier_scores(p, labels).mean() == pytest.approx(brier)
    total = 0.0
    for c in range(num_classes):
        gaps = [0.0] * NUM_BINS
        for i in range(num_rows):
            gaps[bin_of(p[i, c], NUM_BINS)] += p[i, c] - (labels[i] == c)
        total += sum(map(abs, gaps)) / num_rows
    assert classwise_calibration_error(p, labels) == pytest.approx(total / num_classes)
    found = quality(logits, labels, 0.7)
    assert (found.brier, found.classwise_ece) == (
        brier_scores(p, labels).mean(),
        classwise_calibration_error(p, labels),
    )
    assert found.ece == expected_calibration_error(p.max(axis=1), p.argmax(axis=1) == labels)
    assert found.nll == pytest.approx(-np.mean(np.log(p[np.arange(num_rows), labels])))


@given(rows=answers)
def test_auroc_is_the_share_of_pairs_in_order(rows) -> None:
    right, wrong = [c for c, is_right in rows if is_right], [c for c, is_right in rows if not is_right]
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(right, wrong)]
    found = failure_auroc(np.array([c for c, _ in rows]), np.array([is_right for _, is_right in rows], bool))
    assert found == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_agreement_pair_by_pair() -> None:
    trace = random_trace(50, 4, seed=1)
    found = exit_agreement(trace.predictions)
    for i, j in itertools.product(range(4), repeat=2):
        assert found[i, j] == np.mean([row[i] == row[j] for row in trace.predictions])


def test_overthinking_row_by_row() -> None:
    #        right early and late; right early, wrong late; only late; never; only the middle one
    predictions = [[1, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]
    trace = trace_by_hand(predictions, np.full((5, 3), 0.75), [1] * 5)
    found = overthinking(trace, np.ones(3))
    assert (found.wasteful, found.destructive) == (1 / 5, 2 / 5)
    assert found.share_of_errors == pytest.approx(2 / 3)
    assert found.oracle_accuracy == 4 / 5
    assert found.oracle_depth == (1 + 1 + 3 + 3 + 2) / 5
    # the L1 distance of (.25, .75) and (.75, .25) is 1
    assert confusion(trace, np.ones(3)) == pytest.approx([0, 1, 2, 0, 1])
    # right ends have 0 and 2, wrong ones 1, 0 and 1: of 6 pairs the wrong one is more confused in 2, and one ties
    assert found.confusion_auroc == pytest.approx(2.5 / 6)
    single = trace_by_hand([[1], [0]], [[0.9], [0.9]], [1, 1])
    assert overthinking(single, np.ones(1)).wasteful == overthinking(single, np.ones(1)).destructive == 0


def test_the_whole_of_a_trace() -> None:
    trace = random_trace(400, 3, seed=2)
    hidden = replace(trace, labels=np.where(np.arange(400) % 4, trace.labels, UNKNOWN))
    found = diagnose(hidden)
    assert (found.num_rows, found.num_labelled, len(found.exits)) == (400, 300, 3)
    assert np.array(found.agreement).shape == (3, 3)
    kept = trace.rows(hidden.labels != UNKNOWN)
    assert found.exits == diagnose(kept).exits
    assert found.overthinking == overthinking(kept, np.array([point.scaled.temperature for point in found.exits]))
    for k, point in enumerate(found.exits):
        assert point.accuracy == np.mean(kept.predictions[:, k] == kept.labels)
        assert point.needs_scaling == (point.unscaled.ece > 0.02)
        assert point.scaled.temperature == (point.fitted_temperature if point.needs_scaling else 1.0)
        assert point.scaled.nll <= point.unscaled.nll
        assert point.scaled.failure_auroc is not None
    document = json.loads(json.dumps(found.document()))
    assert document["exits"][2]["scaled"]["ece"] == found.exits[2].scaled.ece
    assert diagnose(trace, ece_limit=1.0).exits[0].scaled.temperature == 1.0


def test_without_labels_there_is_agreement_only() -> None:
    trace = random_trace(30, 3, seed=3)
    found = diagnose(replace(trace, labels=np.full(30, UNKNOWN)))
    assert (found.exits, found.overthinking, found.num_labelled) == ((), None, 0)
    assert found.agreement == diagnose(trace).agreement
    with pytest.raises(DataError, match="0 rows"):
        diagnose(trace.rows(np.arange(0)))
