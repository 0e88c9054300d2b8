"""The search behind a placement: every subset's optimum by brute force, and what an incomplete search keeps of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from offramp.tuning import placement_search
from offramp.tuning.placement_search import Choice, Instance, best_choices, best_of, candidates, coarse_grid, search


def random_instance(seed: int, num_rows: int, num_early: int, max_lost: int, roles=None) -> Instance:
    """Rows that are hard at one exit tend to be hard, and lost, at the others; many rows share a level."""
    random = np.random.default_rng(seed)
    hard = random.normal(size=(num_rows, 1))
    levels = np.rint(2 * (hard + random.normal(size=(num_rows, num_early)))).astype(np.int64)
    chance = 0.6 / (1 + np.exp(-2 * hard)) * np.linspace(1, 0.3, num_early)
    return Instance(
        levels=levels - levels.min(0, initial=0),
        lost=random.random((num_rows, num_early)) < chance,
        ticks=random.integers(50, 150, num_early + 1),
        saved=random.integers(0, 50, num_early),
        max_lost=max_lost,
        roles=roles or ("free",) * num_early,
    )


def by_brute_force(instance: Instance) -> dict[int, tuple[int, int]]:
    """(cost, losses) of the best quotas of every subset, row by row; who is kept freely lets somebody leave."""
    num_early = len(instance.roles)
    best: dict[int, tuple[int, int]] = {}
    ways = []
    for k, role in enumerate(instance.roles):
        top = int(instance.levels[:, k].max(initial=-1)) + 2
        dropped = [] if role == "kept" else [None]
        ways.append(dropped + ([] if role == "dropped" else list(range(role == "free", top))))
    for quotas in itertools.product(*ways):
        cost = lost = 0
        for levels, marked in zip(instance.levels, instance.lost, strict=True):
            cost += int(instance.ticks[0])
            for k in range(num_early):
                if quotas[k] is not None and levels[k] < quotas[k]:
                    lost += int(marked[k])
                    break
                cost += int(instance.ticks[k + 1]) - (int(instance.saved[k]) if quotas[k] is None else 0)
        kept = sum(1 << k for k in range(num_early) if quotas[k] is not None)
        if lost <= instance.max_lost:
            best[kept] = min(best.get(kept, (cost, lost)), (cost, lost))
    return best


def everything(instance: Instance) -> np.ndarray:
    return np.full(2 ** len(instance.roles), True)


@pytest.mark.parametrize("seed", range(40))
def test_every_subset_gets_its_optimum(seed: int, monkeypatch) -> None:
    random = np.random.default_rng(seed)
    num_early = int(random.integers(0, 4))
    roles = tuple(random.choice(["free", "free", "kept", "dropped"], num_early).tolist())
    instance = random_instance(seed, int(random.integers(0, 12)), num_early, int(random.integers(0, 3)), roles)
    if seed % 2:
        monkeypatch.setattr(placement_search, "_BLOCK_CELLS", 5)  # most exits are tried one option after the other
    found = search(instance, everything(instance))
    assert found.is_complete
    assert {kept: (choice.cost, choice.lost) for kept, choice in found.choices.items()} == by_brute_force(instance)


def test_a_coarse_product_is_searched_exactly_and_closer_looks_only_improve() -> None:
    instance = random_instance(5, 4000, 6, 25)
    instance = replace(instance, levels=np.argsort(np.argsort(instance.levels, axis=0), axis=0))
    grid = coarse_grid(candidates(instance), 4**6)
    assert max(map(len, grid)) == 4
    coarse = best_choices(instance, grid)
    found = search(instance, everything(instance), 4**6, 4**6)
    assert not found.is_complete
    assert found.combinations == 4**6
    assert all(found.choices[kept] <= choice for kept, choice in coarse.items())
    best = best_of(found.choices, everything(instance))
    assert best.cost < best_of(coarse, everything(instance)).cost
    for quotas in itertools.islice(itertools.product(*grid), 0, None, 7):  # the coarse optimum, by counting
        choice = counted(instance, quotas)
        assert choice.lost > instance.max_lost or coarse[choice.kept] <= choice
    assert counted(instance, best.quotas) == best


def counted(instance: Instance, quotas: tuple[int, ...]) -> Choice:
    there = np.full(len(instance.levels), True)
    cost, lost, kept = len(there) * int(instance.ticks[0]), 0, 0
    for k, quota in enumerate(quotas):
        leaves = there & (instance.levels[:, k] < quota)
        lost += int((leaves & instance.lost[:, k]).sum())
        there = there & ~leaves
        kept |= (quota > 0) << k
        cost += int(there.sum()) * int(instance.ticks[k + 1] - (0 if quota else instance.saved[k]))
    return Choice(cost, lost, tuple(map(int, quotas)), kept)


def test_an_allowed_subset_is_chosen_where_the_best_is_not() -> None:
    instance = replace(random_instance(3, 300, 3, 10), saved=np.zeros(3, np.int64))
    allowed = np.array([kept.bit_count() <= 1 for kept in range(8)])
    found = search(instance, allowed)
    assert best_of(found.choices, allowed).kept.bit_count() <= 1
    assert best_of(found.choices, everything(instance)) < best_of(found.choices, allowed)


def test_without_rows_or_early_exits_there_is_nothing_to_choose() -> None:
    for num_rows, num_early in ((0, 3), (5, 0)):
        instance = random_instance(0, num_rows, num_early, 0)
        best = best_of(search(instance, everything(instance)).choices, everything(instance))
        assert (best.cost, best.lost) == by_brute_force(instance)[best.kept]
