"""Data sets as a deployed model sees them: rows with labels and sources where they are known. No torch."""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import Manifest
from offramp.errors import BundleError, DataError, OptionError
from offramp.runtime import Runner
from offramp.runtime.record import Rows
from offramp.trace import UNKNOWN

ROTTEN_TOMATOES = "rotten-tomatoes"
IMDB = "imdb"
Inputs = dict[str, NDArray[Any]]


class _Text(NamedTuple):
    """One text of a data set."""

    text: str
    label: float = math.nan  # the number of its class, or its value; NaN where not known
    source: str = ""


@dataclass(frozen=True)
class RowStream:
    """A data set in batches, made anew whenever one iterates over them; `len` counts the batches."""

    num_rows: int
    batch_size: int
    read: Callable[[], Iterator[Rows]]

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Rows]:
        return self.read()


@dataclass(frozen=True)
class Dataset:
    """Batches of model inputs in memory, and one label per row: see runtime.record.Rows."""

    batches: tuple[Inputs, ...]
    labels: NDArray[Any]  # (N,)

    def rows(self) -> list[Inputs]:
        """Every row as a request of its own."""
        return single_rows(self.batches)


def single_rows(batches: Iterable[Mapping[str, NDArray[Any]]]) -> list[Inputs]:
    """Every row of `batches` as inputs of its own."""
    return [
        {name: array[row : row + 1] for name, array in batch.items()}
        for batch in batches
        for row in range(len(next(iter(batch.values()))))
    ]


def class_names(manifest: Manifest) -> tuple[str, ...]:
    """The names of the model's classes; their numbers where they have none."""
    return manifest.labels or tuple(str(number) for number in range(manifest.exits[-1].num_classes))


def load_dataset(runner: Runner, data: str, split: str, batch_size: int = 32) -> Dataset:
    """All rows of `open_rows` at once."""
    batches = list(open_rows(runner, data, split, batch_size))
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Dataset(
        tuple(dict(batch.inputs) for batch in batches), np.concatenate(labels) if labels else np.empty(0, np.int64)
    )


def open_rows(runner: Runner, data: str, split: str, batch_size: int = 32, limit: int = 0) -> RowStream:
    """The rows of `data` for the model of `runner`, in their order; read as they are asked for, checked before.

    A file of texts (.csv, .jsonl: `text`, and `label` and `source` where known; .txt: a text per line), an .npz with an
    array per input (and `labels`, `sources`); labels are names of classes (in an .npz their numbers), or numbers for a
    regression. "rotten-tomatoes" (`split` chooses validation or test; a file is
    taken whole), or "imdb": sentences without labels that training did not see. With a `limit`, that many rows drawn
    without replacement, the same ones every time. Raises DataError, OptionError or BundleError.
    """
    if limit < 0:
        raise OptionError(f"data: got a limit of {limit} rows, expected a number from 1, or 0 for all")
    if Path(data).suffix == ".npz":
        return _npz_rows(runner, Path(data), batch_size, limit)
    if runner.manifest.text is None:
        raise BundleError(
            f"bundle {runner.manifest.name!r} has no tokenizer, so {data} cannot be read as texts; pass an .npz file "
            f"with {', '.join(spec.name for spec in runner.manifest.inputs)}"
        )
    index = None if runner.manifest.is_regression else _numbers_of(class_names(runner.manifest))
    texts = _packaged_texts(data, split, index)
    if texts is not None:
        return _text_rows(runner, lambda: iter(texts), len(texts), batch_size, limit)
    if not Path(data).is_file():
        raise OptionError(
            f"data {data!r}: expected {ROTTEN_TOMATOES}, {IMDB}, or a .csv, .jsonl, .txt or .npz file that exists"
        )
    return _text_rows(
        runner, lambda: _file_texts(Path(data), index), _checked_file(Path(data), index), batch_size, limit
    )


def arrays_from_npz(path: Path) -> Inputs:
    """The arrays of an .npz file by name. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise DataError(f"reading {path}: {exc}; expected an .npz file with an array per input") from exc


def _numbers_of(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _packaged_texts(data: str, split: str, index: Mapping[str, int] | None) -> list[_Text] | None:
    """The texts of a data set that comes in a package; None when `data` is none."""
    from offramp.models.data import NUM_IMDB_SENTENCES, load_imdb_sentences, load_rotten_tomatoes

    if data == IMDB:  # the first ones are those that `offramp train` learns from
        return [_Text(text) for text in load_imdb_sentences(sys.maxsize)[NUM_IMDB_SENTENCES:]]
    if data != ROTTEN_TOMATOES:
        return None
    splits = load_rotten_tomatoes()
    _check_labels(data, set(splits.label_names), index)
    return [
        _Text(example.text, _number_of(splits.label_names[example.label], index)) for example in getattr(splits, split)
    ]


def _checked_file(path: Path, index: Mapping[str, int] | None) -> int:
    """How many texts `path` holds; a look at all of them. Raises DataError."""
    from offramp.models.data import checked_text, records_from

    found: set[str] = set()
    count = 0
    for count, record in enumerate(records_from(path), start=1):
        checked_text(record, path, count)
        if index is None:
            _check_labels(str(path), {_label_of(record)} - {""}, index)
        elif len(found) <= len(index) + 1:  # more, and one of them is unknown
            found.add(_label_of(record))
    _check_labels(str(path), found - {""}, index)
    return count


def _check_labels(data: str, found: set[str], index: Mapping[str, int] | None) -> None:
    """Raise DataError unless the labels `found` are names of classes in `index`, numbers where that is None."""
    if index is None:
        if unknown := sorted(label for label in found if not _is_value(label)):
            raise DataError(f"{data} has labels {', '.join(unknown)}; the model is a regression, expected numbers")
    elif unknown := sorted(found - index.keys()):
        raise DataError(f"{data} has labels {', '.join(unknown)}, the model knows {', '.join(index)}")


def _is_value(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _number_of(label: str, index: Mapping[str, int] | None) -> float:
    """What a checked label says: the number of its class, or its value; NaN for "", which is none."""
    if not label:
        return math.nan
    return float(label) if index is None else index[label]


def _file_texts(path: Path, index: Mapping[str, int] | None) -> Iterator[_Text]:
    from offramp.models.data import records_from

    for record in records_from(path):
        label = _number_of(_label_of(record), index)
        yield _Text(record["text"], label, str(record.get("source") or "").strip())


def _label_of(record: dict[str, Any]) -> str:
    """The name of its class, "" without one."""
    label = record.get("label")
    return "" if label is None else str(label).strip()


def _text_rows(
    runner: Runner, read: Callable[[], Iterable[_Text]], count: int, batch_size: int, limit: int
) -> RowStream:
    chosen = _drawn(count, limit)

    def batches() -> Iterator[Rows]:
        texts = iter(read()) if chosen is None else _at(read(), chosen)
        while batch := list(islice(texts, batch_size)):
            labels = _labels([text.label for text in batch], runner)
            sources = np.array([text.source for text in batch], np.str_)
            yield Rows(runner.encode([text.text for text in batch]), labels, sources)

    return RowStream(count if chosen is None else len(chosen), batch_size, batches)


def _npz_rows(runner: Runner, path: Path, batch_size: int, limit: int) -> RowStream:
    arrays = arrays_from_npz(path)
    expected = {spec.name for spec in runner.manifest.inputs}
    beside = {name: arrays.pop(name, None) for name in ("labels", "sources") if name not in expected}
    counts = {len(array) if array.ndim else 0 for array in arrays.values()}
    if arrays.keys() != expected or len(counts) != 1:
        raise DataError(
            f"{path} holds {', '.join(sorted(arrays))} with {sorted(counts)} rows; expected "
            f"{', '.join(sorted(expected))} (and `labels` if known), all with the same number of rows"
        )
    count = counts.pop()
    for name, found in beside.items():
        if found is not None and found.shape != (count,):
            raise DataError(f"{path}: {name} have shape {found.shape}, expected ({count},)")
    labels, sources = beside.get("labels"), beside.get("sources")
    labels = _labels(np.full(count, np.nan) if labels is None else labels, runner)
    sources = np.full(count, "", np.str_) if sources is None else sources.astype(np.str_)
    drawn = _drawn(count, limit)
    chosen = np.arange(count) if drawn is None else drawn

    def batches() -> Iterator[Rows]:
        for start in range(0, len(chosen), batch_size):
            rows = chosen[start : start + batch_size]
            yield Rows({name: array[rows] for name, array in arrays.items()}, labels[rows], sources[rows])

    return RowStream(len(chosen), batch_size, batches)


def _labels(given: Any, runner: Runner) -> NDArray[Any]:
    """As Rows has them, from classes (N,) or values, NaN where not known."""
    numbers = np.asarray(given, np.float64)
    if runner.manifest.is_regression:
        return numbers.astype(np.float32)
    return np.where(np.isnan(numbers), UNKNOWN, numbers).astype(np.int64)


def _drawn(count: int, limit: int) -> NDArray[np.int64] | None:
    """Ascending positions of `limit` of `count` rows; None for all."""
    if not limit or limit >= count:
        return None
    return np.sort(np.random.default_rng(0).choice(count, limit, replace=False))


def _at(texts: Iterable[_Text], chosen: NDArray[np.int64]) -> Iterator[_Text]:
    wanted = iter(chosen.tolist())
    position = next(wanted)
    for number, text in enumerate(texts):
        if number == position:
            yield text
            if (position := next(wanted, -1)) < 0:
                return
