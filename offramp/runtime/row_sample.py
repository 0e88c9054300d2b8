"""Some rows of a data set, evenly spread over a stream of unknown length: what costs are measured on.

Rows are kept as a request for them alone would have them: without the padding that their batch gave them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import InputSpec, Manifest

_KEPT = 64  # rows at least, where there are as many; twice as many at most

_Inputs = dict[str, NDArray[Any]]


class RowSample:
    """Every n-th row of what it is shown, n doubling as the stream goes on."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._padding = _padding_mask(manifest)
        self._rows: list[_Inputs] = []
        self._stride, self._seen = 1, 0

    def add(self, inputs: Mapping[str, NDArray[Any]], num_rows: int) -> None:
        """Show it the next rows of the stream."""
        first = -self._seen % self._stride
        for row in range(first, num_rows, self._stride):
            alone = self._alone({name: array[row : row + 1] for name, array in inputs.items()})
            if not self._rows or self._padding or _shapes(alone) == _shapes(self._rows[0]):  # others cannot be batched
                self._rows.append(alone)
        self._seen += num_rows
        while len(self._rows) >= 2 * _KEPT:
            del self._rows[1::2]
            self._stride *= 2

    def batch(self, start: int, size: int) -> _Inputs:
        """`size` rows from row `start` of the sample on, around its end, padded to the longest of them."""
        chosen = [self._rows[(start + place) % len(self._rows)] for place in range(size)]
        return {spec.name: self._stacked(spec, [row[spec.name] for row in chosen]) for spec in self._manifest.inputs}

    def _alone(self, row: _Inputs) -> _Inputs:
        """A copy of a row (1, …) without its padding."""
        if self._padding:
            dimension = str(self._padding.shape[1])
            low = self._manifest.dimensions[dimension].min
            length = max(int(np.flatnonzero(row[self._padding.name][0])[-1]) + 1, low)
            for spec in self._manifest.inputs:
                cut = tuple(slice(length if name == dimension else None) for name in spec.shape)
                row[spec.name] = row[spec.name][cut]
        return {name: array.copy() for name, array in row.items()}

    def _stacked(self, spec: InputSpec, rows: list[NDArray[Any]]) -> NDArray[Any]:
        """Rows (1, …) in one array; what one lacks is 0 in a mask, elsewhere what stands at its end."""
        shape = np.max([row.shape for row in rows], axis=0)
        mode: Any = "constant" if spec.is_mask else "edge"
        return np.concatenate(
            [np.pad(row, [(0, more) for more in (shape - row.shape).tolist()], mode=mode) for row in rows]
        )


def token_mask(manifest: Manifest) -> InputSpec | None:
    """The input (rows, length) that tells a row's tokens from padding; None for a model of something else."""
    masks = [spec for spec in manifest.inputs if spec.is_mask and len(spec.shape) == 2]
    if manifest.text:
        masks = [spec for spec in manifest.inputs if spec.name == manifest.text.mask]
    return masks[0] if len(masks) == 1 else None


def _padding_mask(manifest: Manifest) -> InputSpec | None:
    """The token mask where padding may be left out: the text encoder's own, or what export has tried out."""
    mask = token_mask(manifest)
    if mask is None or not isinstance(mask.shape[1], str):
        return None
    return mask if manifest.text or mask.shape[1] in manifest.trims.values() else None


def _shapes(inputs: _Inputs) -> list[tuple[int, ...]]:
    return [array.shape for array in inputs.values()]
