"""Data sets of images by name. Numpy only."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.errors import DataError
from offramp.models.rows import ArrayRows

FASHION_PATH = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
FASHION_LABELS = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
FASHION_HOLDOUT = 5000
_CURE = "run `apt-get install dataset-fashion-mnist`, or pass the directory of its *-ubyte.gz files as the path"


@dataclass(frozen=True)
class ImageSplits:
    """Images as uint8 `pixels` (N, channels, height, width), shared out, and the names of their classes."""

    train: ArrayRows
    validation: ArrayRows
    test: ArrayRows
    label_names: tuple[str, ...]


def load_fashion_mnist(path: Path = FASHION_PATH, seed: int = 1) -> ImageSplits:
    """Load 60,000 + 10,000 pictures of clothes, 28 x 28 (arXiv 1708.07747); `seed` chooses 5,000 for validation.

    Raises DataError if the files are missing or damaged.
    """
    folder = path if path != Path(".") else FASHION_PATH
    images, labels = (_idx(folder / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    held, held_labels = (_idx(folder / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    order = np.random.default_rng(seed).permutation(len(labels))
    validation, train = np.sort(order[:FASHION_HOLDOUT]), np.sort(order[FASHION_HOLDOUT:])
    return ImageSplits(
        _rows(images[train], labels[train]),
        _rows(images[validation], labels[validation]),
        _rows(held, held_labels),
        FASHION_LABELS,
    )


def _rows(images: NDArray[Any], labels: NDArray[Any]) -> ArrayRows:
    return ArrayRows({"pixels": images[:, None]}, labels.astype(np.int64))


def _idx(path: Path) -> NDArray[np.uint8]:
    """Read one file: two zeros, the type, the number of axes, their lengths (big-endian), then the numbers."""
    try:
        content = gzip.decompress(path.read_bytes())
        _, kind, axes = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
        if kind != 8:  # unsigned bytes
            raise ValueError(f"numbers of type {kind}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as exc:
        raise DataError(f"reading {path}: {exc}; {_CURE}") from exc


IMAGES: dict[str, Callable[[Path, int], ImageSplits]] = {"fashion-mnist": load_fashion_mnist}
