"""Rows to train on, texts or arrays, and the batches that they come in. Numpy only.

Targets are classes (int64, UNKNOWN where there is none) or, for a regression, values (float32). A row of a language
model is a window of tokens, its targets are the next token of every position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from offramp.errors import DataError
from offramp.trace import UNKNOWN

Targets = NDArray[Any]  # int64 or float32


@dataclass(frozen=True)
class Batch:
    """N rows: the model's inputs by name, each with N along axis 0, and targets (N,), or (N, T) of T positions."""

    inputs: Mapping[str, NDArray[Any]]
    targets: Targets


class Rows(Protocol):
    """What training asks of a data set."""

    @property
    def targets(self) -> Targets:
        """The target of every row, (N,), or those of its positions, (N, T)."""

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield every row once, in an order that `seed` alone decides."""


@dataclass(frozen=True)
class TextRows:
    """Token ids of N texts, not padded, and their targets (N,)."""

    ids: Sequence[Sequence[int]]
    targets: Targets

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield batches of texts of about the same length as input_ids and attention_mask, shuffled by `seed`.

        Rows are shuffled, sorted by length (texts of one length keep their shuffled order) and cut into batches
        that are shuffled again, so that batches differ from epoch to epoch and hardly pad.
        """
        random = np.random.default_rng(seed)
        order = random.permutation(len(self.ids))
        lengths = np.array([len(self.ids[index]) for index in order])
        order = order[np.argsort(lengths, kind="stable")]
        starts = random.permutation(np.arange(0, len(self.ids), batch_size))
        for start in starts:
            chosen = order[start : start + batch_size]
            input_ids, attention_mask = padded([self.ids[index] for index in chosen])
            yield Batch({"input_ids": input_ids, "attention_mask": attention_mask}, self.targets[chosen])


@dataclass(frozen=True)
class ArrayRows:
    """Arrays of equal length by input name, such as images, and targets (N,). Raises DataError if lengths differ.

    uint8 arrays are pixels: a batch has them as float32 in [0, 1].
    """

    inputs: Mapping[str, NDArray[Any]]
    targets: Targets

    def __post_init__(self) -> None:
        lengths = {name: len(array) for name, array in self.inputs.items()} | {"targets": len(self.targets)}
        if len(set(lengths.values())) != 1:
            raise DataError(f"rows: got arrays of lengths {lengths}, expected the same everywhere")

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield batches of rows shuffled by `seed`."""
        order = np.random.default_rng(seed).permutation(len(self.targets))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = {name: _numbers(array[chosen]) for name, array in self.inputs.items()}
            yield Batch(inputs, self.targets[chosen])


@dataclass(frozen=True)
class TokenRows:
    """N windows of T tokens and the one behind them, (N, T + 1) int64."""

    tokens: NDArray[np.int64]

    @property
    def targets(self) -> Targets:
        """The next token of every position, (N, T)."""
        return self.tokens[:, 1:]

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield batches of windows shuffled by `seed`, as input_ids."""
        order = np.random.default_rng(seed).permutation(len(self.tokens))
        for start in range(0, len(order), batch_size):
            chosen = self.tokens[order[start : start + batch_size]]
            yield Batch({"input_ids": chosen[:, :-1]}, chosen[:, 1:])


@dataclass(frozen=True)
class TrainingRows:
    """What a run learns from: labelled rows, rows to validate on, and further texts or images without labels."""

    train: Rows
    validation: Rows
    unlabelled: Rows | None = None

    def sizes(self) -> list[int]:
        """Numbers of rows to train on, with and without labels."""
        return [len(self.train.targets), 0 if self.unlabelled is None else len(self.unlabelled.targets)]


def joined(first: Rows, second: Rows | None) -> Rows:
    """Both sets of rows as one; they must be of one kind."""
    if second is None:
        return first
    targets = np.concatenate([first.targets, second.targets])
    if isinstance(first, TextRows) and isinstance(second, TextRows):
        return TextRows([*first.ids, *second.ids], targets)
    if isinstance(first, ArrayRows) and isinstance(second, ArrayRows):
        return ArrayRows(
            {name: np.concatenate([first.inputs[name], second.inputs[name]]) for name in first.inputs}, targets
        )
    raise DataError(f"rows: got {type(first).__name__} and {type(second).__name__}, expected one kind")


def without_labels(count: int) -> NDArray[np.int64]:
    """Targets of rows that have none."""
    return np.full(count, UNKNOWN, np.int64)


def padded(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad N rows of token ids to the longest; returns input_ids and attention_mask, (N, T) int64."""
    longest = max((len(row) for row in rows), default=0)
    input_ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), longest), dtype=np.int64)
    for position, row in enumerate(rows):
        input_ids[position, : len(row)] = row
        attention_mask[position, : len(row)] = 1
    return input_ids, attention_mask


def _numbers(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) / np.float32(255) if array.dtype == np.uint8 else array
