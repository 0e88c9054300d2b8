"""What `offramp train` does: from its options to a checkpoint that export can read."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from offramp.commands.dataset import ROTTEN_TOMATOES
from offramp.commands.sources import CALIBRATION_TEXTS
from offramp.errors import OptionError
from offramp.models.checkpoint import Checkpoint, checkpoint_from_encoder, load_checkpoint
from offramp.models.data import (
    TextSplits,
    default_encoder_path,
    load_imdb_sentences,
    load_rotten_tomatoes,
    load_texts,
    load_tokenizer,
    load_unlabelled,
    split_texts,
    text_rows,
)
from offramp.models.encoder import EncoderConfig
from offramp.models.heads import Pooling
from offramp.models.plan import Plan, RunOptions, Stage
from offramp.models.strategies import LossOptions
from offramp.models.train import Output, TrainReport, resume_training, train_model
from offramp.storage import write_file

IMDB = "imdb"
_HOLDOUT = 0.1  # share of a user's file for validation, and again for test
_CALIBRATION_TEXTS = 256


@dataclass(frozen=True)
class TrainRequest:
    """The options of `offramp train`, as given on the command line."""

    data: str
    encoder: str
    exits: str
    pooling: Pooling
    early_pooling: Pooling
    unlabelled: str
    epochs: int
    distil_epochs: int
    batch_size: int
    encoder_lr: float
    head_lr: float
    early_weight: float
    max_length: int
    seed: int


def train_checkpoint(output: Path, request: TrainRequest, resume: bool, progress: bool) -> TrainReport:
    """Train as `request` says and leave a checkpoint in `output`, with some training texts to calibrate on.

    Raises OptionError, DataError, ModelError or StorageError.
    """
    splits = load_splits(request)
    checkpoint = load_checkpoint(output) if resume else _fresh_checkpoint(request, splits)
    assert checkpoint.tokenizer_path is not None
    rows = text_rows(load_tokenizer(checkpoint.tokenizer_path, checkpoint.max_length), splits)
    if resume:
        report = resume_training(output, rows, progress)
    else:
        has_early = len(checkpoint.config.exits) > 1 and rows.unlabelled is not None
        loss = LossOptions(early_weight=request.early_weight)
        joint = Stage("joint", request.epochs, request.encoder_lr, request.head_lr, loss=loss)
        stages = [joint]
        if has_early and request.distil_epochs:
            stages.append(replace(joint, strategy="labels_or_answers", epochs=request.distil_epochs))
        plan = Plan(tuple(stages), RunOptions(request.batch_size, request.seed))
        report = train_model(checkpoint, rows, plan, Output(output, progress=progress))
    lines = [
        json.dumps({"text": example.text, "label": splits.label_names[int(example.label)]})
        for example in splits.train[:_CALIBRATION_TEXTS]
    ]
    write_file(output / CALIBRATION_TEXTS, ("\n".join(lines) + "\n").encode())
    return report


def load_splits(request: TrainRequest) -> TextSplits:
    """The texts to train on, shared out. Rotten Tomatoes is always shared out the same way."""
    if request.data == ROTTEN_TOMATOES:
        splits = load_rotten_tomatoes()
    else:
        texts = load_texts(Path(request.data))
        held_out = max(1, round(_HOLDOUT * len(texts.examples)))
        splits = split_texts(texts, held_out, held_out, request.seed)
    return replace(splits, unlabelled=_unlabelled_texts(request))


def _unlabelled_texts(request: TrainRequest) -> tuple[str, ...]:
    if request.distil_epochs == 0:
        return ()
    if request.unlabelled == IMDB or (request.data == ROTTEN_TOMATOES and not request.unlabelled):
        return load_imdb_sentences()
    return load_unlabelled(Path(request.unlabelled)) if request.unlabelled else ()


def _fresh_checkpoint(request: TrainRequest, splits: TextSplits) -> Checkpoint:
    try:
        exits = tuple(int(layer) for layer in request.exits.split(","))
    except ValueError:
        raise OptionError(f"--exits: got {request.exits!r}, expected numbers of layers such as 0,2,6") from None
    config = EncoderConfig(exits, len(splits.label_names), request.pooling, request.early_pooling)
    encoder = Path(request.encoder) if request.encoder else default_encoder_path()
    return checkpoint_from_encoder(encoder, config, splits.label_names, request.max_length, request.seed)
