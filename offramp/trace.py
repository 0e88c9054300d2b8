"""The trace: what every exit said about every row of a data set, recorded on real engines. Numpy only.

The runtime records it (`Runner.record`, `offramp trace`), tuning reads it; it stands below both for that reason.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from offramp.bundle import SCORES
from offramp.errors import DataError
from offramp.storage import replaced_file

UNKNOWN = -1  # label of a row whose label is not known; length of a row without tokens
# Axis 0 of these is the rows.
_ROW_FIELDS = ("logits", "scores", "predictions", "labels", "targets", "learned", "sources", "lengths", "retention")
_EXIT_FIELDS = ("logits", "scores", "predictions", "learned", "retention")  # and axis 1 of these the exits
# What the clock said: it differs from run to run, so it is no part of `Trace.sha256`.
_TIMES = ("costs_ms", "cost_sizes", "batch_costs_ms", "uncut_ms")
_COMPRESSION = 1  # of zlib's levels; 6 takes three times as long for 3 % less
_CHUNK_BYTES = 1 << 24  # written at once
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Trace:
    """Every exit's answers about N rows, taken with all exits closed.

    `costs_ms` (E,) is the median time of each segment for one row, measured where the trace was recorded;
    `batch_costs_ms` the same for batches of the sizes `cost_sizes`, which ascend. `learned` has no columns for a model
    without learned confidences, else one per exit, NaN for the exits without; so has `retention`, the share of tokens
    kept, in (0, 1]. `sources` says where each row came from. A regression (C = 1) has `targets` in place of labels: the
    values that the rows really have, in the unit of its logits. A decoder's rows are token positions, and C = 0: logits
    over a vocabulary are not kept, its temperatures are those of the recording. Raises DataError when made with
    anything else.
    """

    logits: NDArray[np.float32]  # (N, E, C)
    scores: NDArray[np.float32]  # (N, E, 3), at `temperatures`
    predictions: NDArray[np.int64]  # (N, E)
    temperatures: NDArray[np.float64]  # (E,)
    labels: NDArray[np.int64]  # (N,), UNKNOWN where there is none
    costs_ms: NDArray[np.float64]  # (E,)
    fingerprint: str  # Manifest.fingerprint of the bundle
    backend: str
    precision: str
    learned: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))  # (N, E) or (N, 0)
    sources: NDArray[np.str_] = field(default_factory=lambda: np.empty(0, np.str_))  # (N,), "" where not known
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # (N,) in tokens, or UNKNOWN
    retention: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))  # as `learned`
    cost_sizes: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # (B,)
    batch_costs_ms: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))  # (B, E)
    targets: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))  # (N,), NaN where not known
    uncut_ms: float = math.nan  # the uncut model on one row, opened as the segments were; NaN: not measured
    files: tuple[str, ...] = ()  # E: SHA-256 of the graph or plan that each segment ran; empty: not files (a fake)

    def __post_init__(self) -> None:
        if self.logits.ndim != 3 or not np.isfinite(self.logits).all():
            raise DataError(f"trace: got logits of shape {self.logits.shape}, expected finite (rows, exits, classes)")
        rows, exits, classes = self.logits.shape
        self._fill_in(rows, exits)
        expected = {
            "scores": (rows, exits, len(SCORES)),
            "predictions": (rows, exits),
            "temperatures": (exits,),
            "labels": (rows,),
            "targets": (rows,),
            "costs_ms": (exits,),
            "learned": (rows, exits if self.learned.size else 0),
            "sources": (rows,),
            "lengths": (rows,),
            "retention": (rows, exits if self.retention.size else 0),
            "batch_costs_ms": (len(self.cost_sizes), exits),
        }
        for name, shape in expected.items():
            if (got := getattr(self, name).shape) != shape:
                raise DataError(f"trace: got {name} of shape {got}, expected {shape} beside logits {self.logits.shape}")
        most = UNKNOWN if self.is_regression else classes - 1
        if rows and not (self.labels.min() >= UNKNOWN and (self.labels.max() <= most or not classes)):
            raise DataError(
                f"trace: got labels in [{self.labels.min()}, {self.labels.max()}], expected "
                + ("targets for a regression" if self.is_regression else f"below {classes}")
            )
        known = self.targets[~np.isnan(self.targets)]
        if len(known) and not (self.is_regression and np.isfinite(known).all()):
            raise DataError(
                "trace: got targets for classes, or such that are not finite; expected values, NaN if unknown"
            )
        self._check_rows()
        self._check_costs()

    def rows(self, keep: NDArray[Any]) -> Trace:
        """The trace of the rows `keep` only, positions or a mask; costs and what recorded it stay."""
        return replace(self, **{name: getattr(self, name)[keep] for name in _ROW_FIELDS})

    def exits(self, kept: Sequence[int]) -> Trace:
        """The trace of the exits `kept` only, ascending positions, the final one last.

        A segment costs what those merged into it cost together: an upper bound, for a dropped exit costs less. They
        ran as files of their own, so `files` is empty.
        """
        columns = list(kept)
        first = [0, *(k + 1 for k in columns[:-1])]
        chosen: dict[str, Any] = {
            name: getattr(self, name)[:, columns] if getattr(self, name).shape[1] else getattr(self, name)
            for name in _EXIT_FIELDS
        }
        return replace(
            self,
            **chosen,
            temperatures=self.temperatures[columns],
            costs_ms=np.add.reduceat(self.costs_ms, first),
            batch_costs_ms=np.add.reduceat(self.batch_costs_ms, first, axis=1),
            files=(),
        )

    def _fill_in(self, rows: int, exits: int) -> None:
        """What was left out becomes what its absence means."""
        absent: dict[str, NDArray[Any]] = {
            "learned": np.empty((rows, 0), np.float32),
            "sources": np.full(rows, "", np.str_),
            "lengths": np.full(rows, UNKNOWN, np.int64),
            "targets": np.full(rows, np.nan, np.float32),
            "retention": np.empty((rows, 0), np.float32),
            "batch_costs_ms": np.empty((0, exits)),
        }
        for name, array in absent.items():
            if not getattr(self, name).size:
                object.__setattr__(self, name, array)

    def _check_rows(self) -> None:
        missing, right = np.isnan(self.learned), (self.learned >= 0) & (self.learned <= 1)
        if not (missing.all(axis=0) | right.all(axis=0)).all():
            raise DataError("trace: got learned outside [0, 1], expected probabilities, or NaN for a whole exit")
        missing, right = np.isnan(self.retention), (self.retention > 0) & (self.retention <= 1)
        if not (missing.all(axis=0) | right.all(axis=0)).all():
            raise DataError("trace: got retention outside (0, 1], expected shares of tokens, or NaN for a whole exit")
        if self.sources.dtype.kind != "U":
            raise DataError(f"trace: got sources of dtype {self.sources.dtype}, expected names")
        if len(self.lengths) and self.lengths.min() < UNKNOWN:
            raise DataError(f"trace: got a length of {self.lengths.min()}, expected numbers of tokens, or {UNKNOWN}")

    def _check_costs(self) -> None:
        sizes, costs = self.cost_sizes.tolist(), self.batch_costs_ms
        if self.cost_sizes.ndim != 1 or any(a >= b for a, b in pairwise([0, *sizes])):
            raise DataError(f"trace: got cost_sizes {sizes}, expected ascending numbers from 1")
        if not (np.isfinite(costs).all() and (costs >= 0).all()):
            raise DataError("trace: got batch_costs_ms that are negative or not finite, expected milliseconds")
        if not (math.isnan(self.uncut_ms) or 0 < self.uncut_ms < math.inf):
            raise DataError(f"trace: got uncut_ms {self.uncut_ms}, expected milliseconds, or NaN when not measured")
        if self.files and len(self.files) != self.num_exits:
            raise DataError(f"trace: got {len(self.files)} files for {self.num_exits} segments, expected one for each")

    @property
    def num_exits(self) -> int:
        return int(self.logits.shape[1])

    @property
    def is_regression(self) -> bool:
        """Are the answers values and not classes?"""
        return bool(self.logits.shape[2] == 1)

    @property
    def known(self) -> NDArray[np.bool_]:
        """(N,): has the row a label, or a target?"""
        return ~np.isnan(self.targets) if self.is_regression else self.labels != UNKNOWN

    @property
    def has_logits(self) -> bool:
        """Are logits kept, to scale by other temperatures?"""
        return bool(self.logits.shape[2])

    @property
    def has_learned(self) -> tuple[bool, ...]:
        """Which exits have a learned confidence, E."""
        if not self.learned.size:
            return (False,) * self.num_exits
        return tuple(not np.isnan(column).any() for column in self.learned.T)

    @property
    def sha256(self) -> str:
        """SHA-256 of what was said about which rows, and by what: everything but times. What a certificate binds to.

        However the file is compressed and its parts are ordered, the same content has the same hash.
        """
        return _sha256(_columns_from_trace(self))


class _Column(NamedTuple):
    """A field of a trace, in pieces along its axis 0; `chunks` gives them anew at every call."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[NDArray[Any]]]


def save_trace(path: Path, trace: Trace) -> None:
    """Write `trace` to an .npz file atomically; the same trace gives the same bytes. Raises StorageError."""
    _save_columns(path, _columns_from_trace(trace))


def joined(traces: Sequence[Trace]) -> Trace:
    """Traces of consecutive rows, at least one, as one; everything but rows is the first one's."""
    rows: dict[str, Any] = {name: np.concatenate([getattr(trace, name) for trace in traces]) for name in _ROW_FIELDS}
    return replace(traces[0], **rows)


def save_joined(path: Path, parts: Sequence[Path], **others: Any) -> str:
    """Write the traces of consecutive rows at `parts` as one, with fields that are not rows as in `others`.

    Returns its `sha256`. Memory is for one part. Raises StorageError, and DataError for a part that is none.
    """
    first = replace(load_trace(parts[0]), **others)
    columns = _columns_from_trace(first)
    sources = [(found.dtype, len(found)) for found in _members(parts, "sources")]
    num_rows = sum(count for _, count in sources)
    for name in _ROW_FIELDS:
        dtype, shape, _ = columns[name]
        dtype = np.result_type(*(width for width, _ in sources)) if name == "sources" else dtype
        columns[name] = _Column(dtype, (num_rows, *shape[1:]), partial(_members, parts, name))
    _save_columns(path, columns)
    return _sha256(columns)


def _members(parts: Sequence[Path], name: str) -> Iterable[NDArray[Any]]:
    return (_member(part, name) for part in parts)


def _member(part: Path, name: str) -> NDArray[Any]:
    with np.load(part, allow_pickle=False) as archive:
        array: NDArray[Any] = archive[name]
    return array


def load_fields(path: Path, *names: str) -> tuple[NDArray[Any], ...]:
    """Some fields of a trace as they lie in its file, without reading the others. Raises DataError."""
    try:
        return tuple(_member(path, name) for name in names)
    except _UNREADABLE as exc:
        raise _unreadable(path, exc) from exc


def load_trace(path: Path) -> Trace:
    """Read a trace written by `save_trace`, also by one that knew fewer fields. Raises DataError."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            present = [f.name for f in fields(Trace) if _is_required(f) or f.name in archive.files]
            arrays: dict[str, Any] = {name: archive[name] for name in present}
        arrays |= {name: str(arrays[name]) for name in ("fingerprint", "backend", "precision")}
        arrays |= {name: float(arrays[name]) for name in ("uncut_ms",) if name in arrays}
        arrays |= {name: tuple(arrays[name].tolist()) for name in ("files",) if name in arrays}
        return Trace(**arrays)
    except _UNREADABLE as exc:
        raise _unreadable(path, exc) from exc


def _unreadable(path: Path, exc: Exception) -> DataError:
    return DataError(f"reading trace {path}: {exc}; record it again with `offramp trace`")


def _is_required(f: Any) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _columns_from_trace(trace: Trace) -> dict[str, _Column]:
    columns = {}
    for f in fields(Trace):
        array = np.asarray(getattr(trace, f.name), np.str_ if f.name == "files" else None)
        columns[f.name] = _Column(array.dtype, array.shape, partial(_sliced, array))
    return columns


def _sliced(array: NDArray[Any]) -> Iterable[NDArray[Any]]:
    """`array` along its axis 0, contiguous, in pieces that take little memory."""
    if not array.ndim or not array.size:
        return [array]
    step = max(1, _CHUNK_BYTES * len(array) // array.nbytes)
    return (np.ascontiguousarray(array[start : start + step]) for start in range(0, len(array), step))


def _save_columns(path: Path, columns: Mapping[str, _Column]) -> None:
    """Write an .npz file, one member per column, without ever holding a whole one. Raises StorageError."""
    options: dict[str, Any] = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": _COMPRESSION}
    with replaced_file(path) as stream, zipfile.ZipFile(stream, "w", **options) as archive:
        for name, column in columns.items():
            header = {"descr": column.dtype.str, "fortran_order": False, "shape": column.shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:  # dated 1980, whenever that is
                write_array_header_1_0(file, header)
                for chunk in column.chunks():
                    file.write(np.asarray(chunk, column.dtype).tobytes())


def _sha256(columns: Mapping[str, _Column]) -> str:
    whole = hashlib.sha256()
    for name in sorted(columns.keys() - set(_TIMES)):
        dtype, shape, chunks = columns[name]
        kind = "text" if dtype.kind == "U" else dtype.newbyteorder("<").str  # the widest name is of no account
        digest = hashlib.sha256(f"{name} {kind} {shape}\n".encode())
        for chunk in chunks():
            if dtype.kind == "U":
                digest.update(b"".join(text.encode() + b"\0" for text in chunk.ravel().tolist()))
            else:
                digest.update(np.asarray(chunk, dtype.newbyteorder("<")).tobytes())
        whole.update(f"{name} {digest.hexdigest()}\n".encode())
    return whole.hexdigest()
