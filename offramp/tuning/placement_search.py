"""The search behind a placement, in whole numbers: which exits to keep, and which rows leave at each of them.

It knows levels of sureness, losses and costs; it does not know scores, policies or milliseconds. As in `search`, a
quota q lets the levels 0 … q - 1 of an exit leave there, level 0 being the surest.

The model. A row that goes on from exit k to segment k + 1 pays `ticks[k + 1]`, or `ticks[k + 1] - saved[k]` when exit
k is dropped, because then there is no head, no decision and no hand-over between the two segments. A row loses when it
leaves at an exit where it is marked so; who reaches the end loses nothing. Sought: for every subset of the exits the
quotas of least total cost among those with at most `max_lost` losses.

Why enumeration is enough, and what it is exact over:

1. Quotas. Raise a quota of a kept exit up to the next level with a marked row: the rows that now leave here lose
   nothing by it and pay for no later segment, and the others notice nothing. So neither cost nor losses rise, and for
   every subset an optimum has quotas that stop just before a marked row, or let everybody leave: `candidates`. A
   kept exit with quota 0 is a dropped one that costs `saved` more; only exits that must be kept have that option.
2. Unavoidable losses. A marked row within a quota loses unless it left before. One that no candidate of an earlier
   exit lets go loses for certain; candidates with more than `max_lost` such rows are in no admissible choice.
3. Totals. Let T(q_0 … q_k) count the rows that survive exits 0 … k, i.e. whose level is at least q_i at each of them;
   dropped exits count as quota 0. Cost = N ticks[0] + Σ_k T(q_0 … q_k) (ticks[k + 1] - [k dropped] saved[k]), and the
   losses at exit k are U_k(q_0 … q_{k-1}, 0) - U_k(q_0 … q_k), where U_k counts the marked rows of exit k alone. All
   values of T and U_k over a grid of quotas are suffix sums, axis by axis, of one histogram: work proportional to the
   number of combinations and not to their product with the rows.

So `best_choices` returns the optimum of every subset over the product of the quotas it is given, all subsets included
(by 3), and with all candidates the optimum over all quotas whatsoever (by 1 and 2). Costs are integers: ties are ties.
Where all candidates are too many, `search` takes a coarse product first and then, around the best choices found, finer
ones, every exit free to move, to be dropped or to come back in each: the last of them says that nothing is gained by
moving any number of exits by one candidate at once. That is the optimum over each of these products, and over all
quotas no more than a good choice: from other starts up to 2 % less was found on random instances with 11 exits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MAX_CELLS = 2**26  # combinations of one product; 10 to 20 ns each. 11 exits get 5 options each
FINE_CELLS = 2**22  # of the products around a choice: some ten of them are searched
_STARTS = 2  # choices that are looked at closely
_BLOCK_CELLS = 2**17  # of one table, so that it stays in the caches
_COARSEST = 50.0  # the largest candidate of a coarse grid ÷ the smallest: losses are shared by a dozen exits
_MAX_ROUNDS = 16
_FINEST = 1.02  # from this factor on, neighbours are one candidate away
_ACCUMULATED = 32  # options of an exit from which numpy's accumulate is faster than adding slices

Grid = tuple[NDArray[np.int64], ...]  # per exit the quotas to try, ascending from 0
Role = Literal["free", "kept", "dropped"]  # of an exit: may the search decide?


@dataclass(frozen=True)
class Instance:
    """N rows, m exits before the final one, m + 1 segments."""

    levels: NDArray[np.int64]  # (N, m)
    lost: NDArray[np.bool_]  # (N, m): a row that leaves here loses
    ticks: NDArray[np.int64]  # (m + 1,) per segment
    saved: NDArray[np.int64]  # (m,) per row that passes, when the exit is dropped
    max_lost: int
    roles: tuple[Role, ...]  # m


@dataclass(frozen=True, order=True)
class Choice:
    """The best one first: least cost, then fewest losses, the smallest quotas, and no exit kept that is closed."""

    cost: int
    lost: int
    quotas: tuple[int, ...]  # m; 0 where the exit is dropped
    kept: int  # bit k: exit k is kept


Choices = dict[int, Choice]  # the best one of every subset, by `Choice.kept`


@dataclass(frozen=True)
class Found:
    """What a search came to; complete: over all quotas of all subsets it looked at."""

    choices: Choices
    is_complete: bool
    combinations: int  # of the first product


def search(
    instance: Instance, allowed: NDArray[np.bool_], max_cells: int = MAX_CELLS, fine_cells: int = FINE_CELLS
) -> Found:
    """The best choices, those whose subset is `allowed` (2^m,) looked at closely; at least one is."""
    every = candidates(instance)
    grid = coarse_grid(every, max_cells)
    choices = best_choices(instance, grid)
    combinations = math.prod(len(quotas) for quotas in grid)
    if combinations == math.prod(len(quotas) for quotas in every):
        return Found(choices, True, combinations)
    starts = sorted(choice for kept, choice in choices.items() if allowed[kept])[:_STARTS]
    for start in starts:
        _look_closely(instance, every, start, allowed, choices, fine_cells)
    return Found(choices, False, combinations)


def _look_closely(
    instance: Instance, every: Grid, best: Choice, allowed: NDArray[np.bool_], choices: Choices, max_cells: int
) -> None:
    """Search finer and finer products around the best choice so far, beginning with `best`; fills `choices`."""
    num_near = _options_per_exit(every, max_cells) - 1
    factor = _COARSEST ** (1 / max(num_near, 2))
    for _ in range(_MAX_ROUNDS):
        near = tuple(_near(quotas, quota, factor, num_near) for quotas, quota in zip(every, best.quotas, strict=True))
        found = best_choices(instance, near)
        merge(choices, found.values())
        before, best = best, min(best, best_of(found, allowed))
        if best == before and factor == 1:
            return
        factor = math.sqrt(factor) if factor > _FINEST else 1.0


def best_of(choices: Choices, allowed: NDArray[np.bool_]) -> Choice:
    """The best choice whose subset is `allowed` (2^m,)."""
    return min(choice for kept, choice in choices.items() if allowed[kept])


def merge(choices: Choices, more: Iterable[Choice]) -> None:
    """Take over from `more` what is better."""
    for choice in more:
        if choice.kept not in choices or choice < choices[choice.kept]:
            choices[choice.kept] = choice


def candidates(instance: Instance) -> Grid:
    """Per exit the quotas that an optimum may have (points 1 and 2 above), ascending from 0."""
    found = []
    may_have_left = np.zeros(len(instance.levels), np.bool_)
    for levels, lost, role in zip(instance.levels.T, instance.lost.T, instance.roles, strict=True):
        if role == "dropped":
            found.append(np.zeros(1, np.int64))
            continue
        quotas = np.unique(np.concatenate([[0], levels[lost], [levels.max(initial=-1) + 1]]))
        certain = np.sort(levels[lost & ~may_have_left])  # levels of the rows that lose if they are within the quota
        quotas = quotas[np.searchsorted(certain, quotas) <= instance.max_lost]
        may_have_left |= levels < quotas[-1]
        found.append(quotas.astype(np.int64))
    return tuple(found)


def coarse_grid(every: Grid, max_cells: int) -> Grid:
    """At most `max_cells` combinations of the candidates, spread so that they grow by equal factors."""
    num_options = _options_per_exit(every, max_cells)
    return tuple(
        quotas if len(quotas) <= num_options else quotas[_spread(len(quotas), num_options)] for quotas in every
    )


def best_choices(instance: Instance, grid: Grid) -> Choices:
    """The best choice of every subset over the product of the quotas in `grid`, of those within `max_lost`."""
    table = _Table(instance, grid)
    _visit(table, _Prefix((), np.arange(len(instance.levels)), len(instance.levels) * int(instance.ticks[0]), 0, 0))
    return {
        int(kept): Choice(
            int(table.cost[kept]),
            int(table.losses[kept]),
            tuple(int(quotas[option]) for quotas, option in zip(grid, table.options(int(kept)), strict=True)),
            int(kept),
        )
        for kept in np.flatnonzero(table.cell >= 0)
    }


@dataclass(frozen=True)
class _Prefix:
    """What was decided for the first exits, and what that came to."""

    options: tuple[int, ...]
    rows: NDArray[np.int64]  # who is still there
    cost: int
    lost: int
    kept: int


class _Table:
    """A grid, ready for counting, and the best cell of every subset so far."""

    def __init__(self, instance: Instance, grid: Grid) -> None:
        self.instance, self.shape = instance, tuple(len(quotas) for quotas in grid)
        # A row survives the options 0 … bin of an exit and leaves under the others.
        self.bins = (
            np.stack([np.searchsorted(q, c, "right") - 1 for q, c in zip(grid, instance.levels.T, strict=True)], axis=1)
            if grid
            else np.empty((len(instance.levels), 0), np.int64)
        )
        num = len(grid)
        self.is_kept = [
            (np.arange(size) > 0) | (role == "kept") for size, role in zip(self.shape, instance.roles, strict=True)
        ]
        # What every row that survives an option pays for the next segment.
        self.prices = [instance.ticks[k + 1] - np.where(self.is_kept[k], 0, instance.saved[k]) for k in range(num)]
        self.split = next(k for k in range(num + 1) if math.prod(self.shape[k:]) <= _BLOCK_CELLS)
        masks: NDArray[np.int64] = np.zeros((), np.int64)  # of the exits from `split` on
        for k in range(self.split, num):
            masks = masks[..., None] | (self.is_kept[k].astype(np.int64) << k)
        self.masks = masks.ravel()
        self.cost = np.full(2**num, np.iinfo(np.int64).max)
        self.losses = np.zeros(2**num, np.int64)
        self.cell = np.full(2**num, -1)  # in the whole product, row-major

    def options(self, kept: int) -> tuple[int, ...]:
        """The option of every exit in the best cell of a subset."""
        return tuple(int(option) for option in np.unravel_index(self.cell[kept], self.shape)) if self.shape else ()

    def offer(
        self, kept: NDArray[np.int64], cost: NDArray[np.int64], lost: NDArray[np.int64], cell: NDArray[np.int64]
    ) -> None:
        """Keep what is better than before; cells come in ascending order, so the first of equals stays."""
        better = np.flatnonzero((cost < self.cost[kept]) | ((cost == self.cost[kept]) & (lost < self.losses[kept])))
        order = better[np.lexsort((cell[better], lost[better], cost[better], kept[better]))]
        subsets, first = np.unique(kept[order], return_index=True)
        chosen = order[first]
        self.cost[subsets], self.losses[subsets], self.cell[subsets] = cost[chosen], lost[chosen], cell[chosen]


def _visit(table: _Table, prefix: _Prefix) -> None:
    """Try all options of the next exit, one after the other, then those of all the others in one table."""
    k = len(prefix.options)
    if k == table.split:
        _visit_block(table, prefix)
        return
    bins, lost = table.bins[prefix.rows, k], table.instance.lost[prefix.rows, k]
    for option in range(table.shape[k]):
        survives = bins >= option
        losses = prefix.lost + int(np.count_nonzero(lost & ~survives))
        if losses > table.instance.max_lost:  # and more with every larger quota
            return
        rows = prefix.rows[survives]
        _visit(
            table,
            _Prefix(
                (*prefix.options, option),
                rows,
                prefix.cost + len(rows) * int(table.prices[k][option]),
                losses,
                prefix.kept | (int(table.is_kept[k][option]) << k),
            ),
        )


def _visit_block(table: _Table, prefix: _Prefix) -> None:
    """All options of the exits from `split` on, by suffix sums (point 3 above)."""
    shape = table.shape[table.split :]
    position = np.zeros(len(prefix.rows), np.int64)  # of each row in the table of the exits so far
    cost, lost = np.array(prefix.cost, np.int64), np.array(prefix.lost, np.int32)
    tables = []
    for k, size in enumerate(shape, start=table.split):
        position = position * size + table.bins[prefix.rows, k]
        marked = table.instance.lost[prefix.rows, k]
        tables.append(_suffix_sums(position[marked], shape[: k - table.split + 1]))
    survivors = _suffix_sums(position, shape)  # over all axes; 0 is the option that everybody survives
    for k, risky in enumerate(tables[:-1], start=table.split):
        there = survivors.reshape(*risky.shape, -1)[..., 0]
        cost = cost[..., None] + there * table.prices[k]
        lost = lost[..., None] + (risky[..., :1] - risky)
    if not shape:
        table.offer(np.array([prefix.kept]), cost[None], lost.astype(np.int64)[None], np.zeros(1, np.int64))
        return
    lost = (lost[..., None] + (tables[-1][..., :1] - tables[-1])).ravel()
    cells = np.flatnonzero(lost <= table.instance.max_lost)
    before, option = np.divmod(cells, shape[-1])
    total = cost.ravel()[before] + survivors.ravel()[cells] * table.prices[-1][option]
    offset = 0
    for size, chosen in zip(table.shape, (*prefix.options, *(0,) * len(shape)), strict=True):
        offset = offset * size + chosen
    table.offer(prefix.kept | table.masks[cells], total, lost[cells].astype(np.int64), cells + offset)


def _suffix_sums(position: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int32]:
    """How many of `position` (S,), row-major places in a table of `shape`, are at or after each place on all axes."""
    counts = np.bincount(position, minlength=math.prod(shape)).astype(np.int32).reshape(shape)
    for axis, size in enumerate(shape):
        turned = np.moveaxis(counts, axis, 0)
        if size > _ACCUMULATED:
            np.cumsum(turned[::-1], axis=0, out=turned[::-1])
        else:
            for option in range(size - 2, -1, -1):
                turned[option] += turned[option + 1]
    return counts


def _options_per_exit(every: Grid, max_cells: int) -> int:
    """The most options per exit, at least 2, with at most `max_cells` combinations."""
    options = max(len(quotas) for quotas in every) if every else 2
    while options > 2 and math.prod(min(len(quotas), options) for quotas in every) > max_cells:
        options = max(2, min(options - 1, int(options * 0.98)))
    return options


def _spread(length: int, number: int) -> NDArray[np.int64]:
    """`number` positions below `length`: 0, and the others apart by equal factors up to the last."""
    steps = np.linspace(1, 0, number - 1) if number > 2 else np.zeros(1)
    positions: NDArray[np.int64] = np.rint((length - 1) * min(_COARSEST, float(length - 1)) ** -steps).astype(np.int64)
    spread: NDArray[np.int64] = np.union1d([0], positions)
    return spread


def _near(quotas: NDArray[np.int64], quota: int, factor: float, number: int) -> NDArray[np.int64]:
    """`quota`, some candidates about `factor` and its powers away on both sides, at least one step, and none."""
    middle = int(np.searchsorted(quotas, quota))
    if middle == 0:
        return quotas[_spread(len(quotas), min(len(quotas), number + 1))]
    steps = range(-(number // 2), number - number // 2)
    places = [round(middle * factor**step) for step in steps]
    places = [
        min(place, middle + step) if step < 0 else max(place, middle + step)
        for place, step in zip(places, steps, strict=True)
    ]
    near: NDArray[np.int64] = quotas[np.unique(np.clip([0, *places], 0, len(quotas) - 1))]
    return near
