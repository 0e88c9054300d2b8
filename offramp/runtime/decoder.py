"""A decoder's segments, heads and memory: what one call of a segment does, and nothing about policies.

Every segment has processed a prefix of each sequence, `filled(k)`; between the prefixes of two segments lie positions
that wait at the exit. `advance` brings some of them through the next segment as one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import HIDDEN, LEARNED, ROWS, SCORES, ExitSpec, Manifest, read_file
from offramp.errors import BackendError, BundleError, InputError, OptionError
from offramp.runtime.capacity import router_thresholds
from offramp.runtime.engine import SegmentOutput
from offramp.runtime.kv_cache import HiddenStore, KeyValueCache
from offramp.scores import scores_from_logits

Feed = dict[str, NDArray[Any]]
_USUAL_SLOTS = 8
_LOGITS = "logits"


class Graph(Protocol):
    """A graph that is ready to run on arrays that stay where they are; see OnnxRuntimeGraph.bound."""

    def bound(self, inputs: Feed, outputs: Feed) -> Callable[[], None]: ...


class _Bound(NamedTuple):
    """A call of a graph with the arrays that it reads and writes, and for which shapes and memory it is."""

    key: object
    call: Callable[[], None]
    inputs: Feed  # to be filled before each call
    outputs: Feed
    made: list[NDArray[Any]]  # states, as the cache takes them


class Chunk(NamedTuple):
    """What an exit says about the T positions of a chunk; of row r the first `counts[r]` mean something.

    The arrays are those of the segment, whose next call writes over them.
    """

    hidden: NDArray[np.float32]  # (S, T, d): for the exit's head
    learned: NDArray[np.float32] | None  # (S, T) in [0, 1]
    counts: list[int]  # S


class Decoder:
    """Segments and heads with `slots` sequences in memory; slots low to high take part in a call."""

    def __init__(self, manifest: Manifest, segments: Sequence[Graph], heads: dict[str, Graph], slots: int) -> None:
        spec = manifest.decoder
        if spec is None:
            raise BundleError(f"bundle {manifest.name!r} is no decoder: open it with `Runner.open`")
        limit = manifest.dimensions[ROWS].max
        if not 1 <= slots <= limit:
            raise OptionError(
                f"decoder: got max_batch {slots}, expected 1 to {limit}, what the bundle was exported for"
            )
        self.spec, self.manifest, self.slots = spec, manifest, slots
        self.max_chunk = manifest.dimensions[spec.chunk].max
        self._segments, self._heads = list(segments), heads
        self._carried = [part.carry_out[0].name for part in manifest.segments[:-1]]
        self._chunked = [spec.input_ids, *(part.carry_in[0].name for part in manifest.segments[1:])]  # (rows, chunk, …)
        self._bound: list[_Bound | None] = [None] * len(segments)
        self._bound_heads: dict[str, _Bound] = {}
        self._logits: dict[str, NDArray[np.float32]] = {}  # by head: memory for the most positions asked so far
        self._caches = [KeyValueCache(part.states, slots, spec.max_positions) for part in manifest.segments]
        width = [int(part.carry_out[0].shape[2]) for part in manifest.segments[:-1]]
        self._waiting = [HiddenStore(size, slots, spec.max_positions) for size in width]
        self._routing = router_thresholds(spec, 1)
        self.num_exits = len(segments)

    def filled(self, index: int) -> NDArray[np.int64]:
        """How many positions of each slot segment `index` has processed, (slots,): to be read only."""
        return self._caches[index].lengths

    def cached(self, index: int, slot: int) -> dict[str, NDArray[Any]]:
        """States that segment `index` has of a slot, (heads, positions, width) by the name of the input."""
        return self._caches[index].cached(slot)

    def clear(self, slot: int, length: int = 0) -> None:
        """Forget all positions of a slot from `length` on, in all segments."""
        for cache in self._caches:
            cache.lengths[slot] = min(cache.lengths[slot], length)

    def restart(self) -> None:
        """Forget all positions of all slots, and let go of the memory that they took."""
        self._bound = [None] * len(self._segments)  # they hold on to it
        for cache in self._caches:
            cache.restart()

    def set_capacity(self, capacity: float) -> None:
        """From now on let this share of FFNs run, 1 for all. Raises OptionError."""
        thresholds = router_thresholds(self.spec, capacity)
        if not np.array_equal(thresholds, self._routing):
            self._routing = thresholds
            self._bound = [None] * len(self._segments)  # they have the thresholds in them

    def move(self, source: int, target: int) -> None:
        """Put a sequence into another slot."""
        for waiting, cache in zip(self._waiting, self._caches, strict=False):
            waiting.move(source, target, int(cache.lengths[source]))
        for cache in self._caches:
            cache.move(source, target)

    def read(self, low: int, tokens: Sequence[Sequence[int]], *, is_last: bool = False) -> Chunk:
        """Bring new tokens, at least one per slot from `low` on and at most `max_chunk`, through the first segment.

        With `is_last` nothing comes after them in this segment, so it remembers nothing of them.
        """
        counts = [len(new) for new in tokens]
        ids = np.zeros((len(tokens), max(counts)), np.int64)
        for row, new in enumerate(tokens):
            ids[row, : len(new)] = new
        longest = max(int(self.filled(0)[low + row]) + count for row, count in enumerate(counts))
        if longest > self.spec.max_positions:
            raise InputError(f"a text of {longest} tokens is longer than the {self.spec.max_positions} of this bundle")
        return self._run(0, low, {self.spec.input_ids: ids}, counts, is_last)

    def advance(
        self,
        index: int,
        low: int,
        counts: list[int],
        active: Sequence[Sequence[int]] | None = None,
        *,
        is_last: bool = False,
    ) -> Chunk:
        """Bring the next `counts[r]` positions of slot low + r through segment `index` >= 1, as one chunk.

        `active` has per row the positions in the chunk that really go on, all of them when None; the others stay as
        they are, and this segment's layers make their keys and values from that. `is_last` as in `read`.
        """
        chunk = max(counts)
        feed: Feed = {}
        if active is not None:
            places = _padded(active, counts, chunk)
            if places is None:  # a row without a padded position, and without an active one, has nowhere to point at
                chunk += 1
                places = _padded(active, counts, chunk)
                assert places is not None
            feed[self.spec.active[index - 1]] = places
        starts = self.filled(index)[low : low + len(counts)].tolist()
        feed[self._chunked[index]] = self._waiting[index - 1].read(low, starts, counts, chunk)
        return self._run(index, low, feed, counts, is_last)

    def logits(self, exit_index: int, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits (P, V) that the head of an exit gives to states (P, d). The next call writes over them."""
        spec = self.manifest.exits[exit_index]
        bound = self._bound_heads.get(spec.head)
        if bound is None or bound.key != len(hidden):
            bound = self._bound_heads[spec.head] = self._bind_head(spec, hidden.shape)
        bound.inputs[HIDDEN][...] = hidden
        bound.call()
        return bound.outputs[_LOGITS]

    def answer(
        self,
        exit_index: int,
        hidden: NDArray[np.float32],
        learned: NDArray[np.float32] | None,
        inverse: np.float32,
        wanted: Collection[str] = SCORES,
    ) -> SegmentOutput:
        """What an exit says about states (P, d), for a policy that wants more than its gate; logits as above.

        The scores that are `wanted` are computed here and not in the graph: a token that needs none does not pay.
        """
        logits = self.logits(exit_index, hidden)
        return SegmentOutput(None, logits, logits.argmax(axis=1), scores_from_logits(logits, inverse, wanted), learned)

    def close(self) -> None:
        """Let go of everything."""
        self._segments.clear()
        self._heads.clear()
        self._bound.clear()
        self._bound_heads.clear()
        self._logits.clear()

    def _run(self, index: int, low: int, feed: Feed, counts: list[int], is_last: bool) -> Chunk:
        if index >= len(self._segments):
            raise BackendError("running a decoder: it was closed; open the bundle again")
        cache, high = self._caches[index], low + len(counts)
        starts = cache.lengths[low:high]
        cache.reserve(high, 1)
        key = low, cache.version, len(counts), *[array.shape[-2:] for array in feed.values()]
        bound = self._bound[index]
        if bound is None or bound.key != key:
            bound = self._bound[index] = self._bind(index, low, len(counts), feed, key)
        for name, array in feed.items():
            bound.inputs[name][...] = array
        bound.inputs[self.spec.past_length][...] = starts
        bound.call()
        out = bound.outputs
        if index < len(self._waiting):
            self._waiting[index].write(low, starts.tolist(), out[self._carried[index]], counts)
        if not is_last:
            cache.append(low, bound.made, counts)
        return Chunk(out[HIDDEN], out.get(LEARNED), counts)

    def _bind(self, index: int, low: int, rows: int, feed: Feed, key: object) -> _Bound:
        """A call of segment `index` on inputs of these shapes; all positions are active where `feed` names none."""
        self._bound[index] = None  # its memory first
        part, cache = self.manifest.segments[index], self._caches[index]
        chunk = feed[self._chunked[index]].shape[1]
        made, outputs = cache.room(rows, chunk)
        for spec in part.carry_out:
            outputs[spec.name] = np.empty((rows, chunk, int(spec.shape[2])), spec.dtype)
        width = next(head.width for head in self.manifest.heads if head.name == self.manifest.exits[index].head)
        outputs[HIDDEN] = np.empty((rows, chunk, width), np.float32)
        if self.manifest.exits[index].learned:
            outputs[LEARNED] = np.empty((rows, chunk), np.float32)
        inputs: Feed = {self.spec.past_length: np.empty(rows, np.int64)}
        if index:
            inputs[ROWS] = np.arange(rows)
            inputs[self.spec.active[index - 1]] = np.tile(np.arange(chunk), (rows, 1))
        if len(self._routing):
            inputs[self.spec.router_threshold] = np.tile(self._routing, (rows, 1))
        inputs |= {name: np.empty(array.shape, array.dtype) for name, array in feed.items()}
        call = self._segments[index].bound(inputs | cache.past(low, low + rows), outputs)
        return _Bound(key, call, inputs, outputs, made)

    def _bind_head(self, spec: ExitSpec, shape: tuple[int, ...]) -> _Bound:
        """A call of the head of an exit on states of this shape (P, d)."""
        self._bound_heads.pop(spec.head, None)
        size = shape[0] * spec.num_classes
        if spec.head not in self._logits or self._logits[spec.head].size < size:
            self._logits.pop(spec.head, None)
            self._logits[spec.head] = np.empty(size, np.float32)  # fresh memory costs as much as a sixth of the product
        inputs: Feed = {HIDDEN: np.empty(shape, np.float32)}
        outputs: Feed = {_LOGITS: self._logits[spec.head][:size].reshape(shape[0], -1)}
        return _Bound(shape[0], self._heads[spec.head].bound(inputs, outputs), inputs, outputs, [])


def open_decoder(bundle: Path, manifest: Manifest, precision: str, threads: int, slots: int) -> Decoder:
    """The decoder of `bundle` on ONNX Runtime; 0 slots: 8, or what the bundle takes if that is less.

    Raises OptionError, BundleError, BackendError.
    """
    from offramp.runtime.onnxruntime_engine import OnnxRuntimeGraph, open_session

    opened: dict[str, OnnxRuntimeGraph] = {}
    for name, graphs in (
        *((f"segment {part.index}", part.graphs) for part in manifest.segments),
        *((head.name, head.graphs) for head in manifest.heads),
    ):
        record = graphs.get(precision)
        if record is None:
            raise OptionError(
                f"opening {bundle}: {name} has no {precision!r} graph, expected one of {', '.join(sorted(graphs))}"
            )
        opened[name] = OnnxRuntimeGraph(
            open_session(read_file(bundle, record), threads, str(bundle / record.path)), name
        )
    segments = [opened[f"segment {part.index}"] for part in manifest.segments]
    heads: dict[str, Graph] = {head.name: opened[head.name] for head in manifest.heads}
    return Decoder(manifest, segments, heads, slots or min(_USUAL_SLOTS, manifest.dimensions[ROWS].max))


def _padded(active: Sequence[Sequence[int]], counts: Sequence[int], chunk: int) -> NDArray[np.int64] | None:
    """Active positions as (rows, most): the rest points at a padded position, or at an active one again.

    None when a row has neither: pointing at a position that stays would let it go on.
    """
    width = max(1, *map(len, active))
    places = np.empty((len(counts), width), np.int64)
    for row, (going, count) in enumerate(zip(active, counts, strict=True)):
        if count < chunk:
            places[row] = chunk - 1
        elif len(going):
            places[row] = going[-1]
        else:
            return None
        places[row, : len(going)] = going
    return places
