"""What the comparisons of bench/ are about: one trained model as a bundle, its torch weights, and real sentences.

`demo_subject` takes what `make demo` leaves; `tiny_subject` makes a model so small that only the script is shown to
work. Both give requests with their labels; nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import Manifest, load_manifest
from offramp.commands.dataset import ROTTEN_TOMATOES, Dataset, load_dataset
from offramp.policy import Policy
from offramp.runtime import Runner

if TYPE_CHECKING:
    from offramp.export.source import ModelSource
    from offramp.models.encoder import EarlyExitEncoder, EncoderConfig

DEMO = Path(__file__).parents[1] / "demo"
MASK = "attention_mask"
VOCABULARY = 3000  # of a tiny encoder

Inputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Subject:
    """A bundle and the same weights in torch, with data that neither was trained on."""

    name: str
    bundle: Path
    model: Any  # offramp.models.encoder.EarlyExitEncoder in eval mode, or None
    static_bundle: Path | None  # a smaller model, trained on its own, without exits
    validation: Dataset  # thresholds are chosen here
    test: Dataset  # and judged here
    max_drops: tuple[float, ...]  # accuracy on validation that each point of the frontier may cost

    def first_rows(self, num_rows: int) -> Subject:
        """The same with about `num_rows` rows of validation and test, whole batches of them."""
        return replace(self, validation=_first(self.validation, num_rows), test=_first(self.test, num_rows))

    @property
    def manifest(self) -> Manifest:
        return load_manifest(self.bundle)

    def requests(self, num_rows: int) -> list[Inputs]:
        """The test rows in their order, `num_rows` a request, padded to the longest of the request."""
        rows = [row for batch in self.test.batches for row in rows_of(batch)]
        return [batch_of(rows[start : start + num_rows]) for start in range(0, len(rows), num_rows)]


def _first(dataset: Dataset, num_rows: int) -> Dataset:
    size = len(dataset.batches[0][MASK])
    batches = dataset.batches[: max(1, num_rows // size)]
    return Dataset(batches, dataset.labels[: sum(len(batch[MASK]) for batch in batches)])


def rows_of(inputs: Inputs) -> list[Inputs]:
    """Every row alone, without its padding."""
    lengths = inputs[MASK].sum(axis=1).tolist()
    return [
        {name: array[row : row + 1, :length] for name, array in inputs.items()} for row, length in enumerate(lengths)
    ]


def batch_of(rows: Sequence[Inputs]) -> Inputs:
    """Rows of one request, padded to the longest."""
    longest = max(row[MASK].shape[1] for row in rows)
    return {
        name: np.concatenate([np.pad(row[name], ((0, 0), (0, longest - row[name].shape[1]))) for row in rows])
        for name in rows[0]
    }


def demo_subject(bundle: Path, checkpoint: Path | None = None, static_bundle: Path | None = None) -> Subject:
    """The model of `make demo` and Rotten Tomatoes; exits where it is not there. Without a checkpoint, no torch."""
    from offramp.models.checkpoint import load_checkpoint

    for path in (bundle, checkpoint):
        if path and not path.is_dir():
            raise SystemExit(f"{path} is not there; run `make demo`, or name another one; --quick needs none")
    with Runner.open(bundle, "onnxruntime") as runner:
        validation, test = (load_dataset(runner, ROTTEN_TOMATOES, split) for split in ("validation", "test"))
    model = load_checkpoint(checkpoint).model if checkpoint else None
    static = static_bundle if static_bundle and static_bundle.is_dir() else None
    return Subject("MiniLM-L6", bundle, model, static, validation, test, (0.0, 0.0025, 0.005, 0.01, 0.02))


def tiny_subject(folder: Path) -> Subject:
    """A random encoder of 6 layers and 32 features, rows of random tokens, and labels that it gets mostly right."""
    from offramp.bundle import replace_policy
    from offramp.tuning.calibrate import CalibrateOptions, calibrate

    model = _tiny_model()
    bundle, static_bundle = folder / "bundle", folder / "static-bundle"
    _export(model, bundle)
    _export(_tiny_model(exits=(2,)), static_bundle)
    random = np.random.default_rng(0)
    validation, test = (_random_rows(model, random, 96), _random_rows(model, random, 64))
    with Runner.open(bundle, "onnxruntime", Policy.full_depth()) as runner:
        trace = runner.record(validation.batches, validation.labels)
    replace_policy(bundle, calibrate(trace, CalibrateOptions(max_drop=0.2)).policy.to_json().encode())
    return Subject("tiny", bundle, model, static_bundle, validation, test, (0.1, 0.2))


def tiny_encoder(config: EncoderConfig, max_length: int, vocabulary: int = VOCABULARY) -> EarlyExitEncoder:
    """A random encoder of 32 features, so small that only a script is shown to work."""
    import torch
    from transformers import BertConfig, BertModel

    from offramp.models.encoder import EarlyExitEncoder

    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=config.exits[-1],
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=max_length,
    )
    return EarlyExitEncoder(BertModel(bert, add_pooling_layer=False), config).eval()


def encoder_source(name: str, model: EarlyExitEncoder, inputs: Inputs, max_length: int) -> ModelSource:
    """What export takes of an encoder for texts of up to `max_length` tokens; `inputs` are an example of 2 or more."""
    import torch

    from offramp.export.capture import DEFAULT_OPSET, Example
    from offramp.export.source import source_from_model

    example = Example(
        inputs={name: torch.from_numpy(array) for name, array in inputs.items()},
        dynamic={name: {1: "sequence"} for name in inputs},
        ranges={"sequence": (1, max_length)},
    )
    return source_from_model(name, model, example, DEFAULT_OPSET)


def _tiny_model(exits: tuple[int, ...] = (2, 4, 6)) -> EarlyExitEncoder:
    from offramp.models.encoder import EncoderConfig

    model = tiny_encoder(EncoderConfig(exits=exits, early_pooling="mean"), 64, 300)
    for head in model.heads:  # surer of some rows than of others
        for parameter in head.parameters():
            parameter.data *= 8
    return model


def _export(model: EarlyExitEncoder, bundle: Path) -> None:
    from offramp.export.export_bundle import ExportOptions, export_bundle

    ids = 1 + np.arange(4 * 12).reshape(4, 12) % 299
    source = encoder_source("encoder", model, {"input_ids": ids, MASK: np.ones_like(ids)}, 64)
    export_bundle(source, bundle, ExportOptions(precision="fp32"))


def _random_rows(model: Any, random: np.random.Generator, num_rows: int) -> Dataset:
    """Rows of 4 to 24 tokens in batches of 16; one label in eight is not what the final exit says."""
    import torch

    batches, labels = [], []
    for _ in range(num_rows // 16):
        lengths = random.integers(4, 25, (16, 1))
        mask = (np.arange(24) < lengths).astype(np.int64)
        batches.append({"input_ids": random.integers(1, 300, (16, 24)) * mask, MASK: mask})
        with torch.inference_mode():
            said = model(*(torch.from_numpy(array) for array in batches[-1].values()))[-1]
        labels.append(said.argmax(1).numpy() ^ (random.random(16) < 1 / 8))
    return Dataset(tuple(batches), np.concatenate(labels).astype(np.int64))
