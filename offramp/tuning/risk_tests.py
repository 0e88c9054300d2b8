"""Tests of "the risk is above what is allowed": p-values, upper bounds, and the sequence they are used in.

Each p-value is at most u with probability at most u when the risk is above, for independent rows. Losses of 0 and 1 are
counted and tested exactly (`offramp.binomial`); others, at most 1, by betting. Hoeffding and Bentkus are here to be
compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from offramp.binomial import log_lower_tail
from offramp.errors import OptionError

Array = NDArray[np.float64]
_BISECTIONS = 60


def last_rejected(p_values: Iterable[float], delta: float) -> int:
    """The last hypothesis that fixed-sequence testing at level `delta` rejects; -1: none.

    Hypotheses are tested in order until the first that is not rejected: that one is not certified, the one before is,
    and no p-value after it is asked for. The probability of a false rejection is at most delta, whatever the number
    of hypotheses and whether or not their risks ascend (LTT, Angelopoulos et al., arXiv 2110.01052, section 2.3).
    """
    return sum(1 for _ in takewhile(lambda p: p <= delta, p_values)) - 1


def last_rejected_of(is_rejected: NDArray[np.bool_]) -> NDArray[np.intp]:
    """`last_rejected` for many sequences at once, over the last axis of `is_rejected` (…, J)."""
    stopped = np.concatenate([~is_rejected, np.ones((*is_rejected.shape[:-1], 1), np.bool_)], axis=-1)
    first_kept: NDArray[np.intp] = stopped.argmax(axis=-1)
    return first_kept - 1


def hoeffding_bentkus(k: int, n: int, risk: float) -> float:
    """The p-value of Hoeffding and Bentkus for `k` losses in `n` rows (LTT, arXiv 2110.01052, proposition 4).

    Valid for bounded losses, and never smaller than the exact one for losses of 0 and 1.
    """
    if n == 0:
        return 1.0
    share = min(k / n, risk)
    divergence = (share * math.log(share / risk) if share else 0.0) + (1 - share) * math.log((1 - share) / (1 - risk))
    return min(1.0, math.exp(-n * divergence), math.exp(min(0.0, 1 + log_lower_tail(k, n, risk))))


def betting_p_value(losses: Array, risk: float, delta: float) -> Array:
    """The p-value of Waudby-Smith and Ramdas for losses (…, n) of at most 1 whose order was drawn beforehand; (…,).

    One over the largest wealth of a gambler who bets on small losses: arXiv 2010.09686, as used by Bates et al., arXiv
    2101.02703, theorem 4. `delta` is the level it will be compared with, for which the bets are chosen.
    """
    return np.exp(-_largest_log_wealth(losses, _bets(losses, delta), risk))


def betting_upper_bound(losses: Array, delta: float) -> float:
    """The largest risk in [0, 1] that losses (n,) of at most 1 do not rule out by betting at level `delta`."""
    bets, limit = _bets(losses, delta), math.log(1 / delta)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _largest_log_wealth(losses, bets, middle) > limit else (middle, high)
    return high


def _bets(losses: Array, delta: float) -> Array:
    """How much is bet on each loss (…, n), from those before it alone; in [0, 1]."""
    if losses.size and losses.max() > 1:
        raise OptionError(f"betting: got a loss of {losses.max()}, expected at most 1")
    n = losses.shape[-1]
    counts = np.arange(2, n + 2)
    means = (0.5 + losses.cumsum(axis=-1)) / counts
    variances = (0.25 + ((losses - means) ** 2).cumsum(axis=-1)) / counts
    before = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), variances[..., :-1]], axis=-1)
    bets: Array = np.sqrt(2 * math.log(1 / delta) / (max(n, 1) * before)).clip(max=1)
    return bets


def _largest_log_wealth(losses: Array, bets: Array, risk: float) -> Array:
    """log of the most the gambler ever had, at least log 1; (…,)."""
    if losses.shape[-1] == 0:
        return np.zeros(losses.shape[:-1])
    with np.errstate(divide="ignore"):  # a bet of everything on a loss below 1 may be lost
        wealth = np.log1p(-bets * (losses - risk)).cumsum(axis=-1)
    largest: Array = wealth.max(axis=-1).clip(min=0)
    return largest
