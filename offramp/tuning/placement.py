"""Placement: which exits to keep, and their thresholds, from a trace and measured costs.

Sought is the least expected latency of one row, over all subsets of the exits and thresholds on one score per kept
exit, subject to two bounds: at most so many rows of the trace lost, and full depth at most so many times the uncut
model. What is exact over what, and why, is proven in `placement_search`; what it finds is replayed on the trace by the
policy itself before it is believed.

Costs add up. A row that passes exit k pays segment k, what exit k costs, and segment k + 1 less that; dropping the exit
saves its cost and nothing else. So full depth costs the sum of the segments less the costs of the dropped exits, and
E - 1 measured numbers price all 2^(E - 1) bundles.

The risk is empirical: thresholds that are chosen on rows do better on them than on others. So no more losses are spent
than a certificate on as many rows would allow (`PlacementOptions.max_lost`). A certificate it is not: the bundle that a
placement makes has engines of its own, and `offramp calibrate` certifies those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.errors import DataError, OptionError
from offramp.policy import Policy
from offramp.trace import Trace
from offramp.tuning import placement_search
from offramp.tuning.losses import losses_from_trace
from offramp.tuning.placement_data import Alternative, Costs, PlacedExit, Placement, PlacementOptions
from offramp.tuning.placement_search import Choice, Found, Instance, Role
from offramp.tuning.replay import replay
from offramp.tuning.thresholds import NUM_TICKS, levels_from_scores, limit_from_quota, score_columns

MAX_EXITS = 16  # before the final one; more would take 2^16 subsets and too coarse a grid
_SUBSET_CELLS = 2**16  # of the products for one subset of the table of alternatives


def place(trace: Trace, costs: Costs, options: PlacementOptions, temperatures: Sequence[float] = ()) -> Placement:
    """The exits and thresholds of least expected latency on `trace`, whose costs of its own play no part.

    `temperatures` (E,) are those of all exits; the kept ones keep theirs. Raises DataError when no row counts or the
    costs are for another model, OptionError when no choice meets the bounds.
    """
    problem = _Problem.of(trace, costs, options, tuple(temperatures))
    found = placement_search.search(problem.instance, problem.allowed)
    choices = dict(found.choices)
    for kept in _best_by_size(choices):
        _improve(problem, choices, kept, found.is_complete)
    _improve(problem, choices, problem.everything, found.is_complete)
    best = placement_search.best_of(choices, problem.allowed)
    problem.check(best)
    return _placement(problem, found, choices, best)


@dataclass(frozen=True)
class _Problem:
    """A trace, costs and options as the search wants them, and the way back."""

    trace: Trace
    costs: Costs
    options: PlacementOptions
    temperatures: tuple[float, ...]  # E, or none for 1
    edges: tuple[NDArray[np.float64], ...]  # per early exit
    instance: Instance
    num_counted: int  # rows that can be lost
    allowed: NDArray[np.bool_]  # (2^m,): subsets within the bound on the worst case

    @classmethod
    def of(cls, trace: Trace, costs: Costs, options: PlacementOptions, temperatures: tuple[float, ...]) -> _Problem:
        num_early = trace.num_exits - 1
        if len(costs.exits_ms) != num_early or num_early > MAX_EXITS:
            raise DataError(
                f"place: got costs of {len(costs.segments_ms)} segments and a trace of {trace.num_exits} exits, "
                f"expected as many, at most {MAX_EXITS + 1}"
            )
        inverse = Policy(temperatures=temperatures).inverse_temperatures(trace.num_exits)
        table = losses_from_trace(trace, options.risk, inverse)
        counted, lost = int(table.counts.sum()), table.values[:, :-1] > 0
        scores = score_columns(trace, options.score, inverse)
        roles = _roles(trace, options)
        grouped = [
            levels_from_scores(scores[:, k], options.score)
            if roles[k] != "dropped"
            else (np.zeros(len(scores), np.int64), np.zeros(1))
            for k in range(num_early)
        ]
        full_ms = sum(costs.segments_ms)
        ticks = np.rint(np.array(costs.segments_ms) / full_ms * NUM_TICKS).astype(np.int64)
        saved = np.rint(np.array(costs.exits_ms) / full_ms * NUM_TICKS).astype(np.int64)
        levels = np.array([levels for levels, _ in grouped], np.int64).reshape(num_early, len(scores)).T
        instance = Instance(levels, lost, ticks, saved, options.max_lost(counted), roles)
        return cls(
            trace,
            costs,
            options,
            temperatures,
            tuple(edges for _, edges in grouped),
            instance,
            counted,
            _allowed(costs, options, roles),
        )

    @property
    def num_early(self) -> int:
        return self.trace.num_exits - 1

    @property
    def everything(self) -> int:
        """The subset of all exits that may be kept."""
        return sum(1 << k for k, role in enumerate(self.instance.roles) if role != "dropped")

    def expected_ms(self, choice: Choice) -> float:
        return choice.cost / NUM_TICKS * sum(self.costs.segments_ms) / len(self.instance.levels)

    def thresholds(self, choice: Choice) -> tuple[float | None, ...]:
        """Of the kept early exits, in order of depth."""
        return tuple(
            limit_from_quota(self.edges[k], choice.quotas[k], self.options.score) for k in exits_of(choice.kept)
        )

    def policy(self, choice: Choice) -> Policy:
        """The policy of the bundle that has only the kept exits."""
        kept = (*exits_of(choice.kept), self.num_early)
        temperatures = tuple(self.temperatures[k] for k in kept) if self.temperatures else ()
        return Policy.thresholds(self.options.score, self.thresholds(choice), temperatures)

    def exit_index(self, kept: Sequence[int], quotas: Sequence[int]) -> NDArray[np.int64]:
        """Where every row leaves, (N,), with the early exits `kept`."""
        exit_index = np.full(len(self.instance.levels), self.num_early)
        for k in sorted(kept, reverse=True):
            exit_index[self.instance.levels[:, k] < quotas[k]] = k
        return exit_index

    def check(self, choice: Choice) -> None:
        """The policy decides as the search counted; anything else would be our own bug."""
        kept = (*exits_of(choice.kept), self.num_early)
        decided = replay(self.policy(choice), self.trace.exits(kept))
        exit_index = np.array(kept)[decided.exit_index]
        assert (exit_index == self.exit_index(kept[:-1], choice.quotas)).all(), "the policy decides otherwise"
        lost = np.pad(self.instance.lost, ((0, 0), (0, 1)))
        assert int(lost[np.arange(len(lost)), exit_index].sum()) == choice.lost, "the losses were counted otherwise"


def exits_of(kept: int) -> tuple[int, ...]:
    """The exits of a subset, in order of depth."""
    return tuple(k for k in range(kept.bit_length()) if kept >> k & 1)


def _roles(trace: Trace, options: PlacementOptions) -> tuple[Role, ...]:
    """What may become of every early exit; one without the score can only be dropped, or kept closed."""
    early = range(trace.num_exits - 1)
    if unknown := sorted(set(options.keep) - {*early, trace.num_exits - 1}):
        raise OptionError(
            f"--keep: got {unknown}, expected exits 0 to {trace.num_exits - 1}; the final one always stays"
        )
    has_score = trace.has_learned if options.score == "learned" else (True,) * trace.num_exits
    if not options.is_chosen:
        if lacking := [k for k in early if k in options.keep and not has_score[k]]:
            raise OptionError(f"--keep: exits {lacking} have no score {options.score!r}; choose another --score")
        return tuple("kept" if k in options.keep else "dropped" for k in early)
    return tuple("free" if has_score[k] else "dropped" for k in early)


def _allowed(costs: Costs, options: PlacementOptions, roles: Sequence[Role]) -> NDArray[np.bool_]:
    """Which subsets meet the bound on the worst case, (2^m,); all of them when the exits are given."""
    if not options.is_chosen:
        return np.full(2 ** len(roles), True)
    worst = np.full(2 ** len(roles), float(sum(costs.segments_ms)))
    for k, exit_ms in enumerate(costs.exits_ms):
        worst[np.arange(len(worst)) >> k & 1 == 0] -= exit_ms
    worst /= costs.uncut_ms
    if worst[0] > options.max_worst_case:
        raise OptionError(
            f"place: without any early exit, full depth takes {worst[0]:.3f} times the uncut model already, and "
            f"at most {options.max_worst_case} was asked for; measure again on a quiet machine (--measure), or raise "
            f"--max-worst-case"
        )
    return worst <= options.max_worst_case


def _best_by_size(choices: placement_search.Choices) -> list[int]:
    """The subset of the best choice with 0, 1, … exits."""
    best: dict[int, Choice] = {}
    for choice in sorted(choices.values()):
        best.setdefault(choice.kept.bit_count(), choice)
    return [choice.kept for _, choice in sorted(best.items())]


def _improve(problem: _Problem, choices: placement_search.Choices, kept: int, is_complete: bool) -> None:
    """Search the thresholds of one subset on their own, where the search over all subsets was not complete."""
    roles: tuple[Role, ...] = tuple("kept" if kept >> k & 1 else "dropped" for k in range(problem.num_early))
    if is_complete and kept in choices:
        return
    instance = dataclasses.replace(problem.instance, roles=roles)
    every = np.full(2**problem.num_early, True)
    found = placement_search.search(instance, every, _SUBSET_CELLS, _SUBSET_CELLS)
    placement_search.merge(choices, found.choices.values())


def _placement(problem: _Problem, found: Found, choices: placement_search.Choices, best: Choice) -> Placement:
    options, costs = problem.options, problem.costs
    held_out_ms, held_out_risk = _held_out(problem)
    return Placement(
        kept=(*exits_of(best.kept), problem.num_early),
        policy=problem.policy(best),
        options=options,
        costs=costs,
        num_rows=len(problem.instance.levels),
        max_lost=problem.instance.max_lost,
        lost=best.lost,
        expected_ms=problem.expected_ms(best),
        no_exits_ms=float(costs.path_ms(())[-1]),
        all_exits_ms=problem.expected_ms(choices[problem.everything]),
        worst_case=costs.worst_case(exits_of(best.kept)),
        held_out_ms=held_out_ms,
        held_out_risk=held_out_risk,
        is_complete=found.is_complete,
        combinations=found.combinations,
        exits=_waterfall(problem, choices, best),
        alternatives=tuple(_alternative(problem, choices[kept]) for kept in _best_by_size(choices)),
    )


def _held_out(problem: _Problem) -> tuple[float, float]:
    """What a choice does on rows that it was not chosen on: expected milliseconds, and the share of them lost.

    Every second row chooses for the others, and the other way round; half as many rows, half as many losses.
    """
    whole, everybody = problem.instance, np.arange(len(problem.instance.levels))
    lost = np.pad(whole.lost, ((0, 0), (0, 1)))
    total_ms, num_lost = 0.0, 0
    for others in (0, 1):
        chosen_on = everybody[everybody % 2 != others]
        share = whole.max_lost * len(chosen_on) // len(everybody)
        half = dataclasses.replace(whole, levels=whole.levels[chosen_on], lost=whole.lost[chosen_on], max_lost=share)
        found = placement_search.search(half, problem.allowed, placement_search.FINE_CELLS, _SUBSET_CELLS)
        best = placement_search.best_of(found.choices, problem.allowed)
        kept = exits_of(best.kept)
        judged = everybody[others::2]
        left_at = problem.exit_index(kept, best.quotas)[judged]
        total_ms += float(problem.costs.path_ms(kept)[left_at].sum())
        num_lost += int(lost[judged, left_at].sum())
    return total_ms / len(everybody), num_lost / problem.num_counted


def _alternative(problem: _Problem, choice: Choice) -> Alternative:
    kept = exits_of(choice.kept)
    return Alternative(
        num_kept=len(kept),
        kept=kept,
        thresholds=problem.thresholds(choice),
        expected_ms=problem.expected_ms(choice),
        worst_case=problem.costs.worst_case(kept),
        lost=choice.lost,
        is_allowed=bool(problem.allowed[choice.kept]),
    )


def _waterfall(problem: _Problem, choices: placement_search.Choices, best: Choice) -> tuple[PlacedExit, ...]:
    placed = []
    before: tuple[int, ...] = ()
    for k in range(problem.num_early):
        toggled = choices.get(best.kept ^ 1 << k)
        is_kept = bool(best.kept >> k & 1)
        if is_kept:
            placed.append(_added(problem, best, k, before, toggled))
            before = (*before, k)
        elif toggled:
            others = tuple(j for j in exits_of(toggled.kept) if j != k)
            placed.append(dataclasses.replace(_added(problem, toggled, k, others, toggled), is_kept=False))
        else:
            placed.append(PlacedExit(k, False, None, 0.0, 0.0, problem.costs.exits_ms[k], 0.0, 0.0, None))
    return tuple(placed)


def _added(problem: _Problem, choice: Choice, k: int, others: tuple[int, ...], toggled: Choice | None) -> PlacedExit:
    """What exit k does when it is added to the early exits `others`, at the thresholds of `choice`."""
    without = problem.exit_index(others, choice.quotas)
    exit_index = problem.exit_index((*others, k), choice.quotas)
    leaves = exit_index == k
    reached = without > k
    path_ms = problem.costs.path_ms(others)
    spared_ms = path_ms[without[leaves]] - path_ms[k]
    exit_ms = problem.costs.exits_ms[k]
    return PlacedExit(
        exit_index=k,
        is_kept=True,
        threshold=limit_from_quota(problem.edges[k], choice.quotas[k], problem.options.score),
        reached=float(reached.mean()),
        share=float(leaves.mean()),
        exit_ms=exit_ms,
        saves_ms=float(spared_ms.sum()) / len(reached),
        costs_ms=exit_ms * float((reached & ~leaves).mean()),
        toggled_ms=problem.expected_ms(toggled) if toggled else None,
    )
