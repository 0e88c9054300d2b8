"""The trace: what every exit said about every row of a data set, recorded on real engines. Numpy only.

The runtime records it (`Runner.record`), tuning reads it; it stands below both for that reason.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import SCORES
from offramp.errors import DataError
from offramp.storage import write_file

UNKNOWN = -1  # label of a row whose label is not known


@dataclass(frozen=True)
class Trace:
    """Every exit's answers about N rows, taken with all exits closed.

    `costs_ms` (E,) is the median time of each segment for one row, measured where the trace was recorded. `learned`
    has no columns for a model without learned confidences, else one per exit, NaN for the exits without.
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

    def __post_init__(self) -> None:
        if self.logits.ndim != 3 or not np.isfinite(self.logits).all():
            raise DataError(f"trace: got logits of shape {self.logits.shape}, expected finite (rows, exits, classes)")
        rows, exits, classes = self.logits.shape
        if not self.learned.size:
            object.__setattr__(self, "learned", np.empty((rows, 0), np.float32))
        expected = {
            "scores": (rows, exits, len(SCORES)),
            "predictions": (rows, exits),
            "temperatures": (exits,),
            "labels": (rows,),
            "costs_ms": (exits,),
            "learned": (rows, exits if self.learned.size else 0),
        }
        for name, shape in expected.items():
            if (got := getattr(self, name).shape) != shape:
                raise DataError(f"trace: got {name} of shape {got}, expected {shape} beside logits {self.logits.shape}")
        if rows and not (self.labels.min() >= UNKNOWN and self.labels.max() < classes):
            raise DataError(
                f"trace: got labels in [{self.labels.min()}, {self.labels.max()}], expected below {classes}"
            )

        missing, right = np.isnan(self.learned), (self.learned >= 0) & (self.learned <= 1)
        if not (missing.all(axis=0) | right.all(axis=0)).all():
            raise DataError("trace: got learned outside [0, 1], expected probabilities, or NaN for a whole exit")

    @property
    def num_exits(self) -> int:
        return int(self.logits.shape[1])

    @property
    def has_learned(self) -> tuple[bool, ...]:
        """Which exits have a learned confidence, E."""
        if not self.learned.size:
            return (False,) * self.num_exits
        return tuple(not np.isnan(column).any() for column in self.learned.T)


def save_trace(path: Path, trace: Trace) -> None:
    """Write `trace` to an .npz file atomically. Raises StorageError."""
    stream = io.BytesIO()
    arrays: dict[str, Any] = {f.name: np.asarray(getattr(trace, f.name)) for f in fields(trace)}
    np.savez_compressed(stream, **arrays)
    write_file(path, stream.getvalue())


def load_trace(path: Path) -> Trace:
    """Read a trace written by `save_trace`, also by one that knew no learned confidences. Raises DataError."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            names = [f.name for f in fields(Trace) if f.name != "learned" or f.name in archive.files]
            arrays: dict[str, Any] = {name: archive[name] for name in names}
        arrays |= {name: str(arrays[name]) for name in ("fingerprint", "backend", "precision")}
        return Trace(**arrays)
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as exc:
        raise DataError(f"reading trace {path}: {exc}; record it again with `offramp calibrate`") from exc
