"""One batch of a pool: from groups of rows to an engine call, and from what it said to answers and survivors.

Pure but for the parts it adds to answers; the pool locks, runs the engine and tells who is answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import InputSpec
from offramp.policy import FINAL, joined, score_values
from offramp.runtime.answer import Answer
from offramp.runtime.engine import Engine, SegmentOutput
from offramp.runtime.runner import Part, Result, result_from_parts
from offramp.runtime.waiting import Group


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

    def runs(self) -> list[tuple[Answer, int, int]]:
        """(owner, first, end): neighbouring rows of one request."""
        runs = []
        first, num_rows = 0, len(self.owners)
        while first < num_rows:
            owner, end = self.owners[first], first + 1
            while end < num_rows and self.owners[end] is owner:
                end += 1
            runs.append((owner, first, end))
            first = end
        return runs

    def part(self, first: int, end: int) -> Part:
        """A run of rows as a part of its request, in its order."""
        out, positions = self.out.rows(slice(first, end)), np.array(self.positions[first:end])
        order = positions.argsort()
        if (order[1:] < order[:-1]).any():  # halves of a request that overtook one another
            out, positions = out.rows(order), positions[order]
        return Part(positions, out, self.exit_index, self.reason)

    def results(self, rows: Sequence[int]) -> list[Result]:
        """One per row at `rows`, each the whole answer of a request of one row."""
        out = self.out
        score = score_values(self.owners[0].policy.score, out)  # (L,)
        exit_index = np.full(len(self.owners), self.exit_index)
        results = []
        for row in rows:
            one = slice(row, row + 1)
            logits = {"logits": out.logits[one]}
            results.append(Result(logits, out.prediction[one], exit_index[one], score[one], [self.reason]))
        return results


def by_policy(groups: list[Group]) -> list[Group]:
    """The same groups, those of one policy beside each other."""
    if len({id(group.policy) for group in groups}) > 1:
        return sorted(groups, key=lambda group: id(group.policy))
    return groups


def merged_inputs(
    groups: Sequence[Group], row_shapes: Mapping[str, tuple[int, ...]], specs: Sequence[InputSpec]
) -> dict[str, NDArray[Any]]:
    """The inputs of all rows of `groups`, one after another, each padded at its end to the shape of its lane."""
    total = sum(len(group.owners) for group in groups)
    merged = {}
    for spec in specs:
        parts = [_rows_of(group, spec.name) for group in groups]
        shape = row_shapes[spec.name]
        if all(part.shape[1:] == shape for part in parts):
            merged[spec.name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
            continue
        whole = np.full((total, *shape), max(spec.minimum or 0, 0), parts[0].dtype)
        start = 0
        for part in parts:
            end = start + len(part)
            whole[(slice(start, end), *map(slice, part.shape[1:]))] = part
            start = end
        merged[spec.name] = whole
    return merged


def on_one_carry(groups: Sequence[Group], carry: Any) -> list[Group]:
    """The groups as rows of `carry`, which holds theirs one after another."""
    everyone = np.arange(sum(len(group.owners) for group in groups))
    start, moved = 0, []
    for group in groups:
        end = start + len(group.owners)
        rows = everyone[start:end]
        moved.append(Group(carry, rows, group.owners, group.positions, group.state, group.since_ms))
        start = end
    return moved


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
    exit_index: int, is_final: bool, groups: Sequence[Group], out: SegmentOutput, now_ms: float
) -> tuple[list[Group], list[Leaving]]:
    """Who goes on and who leaves, of the rows that `out` is about: those of `groups`, by policy, one after another."""
    survivors: list[Group] = []
    leaving: list[Leaving] = []
    end = 0
    for policy, parts in groupby(groups, key=lambda group: group.policy):
        cohort, start = list(parts), end
        owners = [owner for group in cohort for owner in group.owners]
        positions = [position for group in cohort for position in group.positions]
        end = start + len(owners)
        said = out.rows(slice(start, end))
        if is_final:
            leaving.append(Leaving(said, owners, positions, exit_index, FINAL))
            continue
        leaves, reason, state = policy.decide(exit_index, said, joined([group.state for group in cohort]))
        whole = Group(out.carry, np.arange(start, end), owners, positions, state, now_ms)
        left = leaves.tolist()
        if False not in left:
            leaving.append(Leaving(said, owners, positions, exit_index, reason))
        elif True not in left:
            survivors.append(whole)
        else:
            gone = [row for row, is_gone in enumerate(left) if is_gone]
            there = [positions[row] for row in gone]
            leaving.append(Leaving(said.rows(leaves), [owners[row] for row in gone], there, exit_index, reason))
            survivors.append(whole.part([row for row, is_gone in enumerate(left) if not is_gone]))
    return survivors, leaving


def whole_result(answer: Answer, num_classes: int) -> Result:
    """The answer to a request of several rows, all parts of which are there."""
    return result_from_parts(answer.parts, answer.num_rows, num_classes, answer.policy.score)


def _rows_of(group: Group, name: str) -> NDArray[Any]:
    array: NDArray[Any] = group.carry[name]
    return array if len(array) == len(group.rows) else array[group.rows]
