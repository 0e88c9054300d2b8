"""Cut a bundle again, with fewer of its exits: from the whole graph beside it, without the model it came from."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import ModelProto

from offramp.bundle import ROWS, Manifest, read_file
from offramp.errors import DataError
from offramp.export.chain import Arrays
from offramp.export.export_bundle import CALIBRATION, INPUTS, reference_path
from offramp.export.source import ModelSource, TextSource


def source_from_bundle(bundle: Path, manifest: Manifest, whole: ModelProto) -> ModelSource:
    """What `bundle` was exported from: `whole`, the graph beside it, and the inputs kept there. Raises BundleError."""
    batches = calibration_batches(bundle)
    text = None
    if manifest.text:
        spec = manifest.text
        text = TextSource(read_file(bundle, spec.tokenizer), spec.max_length, spec.ids, spec.mask)
    symbols = {ROWS, *(size for spec in manifest.inputs for size in spec.shape if isinstance(size, str))}
    return ModelSource(
        name=manifest.name,
        graph=whole,
        exits=tuple(spec.name for spec in manifest.exits),
        inputs=manifest.inputs,
        dimensions={name: limits for name, limits in manifest.dimensions.items() if name in symbols},
        example=batches[0],
        calibration=batches,
        labels=manifest.labels,
        text=text,
        row_outputs={spec.name: spec.row_outputs for spec in manifest.exits},
        late=tuple(dict.fromkeys(name for segment in manifest.segments[1:] for name in segment.inputs)),
    )


def with_exits(source: ModelSource, kept: Sequence[int]) -> ModelSource:
    """`source` with only the exits at the positions `kept`, the final one among them."""
    exits = tuple(source.exits[k] for k in kept)
    return replace(
        source,
        exits=exits,
        row_outputs={name: source.row_outputs[name] for name in exits if name in source.row_outputs},
    )


def calibration_batches(bundle: Path) -> tuple[Arrays, ...]:
    """The batches that `bundle` was verified with; the first one only where an older export kept no more.

    Raises DataError.
    """
    path = reference_path(bundle) / CALIBRATION
    if not path.is_file():
        return (_arrays(reference_path(bundle) / INPUTS),)
    batches: dict[str, Arrays] = {}
    for name, array in _arrays(path).items():
        number, _, tensor = name.partition("/")
        batches.setdefault(number, {})[tensor] = array
    return tuple(batches[number] for number in sorted(batches))


def _arrays(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise DataError(f"reading {path}: {exc}; export the bundle again to have it") from exc
