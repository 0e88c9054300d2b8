"""At which sizes a graph is looked at, and its inputs cut or repeated to a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import ROWS, DimensionSpec, InputSpec

Arrays = Mapping[str, NDArray[np.generic]]
Size = Mapping[str, int]  # length of every symbolic dimension

# Rows at successive sizes: not growing with anything else, so that an axis that follows them is no accident. Few
# where lengths are full: a forward pass is what probing costs.
_ROW_COUNTS = (3, 5, 2, 7, 4, 2, 6, 11)
_TURNS = 3  # sizes at which all dimensions change at once
_FEW_ROWS = 2  # where a dimension is at the end of its range


def resize_inputs(inputs: Sequence[InputSpec], example: Arrays, size: Size) -> dict[str, NDArray[np.generic]]:
    """The example inputs cut or repeated to `size`; repeated rows are rotated so that no two are the same."""
    return {spec.name: _resize(spec, np.asarray(example[spec.name]), size) for spec in inputs}


def _resize(spec: InputSpec, value: NDArray[np.generic], size: Size) -> NDArray[np.generic]:
    for axis, dimension in enumerate(spec.shape):
        if not isinstance(dimension, str) or (wanted := size[dimension]) == value.shape[axis]:
            continue
        have = value.shape[axis]
        copies = [value]
        for turn in range(1, -(-wanted // have)):
            rotate = axis == 0 and value.ndim > 1 and not spec.is_mask
            copies.append(np.roll(value, turn, axis=-1) if rotate else value)
        value = np.take(np.concatenate(copies, axis), range(wanted), axis)
    if spec.is_mask:
        value = value.copy()
        value.reshape(len(value), -1)[:, 0] = 1  # cutting must not leave a row without a token
    return np.ascontiguousarray(value)


def other_values(inputs: Sequence[InputSpec], feed: Arrays) -> dict[str, NDArray[np.generic]]:
    """`feed` with legal but different values in every second row: masks at their shortest, numbers at the other end."""
    changed = {spec.name: np.array(feed[spec.name]) for spec in inputs}
    for spec in inputs:
        value = changed[spec.name][::2]
        if spec.is_mask:
            value.reshape(len(value), -1)[:, 1:] = 0
        else:
            value[...] = np.negative(value) if value.dtype.kind == "f" else 0
    return changed


def nominal_size(inputs: Sequence[InputSpec], dimensions: Mapping[str, DimensionSpec], example: Arrays) -> Size:
    """The size of the example, within the declared ranges, at a fixed number of rows."""
    size = {
        dimension: np.asarray(example[spec.name]).shape[axis]
        for spec in inputs
        for axis, dimension in enumerate(spec.shape)
        if isinstance(dimension, str)
    }
    limited = {symbol: min(max(size[symbol], limits.min), limits.max) for symbol, limits in dimensions.items()}
    return limited | {ROWS: _ROW_COUNTS[0]}


def probing_sizes(nominal: Size, dimensions: Mapping[str, DimensionSpec]) -> list[Size]:
    """Sizes that tell dimensions apart, the nominal one first.

    All dimensions change at once, each in an order of its own, so that one never grows with another; then each
    alone, for graphs that take some combinations only.
    """
    lengths = {symbol: other_lengths(nominal, dimensions, symbol) for symbol in dimensions if symbol != ROWS}
    free = {symbol: found for symbol, found in lengths.items() if found}
    sizes: list[dict[str, int]] = [dict(nominal)]
    for turn in range(_TURNS if free else len(_ROW_COUNTS) - 1):
        sizes.append(
            {**nominal}
            | {symbol: found[(turn + offset) % len(found)] for offset, (symbol, found) in enumerate(free.items())}
        )
    for symbol, found in free.items():
        sizes += [{**nominal, symbol: length} for length in dict.fromkeys(found[_TURNS:][:2] or found[-1:])]
    # Both ends: a number of blocks or a least number of tokens does not change where lengths are usual. At the upper
    # one each alone: attention of thousands of past positions in chunks of hundreds takes gigabytes.
    if free:
        sizes.append({**nominal} | {symbol: dimensions[symbol].min for symbol in free})
    longest = {symbol: dimensions[symbol].max for symbol in free}
    ends = [{**nominal, symbol: most} for symbol, most in longest.items() if all(size[symbol] < most for size in sizes)]
    sizes = [{**size, ROWS: _ROW_COUNTS[turn % len(_ROW_COUNTS)]} for turn, size in enumerate(sizes)]
    return [*sizes, *({**size, ROWS: _FEW_ROWS} for size in ends)]


def other_lengths(nominal: Size, dimensions: Mapping[str, DimensionSpec], symbol: str) -> list[int]:
    """Lengths of `symbol` to try besides the nominal one.

    First small ones, then an odd one and a larger one, then what graphs that want multiples of something may take.
    """
    length, limits = nominal[symbol], dimensions[symbol]
    wanted = (length // 4, length // 2, length * 3 // 8, length // 4 + 1, length + 3, length * 3 // 4, 2 * length)
    within = [min(max(value, limits.min), limits.max) for value in wanted]
    return [value for value in dict.fromkeys(within) if value != length]
