"""Memory of a decoder: states of its layers (keys and values) per segment, hidden states per exit, a slot per sequence.

Everything is allocated in steps and written in place: a token costs the copy of its own states, never that of the
past. A run of neighbouring slots is one view, so ONNX Runtime reads the past where it lies.
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
    """A capacity of at least `needed` positions, in steps, and at most `most` unless more is needed.

    The first position alone is no step: who has no past yet is given one masked position to attend to, not 64.
    """
    if needed <= capacity or needed == 1:
        return max(needed, capacity)
    wanted = max(needed, capacity + capacity // _GROWTH)
    return max(needed, min(-(-wanted // _STEP) * _STEP, most))


class _Slab:
    """The memory of states that are alike but for their names: (states, slots, …), positions along `axis`."""

    def __init__(self, states: Sequence[StateSpec]) -> None:
        first = states[0]
        self.names = [(state.past, state.tensor.name) for state in states]
        self.axis = first.axis + 1
        self._sizes = [0 if isinstance(size, str) else size for size in first.tensor.shape]
        self.array = np.zeros(self._shape(0, 0), first.tensor.dtype)

    def _shape(self, slots: int, positions: int) -> list[int]:
        sizes = [len(self.names), slots, *self._sizes[1:]]
        sizes[self.axis] = positions
        return sizes

    def span(self, slots: slice | int, positions: slice) -> Any:
        """What selects these slots and positions."""
        return (slice(None), slots, *[slice(None)] * (self.axis - 2), positions)

    def resize(self, slots: int, positions: int) -> None:
        before = self.array
        self.array = np.zeros(self._shape(slots, positions), before.dtype)
        kept = self.span(slice(min(slots, before.shape[1])), slice(min(positions, before.shape[self.axis])))
        self.array[kept] = before[kept]

    def room(self, rows: int, chunk: int) -> NDArray[Any]:
        """An array for what a call makes: (states, rows, …), `chunk` positions."""
        return np.empty(self._shape(rows, chunk), self.array.dtype)


class KeyValueCache:
    """The states of one segment's layers for `slots` sequences; `lengths` (slots,) says how many positions.

    `version` changes when the memory of the past moves: who keeps views of it takes new ones then.
    """

    def __init__(self, states: Sequence[StateSpec], slots: int, max_positions: int) -> None:
        """`states` (rows, …) have their positions along their axis, and one slab per shape."""
        self._most, self._slots = max_positions, slots
        alike: dict[Any, list[StateSpec]] = {}
        for state in states:
            alike.setdefault((state.tensor.shape, state.tensor.dtype, state.axis), []).append(state)
        self._slabs = [_Slab(group) for group in alike.values()]
        self._have = self._capacity = 0  # slots and positions that are allocated
        self.version = 0
        self.lengths = np.zeros(slots, np.int64)

    def restart(self) -> None:
        """Forget everything, memory included: a long past of others would be attended to, masked, from now on."""
        self._have = self._capacity = 0
        self.version += 1
        self.lengths[:] = 0
        for slab in self._slabs:
            slab.resize(0, 0)

    def past(self, low: int, high: int) -> dict[str, NDArray[Any]]:
        """The past of slots `low` to `high`, as the segment is given it: views (slots, …), capacity positions."""
        self.reserve(high, 1)  # an operator on no positions at all is a case that nobody tests
        views: dict[str, NDArray[Any]] = {}
        for slab in self._slabs:
            views |= {past: state[low:high] for (past, _), state in zip(slab.names, slab.array, strict=True)}
        return views

    def cached(self, slot: int) -> dict[str, NDArray[Any]]:
        """What is there of one slot, (…) by the name of the input: as many positions as its length."""
        found: dict[str, NDArray[Any]] = {}
        for slab in self._slabs:
            kept = slab.array[slab.span(slot, slice(int(self.lengths[slot])))]
            found |= {past: state for (past, _), state in zip(slab.names, kept, strict=True)}
        return found

    def room(self, rows: int, chunk: int) -> tuple[list[NDArray[Any]], dict[str, NDArray[Any]]]:
        """Arrays for what a call makes, as `append` takes them, and their views by the names of the outputs."""
        made = [slab.room(rows, chunk) for slab in self._slabs]
        views: dict[str, NDArray[Any]] = {}
        for slab, array in zip(self._slabs, made, strict=True):
            views |= {name: state for (_, name), state in zip(slab.names, array, strict=True)}
        return made, views

    def append(self, low: int, made: Sequence[NDArray[Any]], counts: Sequence[int]) -> None:
        """Add the first `counts[row]` positions of `made`, one array per slab, to slots from `low`."""
        high, chunk = low + len(counts), max(counts)
        starts = self.lengths[low:high].tolist()
        start = starts[0]
        is_even = len(counts) == 1 or (min(counts) == chunk and max(starts) == min(starts))
        self.reserve(high, start + chunk if is_even else max(map(int.__add__, starts, counts)))
        if is_even:
            for slab, new in zip(self._slabs, made, strict=True):
                slab.array[slab.span(slice(low, high), slice(start, start + chunk))] = (
                    new if new.shape[slab.axis] == chunk else new[slab.span(slice(None), slice(chunk))]
                )
            self.lengths[low:high] = start + chunk
            return
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            for slab, new in zip(self._slabs, made, strict=True):
                span = slab.span(low + row, slice(start, start + count))
                slab.array[span] = new[slab.span(row, slice(count))]
            self.lengths[low + row] = start + count

    def move(self, source: int, target: int) -> None:
        """Put the sequence of slot `source` into slot `target`."""
        length = int(self.lengths[source])
        self.reserve(max(source, target) + 1, length)
        for slab in self._slabs:
            slab.array[slab.span(target, slice(length))] = slab.array[slab.span(source, slice(length))]
        self.lengths[target] = length

    def reserve(self, slots: int, positions: int) -> None:
        """Have room for so many slots, of which as many are allocated as were ever in use, and positions."""
        if slots <= self._have and positions <= self._capacity:
            return
        if slots > self._have:
            self._have = min(max(slots, 2 * self._have), self._slots)
        self._capacity = grown(self._capacity, positions, self._most)
        self.version += 1
        for slab in self._slabs:
            slab.resize(self._have, self._capacity)


class HiddenStore:
    """Hidden states of all positions at one exit, for those that go on later."""

    def __init__(self, width: int, slots: int, max_positions: int) -> None:
        self._most = max_positions
        self._slab = np.zeros((slots, 0, width), np.float32)

    def write(self, low: int, starts: Sequence[int], hidden: NDArray[Any], counts: Sequence[int]) -> None:
        """Put the first `counts[row]` states of `hidden` (rows, chunk, width) at `starts[row]` of slots from `low`."""
        needed = starts[0] + counts[0] if len(counts) == 1 else max(map(int.__add__, starts, counts))
        slots, capacity, width = self._slab.shape
        if needed > capacity:
            slab = np.zeros((slots, grown(capacity, needed, self._most), width), np.float32)
            slab[:, :capacity] = self._slab
            self._slab = slab
        for row, start in enumerate(starts):
            self._slab[low + row, start : start + counts[row]] = hidden[row, : counts[row]]

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
