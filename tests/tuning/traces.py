"""Traces for the tuning tests: by hand from predictions and confidences, or random with exits that get better."""

import numpy as np

from offramp.scores import scores_from_logits
from offramp.trace import Trace


def trace_from_logits(logits, labels, costs_ms=None):
    """A trace whose scores, at temperature 1, and predictions follow from logits (N, E, C)."""
    logits = np.asarray(logits, np.float32)
    num_exits = logits.shape[1]
    return Trace(
        logits=logits,
        scores=np.stack([scores_from_logits(logits[:, k], 1.0) for k in range(num_exits)], axis=1),
        predictions=logits.argmax(axis=2),
        temperatures=np.ones(num_exits),
        labels=np.asarray(labels, np.int64),
        costs_ms=np.ones(num_exits) if costs_ms is None else np.asarray(costs_ms, np.float64),
        fingerprint="f" * 64,
        backend="fake",
        precision="fp32",
    )


def trace_by_hand(predictions, confidences, labels, costs_ms=None):
    """A trace of two classes: predictions (N, E) in {0, 1}, with confidences (N, E) in (0.5, 1)."""
    predictions, confidences = np.asarray(predictions), np.asarray(confidences)
    log_odds = np.log(confidences / (1 - confidences)) * np.where(predictions == 1, 1, -1)  # (N, E)
    return trace_from_logits(np.stack([-log_odds / 2, log_odds / 2], axis=2), labels, costs_ms)


def random_trace(num_rows, num_exits, seed, num_classes=3, costs_ms=None):
    """Later exits are right more often; rows differ in how hard they are at every exit."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_rows)
    hardness = generator.normal(size=num_rows)
    logits = generator.normal(size=(num_rows, num_exits, num_classes)) * 0.5
    for k in range(num_exits):
        signal = 2.5 * (k + 1) / num_exits * (1 + hardness / 2) + generator.normal(size=num_rows)
        logits[np.arange(num_rows), k, labels] += signal
    return trace_from_logits(logits, labels, costs_ms)
