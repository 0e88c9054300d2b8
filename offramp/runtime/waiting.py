"""Rows that wait in a pool: groups of rows, and the queues they wait in before segments.

Not locked and without a clock: the pool has both. What runs next is schedule.py's decision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from offramp.policy import PolicyState
from offramp.runtime.answer import Answer
from offramp.runtime.schedule import Plan, SurvivalEstimate

Shapes = tuple[tuple[int, ...], ...]  # one per model input

_FIRST = np.zeros(1, np.int64)  # the positions of a request of one row; never written


class Group:
    """S rows of one policy that wait in one carry; at segment 0 the carry is the inputs of their request."""

    __slots__ = ("carry", "owners", "policy", "positions", "rows", "since_ms", "state")

    def __init__(
        self,
        carry: Any,
        rows: NDArray[np.int64],
        owners: list[Answer],
        positions: list[int],
        state: PolicyState | None,
        since_ms: float,
    ) -> None:
        self.carry = carry
        self.rows = rows  # (S,) positions in the carry
        self.owners = owners  # S
        self.policy = owners[0].policy
        self.positions = positions  # S, each in its owner's request
        self.state = state  # (S, …)
        self.since_ms = since_ms

    @classmethod
    def of_request(cls, answer: Answer, inputs: Mapping[str, NDArray[Any]], since_ms: float) -> Self:
        """All rows of a request that begins."""
        if answer.num_rows == 1:
            return cls(inputs, _FIRST, [answer], [0], None, since_ms)
        everyone = range(answer.num_rows)
        return cls(inputs, np.arange(len(everyone)), [answer] * len(everyone), list(everyone), None, since_ms)

    def part(self, keep: Sequence[int]) -> Group:
        """The rows at `keep`, ascending."""
        return Group(
            self.carry,
            self.rows[keep],
            [self.owners[i] for i in keep],
            [self.positions[i] for i in keep],
            self.state.rows(np.asarray(keep)) if self.state else None,
            self.since_ms,
        )

    def open_part(self) -> Group | None:
        """The rows that somebody still waits for; None when there are none."""
        owners = self.owners
        if len(owners) == 1:
            return self if owners[0].is_open else None
        is_open = [owner.is_open for owner in owners]
        if False not in is_open:
            return self
        keep = [i for i, wanted in enumerate(is_open) if wanted]
        return self.part(keep) if keep else None


class Queue:
    """Groups of one lane before one segment, first come, first served."""

    __slots__ = ("full", "groups", "lane", "patience_ms", "rows", "segment")

    def __init__(self, lane: Lane, segment: int, plan: Plan) -> None:
        self.lane = lane
        self.segment = segment
        self.groups: deque[Group] = deque()
        self.rows = 0  # those that nobody waits for any more included, until they are met
        self.full = plan.batch_rows
        self.patience_ms = plan.patience_ms

    @property
    def since_ms(self) -> float:
        return self.groups[0].since_ms

    def push(self, group: Group) -> None:
        self.groups.append(group)
        self.rows += len(group.owners)

    def take(self) -> list[Group]:
        """The next batch: at most `full` rows, a group split where it must be, rows that nobody wants left out."""
        taken: list[Group] = []
        room = self.full
        while room and self.groups:
            whole = self.groups.popleft()
            self.rows -= len(whole.owners)
            group = whole.open_part()
            if group is None:
                continue
            num_rows = len(group.owners)
            if num_rows > room:
                self.groups.appendleft(group.part(range(room, num_rows)))
                self.rows += num_rows - room
                group = group.part(range(room))
            taken.append(group)
            room -= len(group.owners)
        return taken


class Lane:
    """Rows that may share a batch: begun under one setting, alike in every dimension but the row axis."""

    __slots__ = ("batches", "epoch", "is_padded", "plan", "queues", "row_shapes", "row_size", "seen")

    def __init__(
        self, epoch: Epoch, row_shapes: dict[str, tuple[int, ...]], row_size: int, is_padded: bool, plan: Plan
    ) -> None:
        self.epoch = epoch
        self.is_padded = is_padded  # requests may be shorter
        self.row_shapes = row_shapes  # input -> shape without the row axis, padding included
        self.row_size = row_size
        self.plan = plan
        self.seen: tuple[float, ...] = ()  # survival rates that the plan was made for
        self.batches = 0
        self.queues = [Queue(self, k, plan) for k in range(len(plan.regroup))]

    def adopt(self, plan: Plan) -> None:
        """Run by `plan` from now on; what waits already keeps its place."""
        self.plan = plan
        for queue in self.queues:
            queue.full, queue.patience_ms = plan.batch_rows, plan.patience_ms


class Epoch:
    """What began under one setting of the runner."""

    __slots__ = ("by_shapes", "lanes", "setting", "survival")

    def __init__(self, setting: Any, num_segments: int) -> None:
        self.setting = setting
        self.survival = SurvivalEstimate(num_segments - 1)
        self.lanes: dict[tuple[tuple[int, ...], ...], Lane] = {}  # padded row shapes -> lane
        self.by_shapes: dict[Shapes, Lane] = {}  # shapes of requests, which have been checked -> lane
