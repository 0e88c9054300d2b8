"""Random policies of every kind, and the slow reference: one row, all that was said so far, one condition at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from offramp.bundle import SCORES
from offramp.policy import Policy, Veto


class Said(NamedTuple):
    """What one exit said about S rows."""

    logits: NDArray[np.float32]  # (S, C)
    prediction: NDArray[np.int64]  # (S,)
    scores: NDArray[np.float32]  # (S, 3)
    learned: NDArray[np.float32] | None = None  # (S,)


def random_policies(num_exits: int, with_sources: bool = False) -> st.SearchStrategy[Policy]:
    """Every kind of policy for a model with `num_exits` exits, conditions combined at random."""
    early = num_exits - 1
    limits = st.just([]) | st.lists(st.none() | st.floats(0, 1), min_size=early, max_size=early)
    temperatures = st.just([]) | st.lists(st.floats(0.5, 4), min_size=num_exits, max_size=num_exits)
    vetoes = st.builds(Veto, st.just(0.0) | st.floats(0, 0.5), st.booleans(), st.booleans())
    simple = st.builds(
        lambda score, limits, temperatures, **rest: Policy(score, tuple(limits), tuple(temperatures), **rest),
        st.sampled_from(SCORES),
        limits,
        temperatures,
        patience=st.integers(0, num_exits),
        veto=st.just(Veto()) | vetoes,
        minimum_depth=st.just(1) | st.integers(1, num_exits),
    )
    if not with_sources:
        return simple
    nested = simple.map(lambda policy: replace(policy, temperatures=()))
    return st.builds(
        lambda policy, sources: replace(policy, sources=sources),
        simple,
        st.dictionaries(st.text(min_size=1, max_size=5), nested, max_size=3),
    )


def lets_go(policy: Policy, history: Sequence[Said], num_exits: int) -> bool:
    """Whether `policy` lets a row leave that heard `history` (each of 1 row); the last entry is the exit it is at."""
    exit_index, said = len(history) - 1, history[-1]
    prediction = said.prediction[0]
    if not _is_sure(policy, exit_index, said):
        return False
    if exit_index + 1 < policy.minimum_depth:
        return False
    if policy.patience:
        last = [heard.prediction[0] for heard in history[-policy.patience :]]
        if len(last) < policy.patience or set(last) != {prediction}:
            return False
    if not said.scores[0, SCORES.index("margin")] >= policy.veto.margin:
        return False
    if policy.veto.previous and exit_index and history[-2].prediction[0] != prediction:
        return False
    if policy.veto.mean:
        inverse = policy.inverse_temperatures(num_exits)
        total = sum(_softmax(heard.logits[0] * inverse[k]) for k, heard in enumerate(history))
        return bool(np.argmax(total) == prediction)
    return True


def _is_sure(policy: Policy, exit_index: int, said: Said) -> bool:
    if not policy.limits:
        return policy.patience > 0
    limit, score = policy.limits[exit_index], said.scores[0, SCORES.index(policy.score)]
    if limit is None:
        return False
    return bool(score <= limit if policy.score == "entropy" else score >= limit)


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum(), np.float32)
