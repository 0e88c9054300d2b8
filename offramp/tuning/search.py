"""The search behind the thresholds, in whole numbers: which rows to let leave at which exit.

It knows levels of sureness, right answers and costs; it does not know scores or policies. Everything is an
integer, so that equal is equal: a quota per exit says how many levels, from the surest on, leave there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, cycle

import numpy as np
from numpy.typing import NDArray

# Quotas tried per exit at a time, so that a pair of exits takes some arrays of 8 MiB and 512 KiB. With one
# pair to choose, more tried at once is nearer to the optimum; with many pairs, going round again is.
GRID_ONE_PAIR = 1024
GRID_MANY_PAIRS = 256
# Of 150 random traces with 3 or 4 early exits, small enough for brute force, 27 settled short of the optimum
# from one start, 1 from four, none from eight (but 1 of 2,000 still smaller ones from all starts). With 1,000
# rows and 11 early exits more starts gained at most 1.8 % of mean depth, so fewer are made as the work grows.
MAX_STARTS = 8
START_WORK = 400_000


@dataclass(frozen=True)
class Search:
    """Level 0 is the surest of an exit; a quota q lets the levels 0 … q - 1 leave there.

    The final exit has no levels and a quota of 0: what reaches it leaves.
    """

    levels: NDArray[np.int64]  # (N, E), the final column 0; in column order, for speed
    right: NDArray[np.int64]  # (N, E) in {0, 1}
    ticks: NDArray[np.int64]  # (E,) ascending: cost of leaving at each exit
    quotas: tuple[NDArray[np.int64], ...]  # per exit, ascending from 0: those worth trying
    min_right: int  # rows a choice must get right; full depth does


def search_from_levels(
    levels: NDArray[np.int64], right: NDArray[np.bool_], ticks: NDArray[np.int64], num_losses: int
) -> Search:
    """The search over levels (N, E - 1) for at most `num_losses` right answers less than full depth has.

    right (N, E), ticks (E,). Letting a level leave never costs time, and costs a right answer only by a row
    that is wrong here and right at a later exit. So the quotas worth trying are none, all levels, and those
    that stop just before a level with such a row: nothing is lost by leaving the others out.
    """
    num_exits = right.shape[1]
    quotas = []
    for k in range(num_exits - 1):
        is_risky = ~right[:, k] & right[:, k + 1 :].any(axis=1)  # (N,)
        quotas.append(np.unique(np.concatenate([[0, levels[:, k].max() + 1], levels[is_risky, k]])))
    return Search(
        levels=np.asfortranarray(np.pad(levels, ((0, 0), (0, 1)))),
        right=right.astype(np.int64),
        ticks=ticks,
        quotas=(*quotas, np.zeros(1, np.int64)),
        min_right=int(right[:, -1].sum()) - num_losses,
    )


def fastest_quotas(search: Search) -> tuple[int, ...]:
    """The quotas (E,) of least cost that get at least `min_right` rows right.

    Descends by pairs of exits from the best choices that open two exits or fewer. With up to two exits before
    the final one this is the optimum where none has more than GRID_ONE_PAIR quotas worth trying. Equal costs
    are decided by right answers, then by the smaller quotas at the earlier exits.
    """
    closed = (0,) * len(search.quotas)
    pairs = list(combinations(range(len(closed)), 2))
    starts = {_best_pair(search, closed, pair) for pair in pairs} | {closed}
    ranked = sorted(starts, key=lambda quotas: (_objective(search, quotas), quotas))
    num_starts = min(MAX_STARTS, 1 + START_WORK // (len(search.levels) * len(pairs) + 1))
    settled = {_settle(search, quotas, pairs) for quotas in ranked[:num_starts]}
    return min(
        (_strictest(search, quotas) for quotas in settled),
        key=lambda quotas: (_objective(search, quotas), quotas),
    )


def _settle(search: Search, quotas: tuple[int, ...], pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    """Improve one pair of exits after the other until no pair can be improved."""
    num_idle = 0
    for pair in cycle(pairs):  # ends: every change lowers the objective, which is a pair of integers
        better = _best_pair(search, quotas, pair)
        num_idle = num_idle + 1 if better == quotas else 0
        quotas = better
        if num_idle == len(pairs):
            break
    return quotas


def _best_pair(search: Search, quotas: tuple[int, ...], pair: tuple[int, int]) -> tuple[int, ...]:
    """The best choice that differs from `quotas`, which must be admissible, at the two exits `pair` only."""
    without = [0 if k in pair else quota for k, quota in enumerate(quotas)]
    default = _exit_index(search, tuple(without))  # (N,) where rows leave that leave at neither exit
    rows = np.arange(len(default))
    grid = GRID_ONE_PAIR if len(quotas) <= 3 else GRID_MANY_PAIRS
    tried = [_around(search.quotas[k], quotas[k], grid) for k in pair]  # (A,), (B,)
    # Bin b of a row: under the tried quotas b, b + 1, … it leaves, under 0 … b - 1 it goes on.
    bins = [np.searchsorted(q, search.levels[:, k], side="right") for q, k in zip(tried, pair, strict=True)]
    is_there = [default > k for k in pair]
    costs = search.ticks[list(pair)][:, None] - search.ticks[default]  # (2, N)
    gains = search.right[:, list(pair)].T - search.right[rows, default]  # (2, N)
    shape = (len(tried[0]), len(tried[1]))
    cost = _pair_totals(costs, bins, is_there, shape)  # (A, B)
    right = _pair_totals(gains, bins, is_there, shape) + search.right[rows, default].sum()  # (A, B)
    cost = np.where(right < search.min_right, np.inf, cost)
    best = np.unravel_index(np.where(cost > cost.min(), -1, right).argmax(), shape)
    present = tuple(int(np.searchsorted(q, quotas[k])) for q, k in zip(tried, pair, strict=True))
    if (cost[best], -right[best]) >= (cost[present], -right[present]):
        return quotas
    choice = list(quotas)
    for k, values, position in zip(pair, tried, best, strict=True):
        choice[k] = int(values[position])
    return tuple(choice)


def _pair_totals(
    values: NDArray[np.int64],
    bins: list[NDArray[np.intp]],
    is_there: list[NDArray[np.bool_]],
    shape: tuple[int, int],
) -> NDArray[np.float64]:
    """What all combinations of the tried quotas of two exits add up to, (A, B), without a loop over them.

    values (2, N): what a row adds by leaving at the first or second exit; bins and is_there: two of (N,).
    A row adds its first value where it leaves at the first exit, its second where it passes that and leaves
    at the second.
    """
    num_first, num_second = shape[0] + 1, shape[1] + 1
    first = np.bincount(bins[0][is_there[0]], values[0, is_there[0]], num_first)  # (A + 1,)
    cells = (bins[0] * num_second + bins[1])[is_there[1]]
    second = np.bincount(cells, values[1, is_there[1]], num_first * num_second)
    by_second = second.reshape(num_first, num_second)[:, :-1].cumsum(axis=1)  # (A + 1, B)
    up_to = by_second.cumsum(axis=0)  # rows that leave at the first exit instead
    totals: NDArray[np.float64] = first.cumsum()[:-1, None] + (up_to[-1] - up_to[:-1])
    return totals


def _around(quotas: NDArray[np.int64], current: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `quotas`: evenly spread ones, and all of them near the `current` one."""
    if len(quotas) <= most:
        return quotas
    spread = np.linspace(0, len(quotas) - 1, most // 2).astype(np.int64)
    middle = int(np.searchsorted(quotas, current))
    near = np.arange(max(0, middle - most // 4), min(len(quotas), middle + most // 4))
    return quotas[np.union1d(spread, near)]


def _exit_index(search: Search, quotas: tuple[int, ...]) -> NDArray[np.intp]:
    """Where every row leaves, (N,)."""
    exit_index = np.full(len(search.levels), len(quotas) - 1)
    for k in reversed(range(len(quotas) - 1)):
        exit_index[search.levels[:, k] < quotas[k]] = k
    return exit_index


def _objective(search: Search, quotas: tuple[int, ...]) -> tuple[int, int]:
    """What is minimised: total cost, then rows that are not right."""
    exit_index = _exit_index(search, quotas)
    num_right = search.right[np.arange(len(exit_index)), exit_index].sum()
    return int(search.ticks[exit_index].sum()), len(exit_index) - int(num_right)


def _strictest(search: Search, quotas: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest quotas with the same decisions: 0 where no row leaves."""
    exit_index = _exit_index(search, quotas)
    early = range(len(quotas) - 1)
    return (*(int(search.levels[exit_index == k, k].max(initial=-1)) + 1 for k in early), 0)
