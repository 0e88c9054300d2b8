"""May a batch's padding be cut off on the way? Asked of the segments' bits, on real inputs.

Where the rows that go on are shorter than the batch is wide, the runner cuts the columns that are padding for all of
them off the carry. A model that honours its mask answers the same, bit for bit; whether one does cannot be told from
its graph, so every way of cutting that the runner has is tried here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import ROWS, DimensionSpec, InputSpec
from offramp.export.chain import Arrays, Chain, Interface

_BATCHES = 8  # real ones; every one is run three times
_SWEPT_ROWS = 4
# Columns left at the beginning and taken from the end in the sweep. Kernels that depend on a length do so by its
# remainder: a product with one row gave other bits at 4 k + 3 columns (docs/tolerances.md), vectors hold 16 numbers.
_SWEPT_LENGTHS = 16

Choose = Callable[[int, NDArray[np.int64]], NDArray[np.int64]]  # segment, lengths of its rows -> those that go on


def trimmable(inputs: Sequence[InputSpec], segments: Sequence[Interface]) -> tuple[str, str]:
    """The dimension along which padding could be cut off, or "" and why there is none."""
    masks = [spec for spec in inputs if spec.is_mask]
    if len(masks) != 1 or len(masks[0].shape) != 2 or not isinstance(dimension := masks[0].shape[1], str):
        return "", f"{len(masks)} masks, expected one of shape (rows, a dimension)"
    if any(part.inputs for part in segments[1:]):
        return "", "later segments have inputs of their own"
    shapes = {spec.name: spec.shape for spec in inputs}
    shapes |= {f"{spec.name} of segment {k}": spec.shape for k, part in enumerate(segments) for spec in part.carry_out}
    for name, shape in shapes.items():
        for size in shape:
            if isinstance(size, str) and size not in (ROWS, dimension):
                return "", f"{name} has dimension {size}, which may depend on how wide the batch is"
    return dimension, ""


def verified_trims(
    chains: Mapping[str, Chain],
    inputs: Sequence[InputSpec],
    dimensions: Mapping[str, DimensionSpec],
    batches: Sequence[Arrays],
) -> tuple[dict[str, str], dict[str, str]]:
    """Per precision the dimension whose padding may be cut off; and per precision, why, or why not."""
    trims, reasons = {}, {}
    for precision, chain in chains.items():
        dimension, reason = trimmable(inputs, chain.segments)
        reason = reason or differing_bits(chain, inputs, dimensions[dimension], batches)
        if not reason:
            trims[precision] = dimension
        reasons[precision] = reason or f"{dimension}: the same bits"
    return trims, reasons


def differing_bits(chain: Chain, inputs: Sequence[InputSpec], limits: DimensionSpec, batches: Iterable[Arrays]) -> str:
    """Compare `chain` with itself without the padding; "" when not a bit differs, else where one does.

    `inputs` are those of a model with a `trimmable` dimension, whose range is `limits`.
    """
    trimmer = _Trimmer(chain, inputs)
    for position, batch in enumerate(batches):
        if position == 0 and (found := trimmer.sweep(batch, limits)):
            return found
        if position == _BATCHES:
            break
        wider = _widened(inputs, trimmer.dimension, batch, limits, 1 + position)
        found = trimmer.compare(wider, [_shorter_half, _all_but_longest])
        if found:
            return found
    return ""


class _Trimmer:
    """A chain that can be run with its padding cut off, and compared with itself."""

    def __init__(self, chain: Chain, inputs: Sequence[InputSpec]) -> None:
        self.chain, self.inputs = chain, inputs
        self.mask = next(spec for spec in inputs if spec.is_mask)
        self.dimension = str(self.mask.shape[1])

    def sweep(self, batch: Arrays, limits: DimensionSpec) -> str:
        """Make the masks of a few rows end at every length near both ends, and cut there, at each boundary in turn."""
        rows = {name: value[:_SWEPT_ROWS] for name, value in batch.items()}
        width = rows[self.mask.name].shape[1]
        lengths = [*range(limits.min, limits.min + _SWEPT_LENGTHS), *range(width - _SWEPT_LENGTHS, width)]
        lengths = sorted({length for length in lengths if limits.min <= length < width})
        if not lengths:
            return f"real inputs are {width} wide, which leaves nothing to cut off; pass wider ones"
        for length in lengths:
            kept = rows[self.mask.name].copy()
            kept[:, length:] = 0
            kept[:, 0] = 1  # a mask has at least one
            place = length % len(self.chain.sessions)
            if found := self.compare({**rows, self.mask.name: kept}, [_everybody], place):
                return found
        return ""

    def compare(self, batch: Arrays, ways: Sequence[Choose], place: int = 0) -> str:
        """Run `batch` as it is, and in all `ways` with what is padding cut off from segment `place` on."""
        expected = [out for _, out in self.chain.run(batch)]
        lengths = row_lengths(batch[self.mask.name])
        for choose in ways:
            live = np.arange(len(lengths))
            feed, width = dict(batch), batch[self.mask.name].shape[1]
            for index in range(len(expected)):
                longest = int(lengths[live].max())
                if index >= place:
                    feed, width = self._cut(index, feed, longest), longest
                out = self.chain.run_segment(index, feed)
                for name in sorted(out.keys() - {spec.name for spec in self.chain.segments[index].carry_out}):
                    if not np.array_equal(out[name], expected[index][name][live], equal_nan=True):
                        return f"{name} of exit {index} differs when {self.dimension} is cut to {width}"
                rows = choose(index, lengths[live])
                live = live[rows]
                if index + 1 < len(expected):
                    feed = self.chain.feed(index + 1, out, rows)
        return ""

    def _cut(self, index: int, feed: Arrays, size: int) -> Arrays:
        """What segment `index` is fed, cut to `size`."""
        specs = self.chain.segments[index].carry_in if index else self.inputs
        shapes = {spec.name: spec.shape for spec in specs}
        return {name: _cut_array(value, shapes.get(name, ()), self.dimension, size) for name, value in feed.items()}


def row_lengths(mask: NDArray[np.generic]) -> NDArray[np.int64]:
    """Columns of each row up to its last 1: mask (N, T) -> (N,) in 1 … T."""
    return np.asarray(mask.shape[1] - (mask[:, ::-1] != 0).argmax(axis=1), np.int64)


def _cut_array(
    value: NDArray[np.generic], shape: Sequence[int | str], dimension: str, size: int
) -> NDArray[np.generic]:
    return np.ascontiguousarray(value[tuple(slice(size if axis == dimension else None) for axis in shape)])


def _widened(inputs: Sequence[InputSpec], dimension: str, batch: Arrays, limits: DimensionSpec, columns: int) -> Arrays:
    """`batch` with some more padding, as far as the range of the dimension allows."""
    wider = {}
    for spec in inputs:
        value = batch[spec.name]
        more = [
            (0, min(columns, limits.max - length) if axis == dimension else 0)
            for axis, length in zip(spec.shape, value.shape, strict=True)
        ]
        wider[spec.name] = np.pad(value, more)
    return wider


def _everybody(_: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.arange(len(lengths))


def _shorter_half(_: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The shorter half, the shortest last."""
    return np.argsort(-lengths, kind="stable")[len(lengths) // 2 :]


def _all_but_longest(_: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Everybody but the longest, unless all are."""
    shorter = np.flatnonzero(lengths < lengths.max())
    return shorter if len(shorter) else np.arange(len(lengths))
