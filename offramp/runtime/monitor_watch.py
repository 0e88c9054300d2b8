"""One request under a monitor: which of its rows are audited, and what the policy would have done with them.

An audited row does not leave: it runs to the final exit and is answered from there. The price is paid by then, and
where the two answers differ the deeper one is the one that was certified against; so `exit_index`, score and logits are
those of the final exit, and `reason` is AUDIT (or FULL_DEPTH, when the monitor holds everything back) instead of what
the policy said. Rows with another reason are answered exactly as the policy answers them on a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.policy import Decision, ExitOutput, Policy, PolicyState, score_values

if TYPE_CHECKING:
    from offramp.runtime.monitor import Monitor
    from offramp.runtime.monitor_states import Stream
    from offramp.runtime.runner import Result

AUDIT = "audit"  # reason of a row that the policy let go earlier, had it not been chosen
FULL_DEPTH = "full depth"  # reason of a row that the policy let go earlier, had the monitor no reason against it


class Watch:
    """What a monitor notes of one request, from its beginning to its answer."""

    # Most requests change little of this: what is not said in __init__ is shared by all of them.
    stream: Stream | None = None  # that it is evidence for
    epoch = -1  # of the stream when it began; -1: it is no evidence
    audited: Sequence[int] | None = None  # positions of rows, ascending; None: no row
    is_forced = False  # every row goes to full depth
    counts_vetoes = False
    # What it leaves behind: see Stream.update.
    is_done = False
    exits: Sequence[int] = ()
    audits: Sequence[tuple[int, bool]] = ()

    def __init__(self, monitor: Monitor, source: str, policy: Policy) -> None:
        self.monitor = monitor
        self.source = source
        self.policy = policy
        # Lists, because several workers of a pool may append at once.
        self.vetoes: list[int] = []
        self.retention: list[float] = []

    def audit(self, positions: Sequence[int], num_rows: int, num_exits: int) -> None:
        """The rows at `positions`, of `num_rows`, are audited."""
        # Lists: most requests have one row, and many have few, where numpy takes ten times as long.
        self.audited = positions
        self._stays = [False] * num_rows
        for position in positions:
            self._stays[position] = True
        self._policy_exits = [num_exits - 1] * num_rows  # where the policy lets each go
        self._policy_predictions = [0] * num_rows

    @property
    def is_holding(self) -> bool:
        """Whether `hold` has anything to do."""
        return self.counts_vetoes or self.audited is not None

    def hold(
        self, exit_index: int, positions: Sequence[int], out: ExitOutput, leaves: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Who of the S rows at `positions` of the request really leaves, of those the policy lets go: (S,)."""
        if self.counts_vetoes:
            self._count_vetoes(exit_index, positions, out, leaves)
        left = leaves.tolist()
        if self.audited is None or True not in left:
            return leaves
        for row, position in enumerate(positions):
            if left[row] and self._stays[position]:
                left[row] = False
                if self._policy_exits[position] > exit_index:  # the first time
                    self._policy_exits[position] = exit_index
                    self._policy_predictions[position] = out.prediction.item(row)
        return np.array(left)

    def compare(self, result: Result, class_index: int) -> None:
        """Set the reasons of audited rows right, and note exits and losses; `class_index` -1: every row counts."""
        assert self.audited is not None, "only a request with audited rows is compared"
        exits = result.exit_index.tolist()
        audits = []
        for position in self.audited:
            exit_index, prediction = self._policy_exits[position], result.prediction.item(position)
            is_early = exit_index < exits[position]
            if is_early:
                exits[position] = exit_index
                result.reason[position] = FULL_DEPTH if self.is_forced else AUDIT
            if class_index < 0 or prediction == class_index:
                audits.append((exit_index, is_early and self._policy_predictions[position] != prediction))
        self.exits, self.audits = exits, audits

    def _count_vetoes(
        self, exit_index: int, positions: Sequence[int], out: ExitOutput, leaves: NDArray[np.bool_]
    ) -> None:
        if self.audited is not None:  # those that the policy let go before are none
            leaves = leaves | [self._policy_exits[position] < exit_index for position in positions]
        self.vetoes.append(num_vetoed(self.policy, exit_index, out, leaves))


class WatchedPolicy:
    """Decides as a policy does, but for the rows that a watch holds back; for one pass over rows of one request."""

    __slots__ = ("_live", "_watch")

    def __init__(self, watch: Watch, live: NDArray[np.int64]) -> None:
        """`live` (S,): the positions of the rows in their request."""
        self._watch = watch
        self._live: list[int] = live.tolist()  # S: of the rows that are still here

    def decide(self, exit_index: int, out: ExitOutput, state: PolicyState | None = None) -> Decision:
        """See Policy.decide."""
        leaves, reason, state = self._watch.policy.decide(exit_index, out, state)
        leaves = self._watch.hold(exit_index, self._live, out, leaves)
        if leaves.any():
            self._live = [position for position, left in zip(self._live, leaves.tolist(), strict=True) if not left]
        return Decision(leaves, reason, state)


def held(
    exit_index: int, watches: Sequence[Watch | None], positions: Sequence[int], out: Any, leaves: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """`Watch.hold` for S rows of several requests: row i is row `positions[i]` of the request of `watches[i]`."""
    first, kept = 0, leaves
    for watch, run in groupby(watches):
        end = first + len(list(run))
        if watch is not None and watch.is_holding:
            here = slice(first, end)
            if kept is leaves:
                kept = leaves.copy()
            kept[here] = watch.hold(exit_index, positions[here], out.rows(here), leaves[here])
        first = end
    return kept


def note_retention(watches: Sequence[Watch | None], retention: NDArray[np.float32]) -> None:
    """The shares of tokens that S rows of `watches` kept: `retention` (S,)."""
    for watch, share in zip(watches, retention.tolist(), strict=True):
        if watch is not None:
            watch.retention.append(share)


def num_vetoed(policy: Policy, exit_index: int, out: ExitOutput, leaves: NDArray[np.bool_]) -> int:
    """How many rows stay although their score suffices."""
    limit = policy.limits[exit_index] if policy.limits else None
    if limit is None or exit_index + 1 < policy.minimum_depth:
        return 0
    values = score_values(policy.score, out)
    suffices = values <= np.float32(limit) if policy.score == "entropy" else values >= np.float32(limit)
    return int((suffices & ~leaves).sum())
