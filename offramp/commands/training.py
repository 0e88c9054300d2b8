"""What `offramp train` does: from a recipe to a checkpoint that export can read."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from offramp.commands.decoders import is_trained
from offramp.commands.hierarchical import KIND as HIERARCHICAL
from offramp.commands.hierarchical import recipe_in, train_hierarchical
from offramp.commands.recipes import DEMO, DataOptions, Recipe, differences, load_recipe, recipe_from_dict
from offramp.commands.sources import CALIBRATION_ARRAYS, CALIBRATION_TEXTS
from offramp.errors import DataError, OptionError
from offramp.models.checkpoint import TOKENIZER_FILE, Checkpoint, load_checkpoint, tokenizer_in
from offramp.models.corpora import CORPORA, Corpus, corpus_rows, load_folder, train_tokenizer
from offramp.models.data import (
    TextSplits,
    default_encoder_path,
    load_imdb_sentences,
    load_texts,
    load_tokenizer,
    load_unlabelled,
    load_values,
    split_texts,
    text_rows,
    texts_of,
)
from offramp.models.datasets import TEXTS
from offramp.models.images import IMAGES, ImageSplits
from offramp.models.kinds import KINDS, Kind
from offramp.models.options import nearest, options_from_dict
from offramp.models.plan import Stage
from offramp.models.rows import ArrayRows, TrainingRows
from offramp.models.snapshot import load_snapshot
from offramp.models.start import start_from
from offramp.models.train import Output, TrainReport, resume_training, train_model
from offramp.storage import write_file

IMDB = "imdb"
DISTIL_EPOCHS = "distil_epochs"  # an override of its own: the epochs of the stages that learn without labels
_HOLDOUT = 0.1  # share of a user's file for validation, and again for test
_CALIBRATION_ROWS = 256
_CALIBRATION_CHARACTERS = 600  # of a language model's rows: well over a hundred tokens
_NOT_OPTIONS = ("kind", "weights")  # of a recipe's [model]; the rest configures its kind

Splits = TextSplits | ImageSplits | Corpus


@dataclass(frozen=True)
class TrainRequest:
    """What the command line says: a recipe's name ("": the demo's), and values that it changes, by dotted name."""

    recipe: str
    overrides: Mapping[str, Any]


def train_checkpoint(output: Path, request: TrainRequest, resume: bool, progress: bool) -> TrainReport:
    """Train as `request` says and leave a checkpoint in `output`, with some training rows to calibrate on.

    Raises OptionError, DataError, ModelError or StorageError.
    """
    recipe = resumed_recipe(output, request) if resume else requested_recipe(request)
    return train_recipe(output, recipe, resume, progress)


def requested_recipe(request: TrainRequest) -> Recipe:
    """Return the recipe with what the command line changes.

    Another data set does not go with the recipe's unlabelled texts, so these are kept only if asked for.
    """
    overrides = {name: value for name, value in request.overrides.items() if name != DISTIL_EPOCHS}
    recipe = load_recipe(request.recipe or DEMO, overrides)
    before = load_recipe(request.recipe or DEMO, {})
    if recipe.data.name != before.data.name and "data.unlabelled" not in overrides:
        recipe = replace(recipe, data=replace(recipe.data, unlabelled=""))
    if DISTIL_EPOCHS in request.overrides:
        recipe = replace(recipe, stages=_with_distil_epochs(recipe.stages, request.overrides[DISTIL_EPOCHS]))
    return recipe


def _with_distil_epochs(stages: tuple[Stage, ...], epochs: int) -> tuple[Stage, ...]:
    """The stages, those that learn from texts without labels `epochs` long; 0 leaves them out."""
    kept = [stage for stage in stages if epochs or not stage.chosen.takes_unlabelled]
    return tuple(replace(stage, epochs=epochs) if stage.chosen.takes_unlabelled else stage for stage in kept)


def resumed_recipe(output: Path, request: TrainRequest) -> Recipe:
    """Return the recipe of the interrupted run; OptionError if the command line asks for another one."""
    before = recipe_in(output) if is_trained(output) else load_snapshot(output).extra.get("recipe")
    if before is None:
        raise DataError(f"resuming {output}: it was not trained from a recipe; train again without resuming")
    recipe = recipe_from_dict(before, f"recipe of {output}")
    if (request.recipe or request.overrides) and (found := differences(requested_recipe(request), recipe)):
        raise OptionError(
            f"resuming {output}: its run is another one: {'; '.join(found)}; give the same options, or only -o and "
            "--resume"
        )
    return recipe


def train_recipe(output: Path, recipe: Recipe, resume: bool = False, progress: bool = False) -> TrainReport:
    """Train a recipe into `output`, or go on where it was killed. Raises as `train_checkpoint` does."""
    if recipe.model["kind"] == HIERARCHICAL:
        texts = load_splits(recipe)
        assert isinstance(texts, TextSplits)
        return train_hierarchical(output, recipe, texts_of(texts.train), resume, progress)
    with tempfile.TemporaryDirectory() as scratch:  # a tokenizer of our own lies there until it is saved
        return _train_recipe(output, recipe, Path(scratch), resume, progress)


def _train_recipe(output: Path, recipe: Recipe, scratch: Path, resume: bool, progress: bool) -> TrainReport:
    kind = kind_of(recipe)
    splits = load_splits(recipe)
    checkpoint = load_checkpoint(output) if resume else fresh_checkpoint(recipe, splits, scratch)
    rows = rows_of(checkpoint, splits, recipe.data.limit)
    teacher = teacher_of(recipe, checkpoint)
    if resume:
        report = resume_training(output, rows, progress, teacher)
    else:
        if recipe.run.from_teacher and teacher is not None:
            start_from(checkpoint.model, teacher)
        plan = replace(recipe, stages=useful_stages(recipe, checkpoint, rows)).plan
        report = train_model(checkpoint, rows, plan, Output(output, {"recipe": recipe.to_dict()}, progress), teacher)
    save_calibration(output, kind, splits)
    return report


def kind_of(recipe: Recipe) -> Kind:
    """Return the kind of model that a recipe trains; OptionError with the nearest name if there is none."""
    name = recipe.model["kind"]
    if name not in KINDS:
        raise OptionError(f"[model], kind: got {name!r}, {nearest(str(name), KINDS)}")
    return KINDS[name]


def load_splits(recipe: Recipe) -> Splits:
    """Return what the recipe learns from, shared out; a named data set is shared out the same way for every run."""
    data = recipe.data
    if recipe.model["kind"] != HIERARCHICAL and kind_of(recipe).is_language_model:
        return load_corpus(data)
    if data.name in IMAGES:
        images = IMAGES[data.name](Path(data.path), data.seed)
        return replace(images, train=first_rows(images.train, data.limit))
    if data.name in TEXTS:
        splits = TEXTS[data.name](Path(data.path), data.seed)
    elif Path(data.name).suffix in (".csv", ".jsonl"):
        texts = (load_values if recipe.model["kind"] == "regression" else load_texts)(Path(data.name))
        held_out = max(1, round(_HOLDOUT * len(texts.examples)))
        splits = split_texts(texts, held_out, held_out, recipe.run.seed)
    else:
        raise OptionError(f"data: got {data.name!r}, {nearest(data.name, [*TEXTS, *IMAGES])}; or a .csv or .jsonl file")
    train = splits.train[: data.limit or None]
    takes_unlabelled = any(stage.chosen.takes_unlabelled for stage in recipe.stages)
    return replace(splits, train=train, unlabelled=_unlabelled_texts(data) if takes_unlabelled else ())


def load_corpus(data: DataOptions) -> Corpus:
    """Return the texts that a language model learns from: a named corpus, or a folder of .txt files."""
    if data.name in CORPORA:
        return CORPORA[data.name](data.seed)
    if Path(data.name).is_dir():
        return load_folder(Path(data.name), data.seed)
    raise OptionError(
        f"data of a language model: got {data.name!r}, {nearest(data.name, CORPORA)}; or a folder of .txt"
    )


def first_rows(rows: ArrayRows, limit: int) -> ArrayRows:
    """Return the first `limit` rows, all if it is 0."""
    if not limit:
        return rows
    return ArrayRows({name: array[:limit] for name, array in rows.inputs.items()}, rows.targets[:limit])


def _unlabelled_texts(data: DataOptions) -> tuple[str, ...]:
    if data.unlabelled == IMDB:
        return load_imdb_sentences()
    return load_unlabelled(Path(data.unlabelled)) if data.unlabelled else ()


def fresh_checkpoint(recipe: Recipe, splits: Splits, scratch: Path) -> Checkpoint:
    """Return the model to train, with what the data say about it: classes, sizes, the mean and spread of values.

    The tokenizer of a language model is trained first, and lies in `scratch`.
    """
    kind = kind_of(recipe)
    if isinstance(splits, Corpus):
        return _fresh_language_model(recipe, splits, scratch)
    if kind.is_text != isinstance(splits, TextSplits):
        raise OptionError(f"a {recipe.model['kind']} model does not read {recipe.data.name}")
    options = {name: value for name, value in recipe.model.items() if name not in _NOT_OPTIONS}
    known = {field.name for field in fields(kind.config)}
    facts = {name: value for name, value in facts_of(splits).items() if name in known and name not in options}
    config: Any = options_from_dict(kind.config, {**options, **facts}, "[model]")
    weights = weights_of(recipe, kind)
    tokenizer = tokenizer_in(weights or default_encoder_path()) if kind.is_text else None
    model = kind.fresh(weights or Path(), config, recipe.run.seed)
    return Checkpoint(model, tokenizer, splits.label_names, recipe.data.max_length, recipe.model["kind"])


def _fresh_language_model(recipe: Recipe, corpus: Corpus, scratch: Path) -> Checkpoint:
    """The vocabulary of the recipe is the most that the tokenizer may have; the model has what it got."""
    kind = kind_of(recipe)
    weights_of(recipe, kind)
    options = {name: value for name, value in recipe.model.items() if name not in _NOT_OPTIONS}
    config: Any = options_from_dict(kind.config, options, "[model]")
    tokenizer = train_tokenizer(corpus.train, config.vocabulary)
    config = replace(config, vocabulary=tokenizer.get_vocab_size())
    tokenizer.save(str(scratch / TOKENIZER_FILE))
    model = kind.fresh(Path(), config, recipe.run.seed)
    return Checkpoint(model, scratch / TOKENIZER_FILE, (), recipe.data.max_length, recipe.model["kind"])


def weights_of(recipe: Recipe, kind: Kind) -> Path | None:
    """Return the pretrained weights that the model begins with, if its kind takes any. Raises OptionError."""
    given = recipe.model.get("weights")
    if kind.default_weights is None:
        if given:
            raise OptionError(f"[model], weights: got {given}; a {recipe.model['kind']} model begins with no weights")
        return None
    return Path(given) if given else kind.default_weights()


def facts_of(splits: TextSplits | ImageSplits) -> dict[str, Any]:
    """Return what data say about a model of them."""
    facts: dict[str, Any] = {"num_classes": len(splits.label_names) or 1}
    if isinstance(splits, ImageSplits):
        channels, size = splits.train.inputs["pixels"].shape[1:3]
        return {**facts, "image_channels": int(channels), "image_size": int(size)}
    if not splits.label_names:
        values = np.array([example.label for example in splits.train], np.float64)
        facts |= {"offset": float(values.mean()), "scale": float(values.std()) or 1.0}
    return facts


def rows_of(checkpoint: Checkpoint, splits: Splits, limit: int = 0) -> TrainingRows:
    """Return the splits as the model takes them; `limit` is the most windows of tokens to learn from, 0 for all."""
    if isinstance(splits, ImageSplits):
        return TrainingRows(splits.train, splits.validation)
    assert checkpoint.tokenizer_path is not None, "a model of texts"
    if isinstance(splits, Corpus):
        return corpus_rows(checkpoint.tokenizer_path, splits, checkpoint.max_length, limit)
    return text_rows(load_tokenizer(checkpoint.tokenizer_path, checkpoint.max_length), splits)


def teacher_of(recipe: Recipe, checkpoint: Checkpoint) -> nn.Module | None:
    """Load the recipe's teacher, None without one.

    Raises OptionError if it is not used, or one is used that is not named, if it reads other tokens than the model or
    answers other classes; DataError if its checkpoint is missing or damaged.
    """
    is_used = recipe.run.from_teacher or any(stage.loss.teacher_weight > 0 for stage in recipe.stages)
    if bool(recipe.teacher) != is_used:
        raise OptionError(
            f"teacher {recipe.teacher}: no stage gives it a weight; set stage.loss.teacher_weight to 0.5 or "
            "run.from_teacher to true, or name none"
            if recipe.teacher
            else "stage.loss.teacher_weight or run.from_teacher: got no teacher; name its checkpoint with --teacher"
        )
    if not recipe.teacher:
        return None
    teacher = load_checkpoint(Path(recipe.teacher))
    tokens = [
        None if path is None else path.read_bytes() for path in (teacher.tokenizer_path, checkpoint.tokenizer_path)
    ]
    if tokens[0] != tokens[1] or teacher.label_names != checkpoint.label_names:
        raise OptionError(
            f"teacher {recipe.teacher}: it reads other inputs or knows other classes than the model that is trained; "
            "train it on the same data with the same tokenizer"
        )
    return teacher.model


def useful_stages(recipe: Recipe, checkpoint: Checkpoint, rows: TrainingRows) -> tuple[Stage, ...]:
    """Return the stages that have something to teach: early heads, and to labels_or_answers texts without labels."""
    has_early = len(checkpoint.config.exits) > 1
    kept = tuple(
        stage
        for stage in recipe.stages
        if (has_early or stage.chosen.learns(0) != "early_heads")
        and (stage.strategy != "labels_or_answers" or rows.unlabelled is not None)
    )
    if not kept:
        raise OptionError(
            "none of the recipe's stages has something to teach this model; expected early exits or joint"
        )
    return kept


def save_calibration(output: Path, kind: Kind, splits: Splits) -> None:
    """Leave some training rows beside the checkpoint, which FP16 and INT8 are calibrated on."""
    if isinstance(splits, ImageSplits):
        batch = next(first_rows(splits.train, _CALIBRATION_ROWS).batches(_CALIBRATION_ROWS, seed=0))
        stream = io.BytesIO()
        np.savez_compressed(stream, **dict(batch.inputs))  # type: ignore[arg-type]
        write_file(output / CALIBRATION_ARRAYS, stream.getvalue())
        return
    if isinstance(splits, Corpus):
        texts = "".join(splits.train)
        starts = range(0, len(texts), max(1, len(texts) // _CALIBRATION_ROWS))
        lines = [json.dumps({"text": texts[start : start + _CALIBRATION_CHARACTERS]}) for start in starts]
        write_file(output / CALIBRATION_TEXTS, ("\n".join(lines[:_CALIBRATION_ROWS]) + "\n").encode())
        return
    names = splits.label_names
    lines = [
        json.dumps({"text": example.text, "label": names[int(example.label)] if names else example.label})
        for example in splits.train[:_CALIBRATION_ROWS]
    ]
    write_file(output / CALIBRATION_TEXTS, ("\n".join(lines) + "\n").encode())
