"""From logits to scores and probabilities, outside of a graph: what a segment's score head computes, in numpy.

A token of a language model asks once per exit, with cold caches, so calls are few: reductions of ufuncs are half as
dear as the methods of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import SCORES
from offramp.errors import DataError

_BLOCK = 1 << 16  # numbers at a time: beyond the second-level cache a pass takes three times as long
_ONE = np.float32(1)
_MAX_PROB, _MARGIN, _ENTROPY = map(SCORES.index, ("max_prob", "margin", "entropy"))


def scores_from_logits(
    logits: NDArray[np.float32], inverse_temperature: np.float32 | float, wanted: Collection[str] = SCORES
) -> NDArray[np.float32]:
    """The scores of logits (N, C), in float32 and row by row: a row's do not depend on the rows beside it.

    Returns (N, 3) in [0, 1]: max probability, margin of the two largest, entropy divided by log C; NaN for a margin or
    an entropy that is not `wanted`. See `tuning.thresholds.MIN_GAP` for how far an engine's may be from them. Raises
    DataError when C < 2.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise DataError(f"scores: got logits of shape {logits.shape}, expected (rows, at least 2 classes)")
    scores = np.full((len(logits), len(SCORES)), np.nan, np.float32)
    log_classes = np.float32(math.log(logits.shape[1]))
    for some in _blocks(logits):
        shifted, powers, total = _powers(logits[some], inverse_temperature)
        first = scores[some, _MAX_PROB] = _ONE / total
        if "entropy" in wanted:
            # The sum of p log p, where log p is shifted - log(total), finite where log(p) would be -inf.
            information = np.add.reduce(np.multiply(shifted, powers, out=shifted), axis=1) / total - np.log(total)
            entropy = information / -log_classes  # that of a uniform row is rounded above 1
            scores[some, _ENTROPY] = entropy.clip(0, 1)
        if "margin" in wanted:
            powers[np.arange(len(powers)), powers.argmax(axis=1)] = 0  # it was 1; sorting takes ten times as long
            scores[some, _MARGIN] = first - np.maximum.reduce(powers, axis=1) / total
    return scores


def log_probabilities(
    logits: NDArray[np.float32],
    target: NDArray[np.int64],
    inverse_temperature: np.float32,
    max_prob: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Natural logarithms (N,) of the probabilities that logits (N, C) give to the classes `target` (N,).

    With `max_prob` (N,), each row's largest probability, no softmax is taken again.
    """
    known: NDArray[np.float32] = logits[np.arange(len(target)), target]
    if max_prob is not None:
        known -= np.maximum.reduce(logits, axis=1)
        return known * inverse_temperature + np.log(max_prob)
    total = np.empty(len(logits), np.float32)
    for some in _blocks(logits):
        largest = np.maximum.reduce(logits[some], axis=1, keepdims=True)
        known[some] -= largest[:, 0]
        powers = logits[some] - largest
        if inverse_temperature != 1:
            powers *= inverse_temperature
        np.add.reduce(np.exp(powers, out=powers), axis=1, out=total[some])
    return known * inverse_temperature - np.log(total)


def _blocks(logits: NDArray[np.float32]) -> Iterator[slice]:
    """Rows that fit into a cache together."""
    size = max(1, _BLOCK // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _powers(
    logits: NDArray[np.float32], inverse_temperature: np.float32 | float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Scaled logits less the row's largest (N, C) <= 0, their exponentials (N, C), and the sums of these (N,) >= 1."""
    shifted = np.multiply(logits, np.float32(inverse_temperature), dtype=np.float32)
    shifted -= np.maximum.reduce(shifted, axis=1, keepdims=True)
    powers = np.exp(shifted)
    return shifted, powers, np.add.reduce(powers, axis=1)
