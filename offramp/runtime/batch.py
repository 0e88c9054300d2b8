"""One batch of a pool: from groups of rows to an engine call, and from what it said to answers and survivors.

Pure but for the parts it adds to answers; the pool locks, runs the engine and tells who is answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import InputSpec
from offramp.policy import FINAL, joined, score_values
from offramp.runtime.answer import Answer
from offramp.runtime.engine import Engine, SegmentOutput
from offramp.runtime.monitor_watch import held, note_retention
from offramp.runtime.runner import Part, Result, result_from_parts
from offramp.runtime.waiting import Group, Lane


class Leaving:
    """L rows of one policy that left an exit together."""

    __slots__ = ("exit_index", "out", "owners", "positions", "reason")

    def __init__(
        self, out: SegmentOutput, owners: list[Answer], positions: list[int], exit_index: int, reason: str
    ) -> None:
        self.out = out  # of these rows
        self.owners = owners  # L
        self.positions = positions  # L, each in its owner's request
        self.exit_index = exit_index
        self.reason = reason

    def add_parts(self) -> None:
        """Give requests of several rows what was said about those that are here."""
        if self.out.retention is not None:
            note_retention([owner.watch for owner in self.owners], self.out.retention)
        first = 0
        for owner, run in groupby(self.owners) if any([owner.num_rows > 1 for owner in self.owners]) else ():
            end = first + len(list(run))
            if owner.num_rows > 1:
                owner.add(self.part(first, end))
            first = end

    def part(self, first: int, end: int) -> Part:
        """A run of rows as a part of its request, in its order."""
        out, positions = self.out.rows(slice(first, end)), np.array(self.positions[first:end])
        order = positions.argsort()
        if (order[1:] < order[:-1]).any():  # halves of a request that overtook one another
            out, positions = out.rows(order), positions[order]
        return Part(positions, out, self.exit_index, self.reason)

    def results(self) -> list[Result]:
        """One per row, each the whole answer of a request of one row."""
        out, reason = self.out, self.reason
        score = score_values(self.owners[0].policy.score, out)  # (L,)
        exit_index = np.full(len(self.owners), self.exit_index)
        views = (array[:, None] for array in (out.logits, out.prediction, exit_index, score))  # (L, 1, …)
        return [
            Result({"logits": logits}, prediction, exit_, score_, [reason])
            for logits, prediction, exit_, score_ in zip(*views, strict=True)
        ]


def by_policy(groups: list[Group]) -> list[Group]:
    """The same groups, those of one policy beside each other."""
    if len(groups) > 1 and any(group.policy is not groups[0].policy for group in groups):
        return sorted(groups, key=lambda group: id(group.policy))
    return groups


def merged_inputs(groups: Sequence[Group], lane: Lane, specs: Sequence[InputSpec]) -> dict[str, NDArray[Any]]:
    """The inputs of all rows of `groups`, one after another, each padded at its end to the shape of its lane."""
    merged = {}
    for spec in specs:
        parts = [_rows_of(group, spec.name) for group in groups]
        shape = lane.row_shapes[spec.name]
        if lane.is_padded and any(part.shape[1:] != shape for part in parts):
            merged[spec.name] = _padded(parts, shape, max(spec.minimum or 0, 0))
        else:
            merged[spec.name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return merged


def gathered(engine: Engine, groups: Sequence[Group]) -> tuple[Any, NDArray[np.int64]]:
    """One carry and the positions (S,) in it of all rows of `groups`; copies rows only where carries differ."""
    carry = groups[0].carry
    if len(groups) == 1:
        return carry, groups[0].rows
    if all(group.carry is carry for group in groups):
        return carry, np.concatenate([group.rows for group in groups])
    total = sum(len(group.owners) for group in groups)
    return engine.merged([(group.carry, group.rows) for group in groups]), np.arange(total)


def decided(
    exit_index: int, is_final: bool, groups: list[Group], out: SegmentOutput, now_ms: float
) -> tuple[list[Group], list[Leaving]]:
    """Who goes on and who leaves, of the rows that `out` is about: those of `groups`, by policy, one after another."""
    survivors: list[Group] = []
    leaving: list[Leaving] = []
    end = 0
    for cohort in _cohorts(groups):
        owners = [owner for group in cohort for owner in group.owners]
        positions = [position for group in cohort for position in group.positions]
        start, end = end, end + len(owners)
        said = out if cohort is groups else out.rows(slice(start, end))
        if is_final:
            leaving.append(Leaving(said, owners, positions, exit_index, FINAL))
            continue
        state = joined([group.state for group in cohort])
        leaves, reason, state = owners[0].policy.decide(exit_index, said, state)
        watches = [owner.watch for owner in owners]
        if any(watches):
            leaves = held(exit_index, watches, positions, said, leaves)
        left = leaves.tolist()
        if False not in left:
            leaving.append(Leaving(said, owners, positions, exit_index, reason))
        elif True not in left:
            survivors.append(Group(out.carry, np.arange(start, end), owners, positions, state, now_ms))
        else:
            gone, stay = leaves.nonzero()[0], (~leaves).nonzero()[0]
            theirs = _taken(owners, positions, gone)
            leaving.append(Leaving(said.rows(gone), *theirs, exit_index, reason))
            state = state.rows(stay) if state else None
            survivors.append(Group(out.carry, stay + start, *_taken(owners, positions, stay), state, now_ms))
    return survivors, leaving


def _cohorts(groups: list[Group]) -> list[list[Group]]:
    """The groups by policy; `groups` itself where all have the same."""
    if len(groups) == 1 or all(group.policy is groups[0].policy for group in groups):
        return [groups]
    return [list(cohort) for _, cohort in groupby(groups, key=lambda group: id(group.policy))]


def _taken(owners: list[Answer], positions: list[int], rows: NDArray[np.int64]) -> tuple[list[Answer], list[int]]:
    where = rows.tolist()
    return [owners[row] for row in where], [positions[row] for row in where]


def whole_result(answer: Answer, num_classes: int) -> Result:
    """The answer to a request of several rows, all parts of which are there."""
    return result_from_parts(answer.parts, answer.num_rows, num_classes, answer.policy.score)


def _rows_of(group: Group, name: str) -> NDArray[Any]:
    array: NDArray[Any] = group.carry[name]
    return array if len(array) == len(group.rows) else array[group.rows]


def _padded(parts: list[NDArray[Any]], shape: tuple[int, ...], value: int) -> NDArray[Any]:
    whole = np.full((sum(map(len, parts)), *shape), value, parts[0].dtype)
    start = 0
    for part in parts:
        end = start + len(part)
        whole[(slice(start, end), *map(slice, part.shape[1:]))] = part
        start = end
    return whole
