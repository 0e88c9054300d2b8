"""From logits to scores and probabilities, outside of a graph: what a segment's score head computes, in numpy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from offramp.errors import DataError

_BLOCK = 1 << 16  # numbers at a time: beyond the second-level cache a pass takes three times as long


def scores_from_logits(logits: NDArray[np.float32], inverse_temperature: np.float32 | float) -> NDArray[np.float32]:
    """The scores of logits (N, C), in float32 and row by row: a row's do not depend on the rows beside it.

    Returns (N, 3) in [0, 1]: max probability, margin of the two largest, entropy divided by log C; see
    `tuning.thresholds.MIN_GAP` for how far an engine's may be from them. Raises DataError when C < 2.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise DataError(f"scores: got logits of shape {logits.shape}, expected (rows, at least 2 classes)")
    scores = np.empty((len(logits), 3), np.float32)
    flat = np.float32(math.log(logits.shape[1]))
    for some in _blocks(logits):
        shifted, powers, total = _powers(logits[some], inverse_temperature)
        # The sum of p log p, where log p is shifted - log(total), finite where log(p) would be -inf.
        shifted_mean = np.multiply(shifted, powers, out=shifted).sum(axis=1) / total
        powers[np.arange(len(powers)), powers.argmax(axis=1)] = 0  # it was 1; sorting takes ten times as long
        first, second = 1 / total, powers.max(axis=1) / total
        scores[some] = np.stack([first, first - second, (np.log(total) - shifted_mean) / flat], axis=1)
    return scores.clip(0, 1)  # rounding takes the entropy of a uniform row above 1


def log_probabilities(
    logits: NDArray[np.float32], target: NDArray[np.int64], inverse_temperature: np.float32
) -> NDArray[np.float32]:
    """Natural logarithms (N,) of the probabilities that logits (N, C) give to the classes `target` (N,)."""
    found = np.empty(len(logits), np.float32)
    for some in _blocks(logits):
        shifted, _, total = _powers(logits[some], inverse_temperature)
        found[some] = shifted[np.arange(len(shifted)), target[some]] - np.log(total)
    return found


def _blocks(logits: NDArray[np.float32]) -> list[slice]:
    """Rows that fit into a cache together."""
    size = max(1, _BLOCK // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _powers(
    logits: NDArray[np.float32], inverse_temperature: np.float32 | float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Scaled logits less the row's largest (N, C) <= 0, their exponentials (N, C), and the sums of these (N,) >= 1."""
    shifted = np.asarray(logits, np.float32) * np.float32(inverse_temperature)
    shifted -= shifted.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    return shifted, powers, powers.sum(axis=1)
