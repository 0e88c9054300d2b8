"""What a MODEL argument and a `--calibration-data` argument mean: where models meet the export.

A module of the command line: it may import both `models` and `export`, which do not know each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from offramp.bundle import DimensionSpec, InputSpec
from offramp.commands.dataset import ROTTEN_TOMATOES, arrays_from_npz
from offramp.errors import DataError, OptionError
from offramp.export.chain import Arrays
from offramp.export.source import ModelSource, TextSource, source_from_factory, source_from_model, source_from_onnx
from offramp.models.data import load_rotten_tomatoes, load_unlabelled

if TYPE_CHECKING:
    from offramp.models.checkpoint import Checkpoint

CALIBRATION_TEXTS = "calibration.jsonl"  # beside a checkpoint: some of the texts that it was trained on
CALIBRATION_ARRAYS = "calibration.npz"  # the same of images
_BATCH = 16
_MAX_BATCHES = 16


def source_from_argument(
    model: str,
    exits: Sequence[str],
    opset: int,
    calibration_data: str,
    dimensions: Mapping[str, DimensionSpec],
    row_outputs: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> ModelSource:
    """The model that `model` names: a checkpoint directory, an .onnx file, or package.module:factory.

    Raises OptionError when it is none of these, and what reading and capturing it raises.
    """
    path = Path(model)
    if path.suffix == ".onnx":
        return _from_onnx(path, exits, row_outputs, calibration_data, dimensions)
    for kind, names in row_outputs.items():
        if names:
            raise OptionError(
                f"--{kind}: got {','.join(names)} for {model!r}; expected it for an .onnx file only: a torch model "
                f"returns its {kind} beside its logits"
            )
    if path.is_dir():
        return _from_checkpoint(path, exits, opset, calibration_data)
    if ":" in model:
        source = source_from_factory(model, opset, exits)
        if not calibration_data:
            return source
        return replace(source, calibration=batches_from_file(Path(calibration_data), source.inputs))
    raise OptionError(
        f"model {model!r}: expected a checkpoint directory of `offramp train`, an .onnx file, or package.module:factory"
    )


def batches_from_file(path: Path, inputs: Sequence[InputSpec]) -> tuple[Arrays, ...]:
    """Real inputs from a file, in batches: an .npz with an array per input, or what `polygraphy run` saved.

    Polygraphy's `--save-inputs` writes a .json with a list of feeds, batches as they were run. Raises DataError.
    """
    if path.suffix != ".json":
        return _batches(path, dict(arrays_from_npz(path)), inputs)
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json

    try:
        feeds = [dict(feed) for feed in load_json(str(path))]
    except (OSError, ValueError, TypeError, PolygraphyException) as exc:
        raise DataError(f"reading {path}: {exc}; expected inputs that `polygraphy run --save-inputs` wrote") from exc
    batches = [batch for feed in feeds[:_MAX_BATCHES] for batch in _batches(path, feed, inputs)]
    if not batches:
        raise DataError(f"{path} holds no inputs, expected at least one feed")
    return tuple(batches)


def _batches(path: Path, arrays: Arrays, inputs: Sequence[InputSpec]) -> tuple[Arrays, ...]:
    """One set of arrays, checked against the model's inputs, in batches."""
    if missing := [spec.name for spec in inputs if spec.name not in arrays]:
        raise DataError(f"{path} holds {', '.join(arrays)}; missing {', '.join(missing)}")
    for spec in inputs:
        got = arrays[spec.name]
        if got.dtype.name != spec.dtype or got.ndim != len(spec.shape):
            raise DataError(f"{path}: {spec.name} is {got.dtype} {got.shape}, expected {spec.dtype} {spec.shape}")
    rows = {len(arrays[spec.name]) for spec in inputs}
    if len(rows) != 1 or rows == {0}:
        raise DataError(f"{path}: its arrays have {sorted(rows)} rows, expected the same number everywhere, at least 1")
    starts = range(0, min(rows.pop(), _BATCH * _MAX_BATCHES), _BATCH)
    return tuple({spec.name: arrays[spec.name][start : start + _BATCH] for spec in inputs} for start in starts)


def _from_onnx(
    path: Path,
    exits: Sequence[str],
    row_outputs: Mapping[str, Sequence[str]],
    calibration_data: str,
    dimensions: Mapping[str, DimensionSpec],
) -> ModelSource:
    source = source_from_onnx(path, exits, dimensions, {}, row_outputs)
    if not calibration_data:
        return source
    batches = batches_from_file(Path(calibration_data), source.inputs)
    return replace(source_from_onnx(path, exits, dimensions, batches[0], row_outputs), calibration=batches)


def _from_checkpoint(path: Path, exits: Sequence[str], opset: int, calibration_data: str) -> ModelSource:
    from offramp.models.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    if checkpoint.tokenizer_path is None:
        return _from_image_checkpoint(path, checkpoint, exits, opset, calibration_data)
    return _from_text_checkpoint(path, checkpoint, exits, opset, calibration_data)


def _from_image_checkpoint(
    path: Path, checkpoint: Checkpoint, exits: Sequence[str], opset: int, calibration_data: str
) -> ModelSource:
    import torch

    from offramp.export.capture import Example

    file = Path(calibration_data) if calibration_data else path / CALIBRATION_ARRAYS
    if not file.is_file():
        raise DataError(
            f"{file} is not there; FP16 and INT8 are calibrated on real images: pass `--calibration-data` with an .npz "
            "file that holds an array `pixels` (images, channels, height, width) of float32 in [0, 1]"
        )
    arrays = arrays_from_npz(file)
    shape = checkpoint.config.image_shape
    if "pixels" not in arrays or arrays["pixels"].shape[1:] != shape or len(arrays["pixels"]) < 2:
        got = {name: array.shape for name, array in arrays.items()}
        raise DataError(f"{file} holds {got}, expected pixels (images, {', '.join(map(str, shape))}), 2 images or more")
    example = Example({"pixels": torch.from_numpy(arrays["pixels"][:_BATCH].astype(np.float32))})
    source = source_from_model(path.name, checkpoint.model, example, opset, exits)
    return replace(source, calibration=_batches(file, arrays, source.inputs), labels=checkpoint.label_names)


def _from_text_checkpoint(
    path: Path, checkpoint: Checkpoint, exits: Sequence[str], opset: int, calibration_data: str
) -> ModelSource:
    import torch

    from offramp.export.capture import Example
    from offramp.models.data import load_tokenizer, token_ids
    from offramp.models.encoder import EarlyExitEncoder
    from offramp.models.rows import padded

    assert checkpoint.tokenizer_path is not None, "a model of texts"
    texts = calibration_texts(path, calibration_data)
    tokenizer = load_tokenizer(checkpoint.tokenizer_path, checkpoint.max_length)
    rows = token_ids(tokenizer, texts[: _BATCH * _MAX_BATCHES])
    batches: list[Arrays] = []
    for start in range(0, len(rows), _BATCH):
        ids, mask = padded(rows[start : start + _BATCH])
        batches.append({"input_ids": ids, "attention_mask": mask})
    axes = {1: "sequence"}
    example = Example(
        inputs={name: torch.from_numpy(array) for name, array in batches[0].items()},
        dynamic={"input_ids": axes, "attention_mask": axes},
        ranges={"sequence": (1, checkpoint.max_length)},
    )
    if isinstance(checkpoint.model, EarlyExitEncoder):
        checkpoint.model.reports_retention = checkpoint.model.config.pruning is not None
    source = source_from_model(path.name, checkpoint.model, example, opset, exits)
    return replace(
        source,
        calibration=tuple(batches),
        labels=checkpoint.label_names,
        text=TextSource(checkpoint.tokenizer_path.read_bytes(), checkpoint.max_length),
    )


def calibration_texts(path: Path, calibration_data: str) -> list[str]:
    """The texts to calibrate on: those asked for, else those that training left beside the checkpoint."""
    if calibration_data == ROTTEN_TOMATOES:
        return [example.text for example in load_rotten_tomatoes().train]
    chosen = Path(calibration_data) if calibration_data else path / CALIBRATION_TEXTS
    if not chosen.is_file():
        raise DataError(
            f"{chosen} is not there; FP16 and INT8 are calibrated on real texts: pass `--calibration-data` with a "
            f".csv, .jsonl or .txt file of texts, or {ROTTEN_TOMATOES}"
        )
    texts = list(load_unlabelled(chosen))
    if len(texts) < 2:
        raise DataError(f"{chosen} has {len(texts)} texts, expected at least 2")
    return texts
