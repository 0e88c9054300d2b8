"""Exact binomial tails, and what follows from them: p-values, intervals, sample sizes. Standard library only.

Losses are counted in whole numbers: `ceil(n * mean)` is wrong in floats. Tails are summed in log space from the term
nearest the mean outwards, so that nothing cancels and nothing underflows before the answer does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

from offramp.errors import OptionError

_STIRLING_SERIES_FROM = 16  # below, lgamma is exact to the last bits; above, the five terms are


def log_lower_tail(k: int, n: int, p: float) -> float:
    """log P(X <= k) for X ~ Bin(n, p), 0 < p < 1; -inf below 0. Raises OptionError."""
    k, n, p = _checked(k, n, p)
    if k < 0 or k >= n:
        return -math.inf if k < 0 else 0.0
    if k > n * p:
        return math.log1p(-math.exp(_log_sum(k + 1, n, p, 1)))
    return _log_sum(k, n, p, -1)


def log_upper_tail(k: int, n: int, p: float) -> float:
    """log P(X >= k) for X ~ Bin(n, p), 0 < p < 1; -inf above n. Raises OptionError."""
    k, n, p = _checked(k, n, p)
    if k <= 0 or k > n:
        return 0.0 if k <= 0 else -math.inf
    if k < n * p:
        return math.log1p(-math.exp(_log_sum(k - 1, n, p, -1)))
    return _log_sum(k, n, p, 1)


def p_value(k: int, n: int, risk: float) -> float:
    """P(Bin(n, risk) <= k): the exact p-value of "the risk is above `risk`" after `k` losses in `n` rows."""
    return math.exp(log_lower_tail(k, n, risk))


def upper_bound(k: int, n: int, delta: float) -> float:
    """The largest risk that `k` losses in `n` rows do not rule out at level `delta`; 1 for no rows.

    Clopper and Pearson (Biometrika 26, 1934), one side: the true risk is above it with probability at most `delta`.
    """
    k, n, delta = _checked(k, n, delta)
    if not 0 <= k <= n:
        raise OptionError(f"binomial: got {k} losses in {n} rows, expected 0 to {n}")
    if k == n:
        return 1.0
    if k == 0:
        return -math.expm1(math.log(delta) / n)
    return _bisect(lambda risk: log_lower_tail(k, n, risk) > math.log(delta), k / n, 1.0)


def lower_bound(k: int, n: int, delta: float) -> float:
    """The smallest risk that `k` losses in `n` rows do not rule out at level `delta`; 0 for no rows."""
    k, n, delta = _checked(k, n, delta)
    if not 0 <= k <= n:
        raise OptionError(f"binomial: got {k} losses in {n} rows, expected 0 to {n}")
    if k == 0:
        return 0.0
    if k == n:
        return math.exp(math.log(delta) / n)
    return _bisect(lambda risk: log_upper_tail(k, n, risk) <= math.log(delta), 0.0, k / n)


def interval(k: int, n: int, level: float) -> tuple[float, float]:
    """The Clopper–Pearson interval of a share seen `k` times in `n`; it misses with probability at most `level`.

    `level` is the probability of a miss, half of it on each side: 0.05 for an interval of 95 %.
    """
    return lower_bound(k, n, level / 2), upper_bound(k, n, level / 2)


def allowed_losses(n: int, risk: float, delta: float) -> int:
    """The most losses in `n` rows with p_value at most `delta`; -1 when even none are too many."""
    n, limit = _checked(0, n, delta)[1], math.log(delta)
    low, high = -1, n  # the p-value is at most delta at low, above it at high
    if n == 0 or log_lower_tail(0, n, risk) > limit:
        return -1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if log_lower_tail(middle, n, risk) <= limit else (low, middle)
    return low


def rows_needed(risk: float, delta: float, losses: int = 0) -> int:
    """The fewest rows at which `losses` of them are few enough: p_value(losses, rows, risk) <= delta."""
    losses, _, risk = _checked(losses, 0, risk)
    limit = math.log(_checked(0, 0, delta)[2])
    low, high = losses, losses + 1  # too few at low
    while log_lower_tail(losses, high, risk) > limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if log_lower_tail(losses, middle, risk) <= limit else (middle, high)
    return high


def _checked(k: int, n: int, p: float) -> tuple[int, int, float]:
    try:
        k, n = operator.index(k), operator.index(n)
    except TypeError:
        raise OptionError(f"binomial: got counts {k!r} of {n!r}, expected whole numbers") from None
    if n < 0 or not 0 < p < 1:
        raise OptionError(f"binomial: got {n} rows and a probability of {p}, expected n >= 0 and 0 < p < 1")
    return k, n, float(p)


def _log_sum(k: int, n: int, p: float, step: int) -> float:
    """log of the probabilities of k, k + step, … to the end, which must lead away from the mean."""
    odds = p / (1 - p) if step > 0 else (1 - p) / p
    term = total = 1.0
    i = k
    while 0 <= i + step <= n:
        term *= odds * ((n - i) / (i + 1) if step > 0 else i / (n - i + 1))
        total += term
        i += step
        if term < 1e-18 * total:  # the ratios only fall from here on
            break
    return _log_probability(k, n, p) + math.log(total)


def _log_probability(k: int, n: int, p: float) -> float:
    """log P(X = k). Saddle point of Loader (2000), "Fast and accurate computation of binomial probabilities".

    Plain lgamma loses all but nine digits at a million rows, where the terms are 10^7 and their sum is near 1.
    """
    if k == 0:
        return n * math.log1p(-p)
    if k == n:
        return n * math.log(p)
    corrections = _stirling_error(n) - _stirling_error(k) - _stirling_error(n - k)
    deviances = _deviance(k, n * p) + _deviance(n - k, n * (1 - p))
    return corrections - deviances + 0.5 * (math.log(n) - math.log(2 * math.pi) - math.log(k) - math.log(n - k))


def _stirling_error(n: int) -> float:
    """log n! minus Stirling's formula."""
    if n < _STIRLING_SERIES_FROM:
        return math.lgamma(n + 1) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2 * math.pi)
    square = n * n
    return (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / 1188 / square) / square) / square) / square) / n


def _deviance(x: float, mean: float) -> float:
    """x log(x / mean) + mean - x, without cancellation where they are close."""
    if abs(x - mean) >= 0.1 * (x + mean):
        return x * math.log(x / mean) + mean - x
    ratio = (x - mean) / (x + mean)
    total, power, j = (x - mean) * ratio, 2 * x * ratio, 1
    while True:
        power *= ratio * ratio
        j += 2
        following = total + power / j
        if following == total:
            return total
        total = following


def _bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """Where `is_below` turns from true to false between `low` and `high`, to the last bits."""
    while high - low > 4e-16 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2
