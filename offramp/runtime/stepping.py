"""One step of generation for neighbouring slots: which segments run, who leaves where, what waits, what is undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import LEARNED
from offramp.policy import Policy, PolicyState
from offramp.runtime.decoder import Chunk, Decoder
from offramp.runtime.engine import SegmentOutput

COPY, LOSSLESS = "copy", "lossless"

Choose = Callable[[int, NDArray[np.float32]], int]  # slot and logits (V,) -> token


class Decided(NamedTuple):
    """A new token of one row, and the exit that it comes from."""

    token: int
    exit_index: int


class Last(NamedTuple):
    """What an exit says about the last position of R rows."""

    hidden: NDArray[np.float32]  # (R, d)
    learned: NDArray[np.float32] | None  # (R,)


class Stepper:
    """Steps of a decoder under one policy and mode; `choose` is None for greedy."""

    def __init__(self, decoder: Decoder, policy: Policy, mode: str, draft: int, choose: Choose | None = None) -> None:
        self._decoder, self._policy, self._mode = decoder, policy, mode
        self._draft, self._choose = draft, choose
        self._final = decoder.num_exits - 1
        self._inverse = policy.inverse_temperatures(decoder.num_exits)
        opened = [k for k in range(self._final) if policy.asks(k) != "nothing"]
        self._proposing = opened[0] if opened else 0

    def prompt(self, slot: int, tokens: Sequence[int]) -> Decided:
        """Read a prompt into an empty slot; the first new token.

        In deferred mode it waits at the first exit like any other token; else all of it goes to full depth.
        """
        self._decoder.clear(slot)
        chunk = self._read_parts(slot, tokens)
        if self._mode == COPY or self._mode == LOSSLESS:
            for index in range(1, self._final + 1):
                last = self._bring(index, slot, [0], all_active=True)
            return self._answered(slot, self._final, last if self._final else _last(chunk, [0]), [0])[0]
        return self._through_exits(slot, chunk)[0]

    def step(self, low: int, tokens: Sequence[int], room: int) -> list[list[Decided]]:
        """Read one token into each slot from `low` on; the new tokens of each row, several at once in lossless mode.

        At most `room` >= 1 of them are asked for.
        """
        if self._mode == LOSSLESS and self._final:
            return self._propose_and_verify(low, tokens, min(self._draft, room))
        return [
            [decided] for decided in self._through_exits(low, self._decoder.read(low, [[token] for token in tokens]))
        ]

    def _read_parts(self, slot: int, tokens: Sequence[int]) -> Chunk:
        size = self._decoder.max_chunk
        for start in range(0, len(tokens), size):
            chunk = self._decoder.read(slot, [tokens[start : start + size]])
        return chunk

    def _through_exits(self, low: int, chunk: Chunk) -> list[Decided]:
        """From exit to exit until every row has a token; `chunk` is what the first exit says."""
        rows = list(range(len(chunk.counts)))  # without a token yet
        last, state = _last(chunk, rows), None
        found: dict[int, Decided] = {}
        for index in range(self._final + 1):
            if index:
                last = self._bring(index, low, rows)
            if index == self._final:
                found |= dict(zip(rows, self._answered(low, index, last, rows), strict=True))
                break
            leaves, decided, state = self._left(low, index, last, rows, state)
            found |= decided
            if leaves is not None:
                kept = (~leaves).nonzero()[0]
                rows, state = [rows[row] for row in kept.tolist()], state.rows(kept) if state else None
                if not rows:
                    break
        return [found[row] for row in range(len(chunk.counts))]

    def _left(
        self, low: int, index: int, last: Last, rows: list[int], state: PolicyState | None
    ) -> tuple[NDArray[np.bool_] | None, dict[int, Decided], PolicyState | None]:
        """Who leaves an exit before the final one, with which token. The head runs when somebody asks for it."""
        asked = self._policy.asks(index)
        if asked == "nothing":
            return None, {}, state
        if asked == LEARNED:
            assert last.learned is not None, "the policy was checked"
            decision = self._policy.decide(index, SegmentOutput.of_gate(last.learned), state)
        else:
            out = self._asked(index, last)
            decision = self._policy.decide(index, out, state)
        leaves, tokens = decision.leaves, list[int]()
        going = [row for row, leaving in zip(rows, leaves.tolist(), strict=True) if leaving]
        if going and asked == LEARNED:
            tokens = self._tokens(low, going, self._decoder.logits(index, last.hidden[leaves]))
        elif going:
            left = out if len(going) == len(rows) else out.rows(leaves)
            tokens = self._tokens(low, going, left.logits, left.prediction)
        return leaves, {row: Decided(token, index) for row, token in zip(going, tokens, strict=True)}, decision.state

    def _asked(self, index: int, last: Last) -> SegmentOutput:
        """What an exit says, for a policy that asks for answers."""
        wanted = self._policy.scores_read
        return self._decoder.answer(index, last.hidden, last.learned, self._inverse[index], wanted)

    def _answered(self, low: int, index: int, last: Last, rows: Sequence[int]) -> list[Decided]:
        logits = self._decoder.logits(index, last.hidden)
        return [Decided(token, index) for token in self._tokens(low, rows, logits)]

    def _tokens(
        self,
        low: int,
        rows: Sequence[int],
        logits: NDArray[np.float32],
        prediction: NDArray[np.int64] | None = None,
    ) -> list[int]:
        """The next tokens of `rows`, whose logits these are; `prediction`, the largest, where it is known already."""
        if self._choose is None:
            tokens: list[int] = (logits.argmax(axis=1) if prediction is None else prediction).tolist()
            return tokens
        return [self._choose(low + row, row_logits) for row, row_logits in zip(rows, logits, strict=True)]

    def _bring(self, index: int, low: int, rows: list[int], *, all_active: bool = False) -> Last:
        """Bring all that waits of `rows` through segment `index`; what its exit says about their last positions.

        Rows between them ride along with as many of their waiting positions as fit: the weights are read anyway.
        """
        decoder = self._decoder
        first, end = low + rows[0], low + rows[-1] + 1
        copies = self._mode == COPY and not all_active
        count = int(decoder.filled(index - 1)[first] - decoder.filled(index)[first])
        if len(rows) == 1 and count <= decoder.max_chunk:  # the usual way at batch 1, in few steps
            return _last(decoder.advance(index, first, [count], [[count - 1]] if copies else None), [0])
        own = {low + row - first: place for place, row in enumerate(rows)}
        parts: list[tuple[int, NDArray[np.float32], NDArray[np.float32] | None]] = []
        while True:
            left = (decoder.filled(index - 1)[first:end] - decoder.filled(index)[first:end]).tolist()
            most = min(max(left[row] for row in own), decoder.max_chunk)
            if not most:
                break
            counts = [min(count, most) for count in left]
            ends = [row for row in own if left[row] == counts[row] > 0]
            active = None
            if copies:
                active = [[counts[row] - 1] if row in ends else [] for row in range(len(counts))]
            chunk = decoder.advance(index, first, counts, active)
            if len(ends) == len(own):  # all of them at once, as usual
                return _last(chunk, ends)
            for row in ends:
                learned = None if chunk.learned is None else chunk.learned[row, counts[row] - 1]
                parts.append((own[row], chunk.hidden[row, counts[row] - 1].copy(), learned))
        parts.sort(key=lambda part: part[0])
        has_learned = parts[0][2] is not None
        return Last(
            np.stack([hidden for _, hidden, _ in parts]),
            np.array([learned for _, _, learned in parts], np.float32) if has_learned else None,
        )

    def _propose_and_verify(self, low: int, tokens: Sequence[int], most: int) -> list[list[Decided]]:
        """Propose tokens at an early exit, check them at full depth in one chunk, forget those that were wrong."""
        decoder, exit_index = self._decoder, self._proposing
        start = decoder.filled(0)[low : low + len(tokens)].tolist()
        most = max(1, min(most, decoder.max_chunk, decoder.spec.max_positions - max(start)))
        proposed: list[list[int]] = []  # step -> row
        reading, rows = list(tokens), list(range(len(tokens)))
        while True:
            last = _last(decoder.read(low, [[token] for token in reading]), rows)
            for index in range(1, exit_index + 1):
                last = self._bring(index, low, rows, all_active=True)
            if len(proposed) + 1 == most:  # what follows the last one read is decided at full depth anyway
                break
            reading = self._proposal(last)
            if not reading:
                break
            proposed.append(reading)
        number = len(proposed) + 1
        for index in range(exit_index + 1, self._final + 1):
            chunk = decoder.advance(index, low, [number] * len(rows))
        states = chunk.hidden[:, :number].reshape(len(rows) * number, -1)
        right = decoder.logits(self._final, states).argmax(axis=1)
        found = []
        for row, wanted in enumerate(right.reshape(len(rows), number).tolist()):
            accepted = [step[row] for step in proposed]
            agreeing = next((at for at in range(number - 1) if accepted[at] != wanted[at]), number - 1)
            decided = [Decided(token, exit_index) for token in wanted[:agreeing]]
            decided.append(Decided(wanted[agreeing], self._final))
            found.append(decided)
            decoder.clear(low + row, start[row] + len(decided))
        return found

    def _proposal(self, last: Last) -> list[int]:
        """A token for every row from the exit that proposes; none when it would let no row go."""
        index, asked = self._proposing, self._policy.asks(self._proposing)
        if asked == "answers":
            out = self._asked(index, last)
            tokens: list[int] = out.prediction.tolist()
            return tokens if self._policy.decide(index, out).leaves.any() else []
        if asked == LEARNED:
            assert last.learned is not None, "the policy was checked"
            if not self._policy.decide(index, SegmentOutput.of_gate(last.learned)).leaves.any():
                return []
        found: list[int] = self._decoder.logits(index, last.hidden).argmax(axis=1).tolist()
        return found


def _last(chunk: Chunk, rows: Sequence[int]) -> Last:
    """The last position of each of these rows of a chunk."""
    if len(rows) == 1:  # a view: half the time of the general way with cold caches
        row, end = rows[0], chunk.counts[rows[0]] - 1
        learned = None if chunk.learned is None else chunk.learned[row : row + 1, end]
        return Last(chunk.hidden[row : row + 1, end], learned)
    ends = [chunk.counts[row] - 1 for row in rows]
    return Last(chunk.hidden[rows, ends], None if chunk.learned is None else chunk.learned[rows, ends])
