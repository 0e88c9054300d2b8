"""Cuts off padding that all rows of a batch have by now, where the manifest says that this changes no bit.

A batch is as wide as its longest row; when that row has left, or a request came wider than its rows need, the rest
computes padding. Which bundles allow it is found out at export (export/trim.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import Manifest
from offramp.runtime.engine import Engine

# What is cut is copied (N rows, what is left of their columns); what is gained is the columns that the rows going on
# need not compute. A column of MiniLM takes as long as copying 250, measured at batches of 2 to 32 with 24 to 64
# tokens (docs/log.md); half of that, to be on the safe side.
_COPIED_PER_SAVED = 128


@dataclass(frozen=True, slots=True)
class Trimming:
    """Along which dimension a bundle's padding may be cut off, and the input that tells padding."""

    mask: str
    dimension: str
    minimum: int

    def padding_of(self, inputs: dict[str, NDArray[Any]]) -> Padding:
        """The padding of a batch, of which nothing has been cut off yet."""
        mask = inputs[self.mask]  # (N, T)
        width = mask.shape[1]
        lengths: list[int] = (width - (mask[:, ::-1] != 0).argmax(axis=1)).tolist()
        return Padding(self, lengths, width)


class Padding:
    """How long the rows of one batch are that are still there, and how wide they are carried."""

    __slots__ = ("_lengths", "_trimming", "_width")

    def __init__(self, trimming: Trimming, lengths: list[int], width: int) -> None:
        self._trimming, self._lengths, self._width = trimming, lengths, width

    def cut(self, engine: Engine, carry: Any, rows: NDArray[np.int64], *, is_first: bool) -> Any:
        """What `engine` is to be given instead of `carry`, of which `rows` go on: less wide where that pays."""
        before = len(self._lengths)
        if len(rows) < before:
            self._lengths = [self._lengths[row] for row in rows.tolist()]
        longest = max(*self._lengths, self._trimming.minimum)
        saved = len(rows) * (self._width - longest)
        if saved <= 0 or (not is_first and saved * _COPIED_PER_SAVED < before * longest):
            return carry
        self._width = longest
        return engine.trimmed(carry, self._trimming.dimension, longest)


def trimming_from_manifest(manifest: Manifest, precision: str) -> Trimming | None:
    """How the graphs of `precision` may be given less padding; None where that was not verified."""
    dimension = manifest.trims.get(precision)
    if dimension is None:
        return None
    mask = next(spec.name for spec in manifest.inputs if spec.is_mask)
    return Trimming(mask, dimension, manifest.dimensions[dimension].min)
