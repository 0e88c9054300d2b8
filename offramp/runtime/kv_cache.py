"""Memory of a decoder's past: keys and values per segment, hidden states per exit, one slot per sequence.

Everything is allocated in steps and written in place: a token costs the copy of its own keys and values, never that of
the past. A run of neighbouring slots is one view, so ONNX Runtime reads the past where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import StateSpec

_STEP = 64  # positions; what is allocated beyond the past is masked, and costs its share of the attention
_GROWTH = 4  # at least a quarter more at a time, so that all copies together are linear in the length


def grown(capacity: int, needed: int, most: int) -> int:
    """A capacity of at least `needed` positions, in steps, and at most `most` unless more is needed."""
    if needed <= capacity:
        return capacity
    wanted = max(needed, capacity + capacity // _GROWTH)
    return max(needed, min(-(-wanted // _STEP) * _STEP, most))


class KeyValueCache:
    """Keys and values of one segment's layers for `slots` sequences; `lengths` (slots,) says how many positions."""

    def __init__(self, states: Sequence[StateSpec], slots: int, max_positions: int) -> None:
        """`states` are alike but for their names: (rows, heads, positions, width) each."""
        _, heads, _, width = states[0].tensor.shape
        self._past = [state.past for state in states]
        self._most = max_positions
        self._slots = slots
        self._slab = np.zeros((len(states), 0, int(heads), 0, int(width)), states[0].tensor.dtype)
        self.lengths = np.zeros(slots, np.int64)

    def past(self, low: int, high: int) -> dict[str, NDArray[Any]]:
        """The past of slots `low` to `high`, as the segment is given it: views (slots, heads, capacity, width)."""
        self._reserve(high, 1)  # an operator on no positions at all is a case that nobody tests
        return {name: slab[low:high] for name, slab in zip(self._past, self._slab, strict=True)}

    def append(self, low: int, made: Sequence[NDArray[Any]], counts: Sequence[int]) -> None:
        """Add the first `counts[row]` positions of `made`, (rows, heads, chunk, width) each, to slots from `low`."""
        starts = self.lengths[low : low + len(counts)].tolist()
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self._reserve(low + len(counts), max(ends))
        start, chunk = starts[0], made[0].shape[2]
        if all(place == start and count == chunk for place, count in zip(starts, counts, strict=True)):
            for slab, new in zip(self._slab, made, strict=True):  # half the time of what follows, for one row
                slab[low : low + len(counts), :, start : start + chunk] = new
            self.lengths[low : low + len(counts)] = start + chunk
            return
        together = np.stack(made)  # (states, rows, heads, chunk, width)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            self._slab[:, low + row, :, start : start + count] = together[:, row, :, :count]
            self.lengths[low + row] = start + count

    def move(self, source: int, target: int) -> None:
        """Put the sequence of slot `source` into slot `target`."""
        length = self.lengths[source]
        self._reserve(max(source, target) + 1, int(length))
        self._slab[:, target, :, :length] = self._slab[:, source, :, :length]
        self.lengths[target] = length

    def _reserve(self, slots: int, positions: int) -> None:
        """Have room for so many slots, of which as many are allocated as were ever in use, and positions."""
        states, have, heads, capacity, width = self._slab.shape
        if slots > have or positions > capacity:
            more = have if slots <= have else min(max(slots, 2 * have), self._slots)
            slab = np.zeros((states, more, heads, grown(capacity, positions, self._most), width), self._slab.dtype)
            slab[:, :have, :, :capacity] = self._slab
            self._slab = slab


class HiddenStore:
    """Hidden states of all positions at one exit, for those that go on later."""

    def __init__(self, width: int, slots: int, max_positions: int) -> None:
        self._most = max_positions
        self._slab = np.zeros((slots, 0, width), np.float32)

    def write(self, low: int, starts: Sequence[int], hidden: NDArray[Any], counts: Sequence[int]) -> None:
        """Put the first `counts[row]` states of `hidden` (rows, chunk, width) at `starts[row]` of slots from `low`."""
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        capacity = self._slab.shape[1]
        if max(ends) > capacity:
            slots, _, width = self._slab.shape
            slab = np.zeros((slots, grown(capacity, max(ends), self._most), width), np.float32)
            slab[:, :capacity] = self._slab
            self._slab = slab
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            self._slab[low + row, start:end] = hidden[row, : end - start]

    def read(self, low: int, starts: Sequence[int], counts: Sequence[int], chunk: int) -> NDArray[np.float32]:
        """The states from `starts[row]` on, `counts[row]` of them, padded to (rows, chunk, width)."""
        if len(starts) == 1 and counts[0] == chunk:
            return self._slab[low : low + 1, starts[0] : starts[0] + chunk]  # one sequence: a view
        hidden = np.zeros((len(starts), chunk, self._slab.shape[2]), np.float32)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            hidden[row, :count] = self._slab[low + row, start : start + count]
        return hidden

    def move(self, source: int, target: int, length: int) -> None:
        """Put the first `length` states of slot `source` into slot `target`."""
        self._slab[target, :length] = self._slab[source, :length]
