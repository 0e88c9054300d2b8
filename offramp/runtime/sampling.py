"""From logits to the next token: greedy, or drawn after temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.errors import OptionError

_NUCLEUS = 1024  # so many tokens usually reach top_p; sorting a vocabulary of 49,152 takes 5 to 9 ms, these 1.5


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy: the largest logit, of equal ones the first.

    `top_k` keeps that many most likely tokens (0: all), `top_p` then the fewest whose probabilities reach it (nucleus
    sampling, arXiv 1904.09751, section 3.1). Raises OptionError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise OptionError(f"temperature: got {self.temperature}, expected a number from 0 (greedy)")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise OptionError(
                f"sampling: got top_k {self.top_k}, top_p {self.top_p}, seed {self.seed}; expected top_k and seed from "
                f"0, top_p in (0, 1]"
            )

    @property
    def is_greedy(self) -> bool:
        """Does chance play no part?"""
        return self.temperature == 0

    def generator(self, number: int) -> np.random.Generator:
        """The source of chance of the prompt with this number: its text does not depend on the others."""
        return np.random.default_rng([self.seed, number])


def sampled(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """One token by `logits` (V,)."""
    if sampling.is_greedy:
        return int(logits.argmax())
    probability = probabilities(logits, sampling)
    place = int(np.searchsorted(np.cumsum(probability), random.random()))
    return min(place, len(logits) - 1)


def probabilities(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """What tokens are drawn with: logits (V,) to (V,), sum 1. Of equal tokens at a limit the first ones stay."""
    scaled = logits.astype(np.float64) / sampling.temperature
    power: NDArray[np.float64] = np.exp(scaled - scaled.max())
    if not sampling.top_k and sampling.top_p == 1:
        power /= power.sum()
        return power
    order = _most_likely(scaled, sampling.top_k or _NUCLEUS)
    total = power[order].sum() if sampling.top_k else power.sum()
    if not sampling.top_k and power[order].sum() < sampling.top_p * total:
        order = _most_likely(scaled, len(scaled))
    kept = power[order] / total
    if sampling.top_p < 1:
        enough = int(np.searchsorted(np.cumsum(kept), sampling.top_p)) + 1
        order, kept = order[:enough], kept[:enough] / kept[:enough].sum()
    probability = np.zeros(len(logits))
    probability[order] = kept
    return probability


def _most_likely(scaled: NDArray[np.float64], number: int) -> NDArray[np.int64]:
    """The `number` largest, falling, of equal ones the first: no others are sorted."""
    candidates = np.arange(len(scaled))
    if number < len(scaled):
        least = np.partition(scaled, -number)[-number]
        candidates = (scaled >= least).nonzero()[0]
    order: NDArray[np.int64] = candidates[np.argsort(-scaled[candidates], kind="stable")][:number]
    return order
