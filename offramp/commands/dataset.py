"""Data sets as a deployed model sees them: batches of inputs with labels where they are known. No torch."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.errors import BundleError, DataError, OptionError
from offramp.runtime import Runner
from offramp.trace import UNKNOWN

ROTTEN_TOMATOES = "rotten-tomatoes"
Inputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Dataset:
    """Batches of model inputs, and one label per row (UNKNOWN where there is none)."""

    batches: tuple[Inputs, ...]
    labels: NDArray[np.int64]  # (N,)

    def rows(self) -> list[Inputs]:
        """Every row as a request of its own."""
        return [
            {name: array[row : row + 1] for name, array in batch.items()}
            for batch in self.batches
            for row in range(len(next(iter(batch.values()))))
        ]


def load_dataset(runner: Runner, data: str, split: str, batch_size: int = 32) -> Dataset:
    """Read `data` for the model of `runner`: a .csv or .jsonl file of texts, an .npz of inputs, or rotten-tomatoes.

    `split` chooses validation or test of rotten-tomatoes; a file is taken whole. An .npz file holds an array
    per input, and `labels` if they are known. Raises DataError or OptionError.
    """
    if Path(data).suffix == ".npz":
        return _from_npz(runner, Path(data), batch_size)
    texts, labels = _texts(runner, data, split)
    batches = tuple(
        dict(runner.encode(texts[start : start + batch_size])) for start in range(0, len(texts), batch_size)
    )
    return Dataset(batches, np.asarray(labels, np.int64))


def arrays_from_npz(path: Path) -> Inputs:
    """The arrays of an .npz file by name. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise DataError(f"reading {path}: {exc}; expected an .npz file with an array per input") from exc


def _texts(runner: Runner, data: str, split: str) -> tuple[list[str], list[int]]:
    from offramp.models.data import load_rotten_tomatoes, load_texts

    if runner.manifest.text is None:
        raise BundleError(
            f"bundle {runner.manifest.name!r} has no tokenizer, so {data} cannot be read as texts; pass an .npz file "
            f"with {', '.join(spec.name for spec in runner.manifest.inputs)}"
        )
    names: Sequence[str] = runner.manifest.labels
    if data == ROTTEN_TOMATOES:
        splits = load_rotten_tomatoes()
        examples, found = getattr(splits, split), splits.label_names
    elif Path(data).is_file():
        loaded = load_texts(Path(data))
        examples, found = loaded.examples, loaded.label_names
    else:
        raise OptionError(f"data {data!r}: expected {ROTTEN_TOMATOES}, or a .csv, .jsonl or .npz file that exists")
    if unknown := sorted(set(found) - set(names)):
        raise DataError(f"{data} has labels {', '.join(unknown)}, the model knows {', '.join(names)}")
    index = [names.index(name) for name in found]
    return [example.text for example in examples], [index[example.label] for example in examples]


def _from_npz(runner: Runner, path: Path, batch_size: int) -> Dataset:
    arrays = arrays_from_npz(path)
    labels = arrays.pop("labels", None)
    expected = {spec.name for spec in runner.manifest.inputs}
    rows = {len(array) if array.ndim else 0 for array in arrays.values()}
    if arrays.keys() != expected or len(rows) != 1:
        raise DataError(
            f"{path} holds {', '.join(sorted(arrays))} with {sorted(rows)} rows; expected "
            f"{', '.join(sorted(expected))} (and `labels` if known), all with the same number of rows"
        )
    count = rows.pop()
    if labels is not None and labels.shape != (count,):
        raise DataError(f"{path}: labels have shape {labels.shape}, expected ({count},)")
    known = np.full(count, UNKNOWN, np.int64) if labels is None else labels.astype(np.int64)
    starts = range(0, count, batch_size)
    return Dataset(
        tuple({name: array[start : start + batch_size] for name, array in arrays.items()} for start in starts), known
    )
