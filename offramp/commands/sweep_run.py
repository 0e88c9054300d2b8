"""Runs a sweep: every step of every run that is not done yet, each recorded when it is.

`FOLDER/<run>/<step>.json` says what a step was made from and what came of it. A step is done when its record is of the
same values and what it made is there. Training is never repeated or reused silently: where the recipe differs, that is
an error. What follows from weights is made again when they have changed. A run that another process is at is left to
it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from offramp.commands.recipes import Recipe, differences, recipe_from_dict
from offramp.commands.sweeps import SweepRun
from offramp.commands.training import kind_of, load_splits, rows_of, save_calibration, train_recipe
from offramp.errors import OptionError
from offramp.models.checkpoint import WEIGHTS_FILE, is_checkpoint, load_checkpoint
from offramp.models.evaluate import quality_per_exit
from offramp.models.snapshot import TRAINING_FILE
from offramp.storage import storage_error, write_file

TRAIN = "train"
CHECKPOINT = "checkpoint"  # of a run's folder
State = Literal["done before", "made", "elsewhere", "waits for its teacher", "waits"]  # for a step before

# Of a recipe, these change no weight.
_NO_WEIGHT = ("device", "snapshot_seconds", "snapshot_steps")


@dataclass(frozen=True)
class Place:
    """One run in a sweep's folder, how it tells what it does, and whether training may be done again."""

    folder: Path  # of the sweep
    run: SweepRun
    say: Callable[[str], None] = lambda line: None
    progress: bool = False
    retrain: bool = False

    @property
    def path(self) -> Path:
        """Return the run's own folder."""
        return self.folder / self.run.name

    @property
    def checkpoint(self) -> Path:
        """Return its checkpoint."""
        return self.path / CHECKPOINT

    @property
    def teacher(self) -> Path | None:
        """Return the checkpoint of the run that it learns from."""
        return self.folder / self.run.teacher / CHECKPOINT if self.run.teacher else None


@dataclass(frozen=True)
class Record:
    """What a step was made from, and what came of it; None while it goes on."""

    made_from: Mapping[str, Any]
    result: Mapping[str, Any] | None


def train_run(place: Place) -> State:
    """Train a run unless it is done; go on where it was killed.

    Raises OptionError where the run's folder holds a training of other values, and what training raises.
    """
    if place.teacher is not None and not is_trained(place.teacher):
        return "waits for its teacher"
    with held(place.path) as is_ours:
        if not is_ours:
            return "elsewhere"
        made_from, record = training_from(place), load_record(place.path, TRAIN)
        if because := check_training(place, record, made_from):
            remove_training(place, because)
        if is_trained(place.checkpoint):
            if record is not None and record.result is not None:
                return "done before"
            result = finished(place)
        else:
            save_record(place.path, TRAIN, Record(made_from, None))
            result = trained(place)
        save_record(place.path, TRAIN, Record(made_from, result))
        return "made"


def check_training(place: Place, record: Record | None, made_from: Mapping[str, Any]) -> list[str]:
    """Say in which values another training differs that lies in the run's folder; OptionError without `retrain`."""
    if not is_checkpoint(place.checkpoint):
        return []
    found = differing(record.made_from, made_from, place.run.name) if record else ["values that are not recorded"]
    if found and not place.retrain:
        raise OptionError(
            f"{place.run.name}: what lies in {place.path} was trained with {'; '.join(found)}; give the same values or "
            "another folder, or --retrain to train it again"
        )
    return found


def remove_training(place: Place, because: Sequence[str]) -> None:
    """Remove a checkpoint that is to be trained again. Raises StorageError."""
    place.say(f"{place.run.name}: training again, because it was trained with {'; '.join(because)}")
    try:
        shutil.rmtree(place.checkpoint)
    except OSError as exc:
        raise storage_error(f"removing {place.checkpoint}", exc) from exc


def differing(before: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> list[str]:
    """Say in which values two trainings differ; a value that is not recorded has its default."""
    first, second = (recipe_from_dict(made["recipe"], name) for made in (before, wanted))
    files = [
        f"another {title}"
        for key, title in (("teacher_sha256", "teacher"), ("data_sha256", "file of data"))
        if before.get(key) != wanted.get(key)
    ]
    return differences(first, second) + files


def trained(place: Place) -> dict[str, Any]:
    """Train, from the beginning or where it was killed; returns what every exit does on validation, and seconds."""
    resume = (place.checkpoint / TRAINING_FILE).is_file()
    place.say(f"{place.run.name}: {'going on where it stopped' if resume else 'training'}")
    report = train_recipe(place.checkpoint, recipe_of(place), resume, place.progress)
    return {"measure": report.measure, "validation": list(report.validation), "seconds": report.seconds}


def finished(place: Place) -> dict[str, Any]:
    """What `trained` would have said of a run that was killed when all but its record was written."""
    recipe = recipe_of(place)
    splits, checkpoint = load_splits(recipe), load_checkpoint(place.checkpoint)
    save_calibration(place.checkpoint, kind_of(recipe), splits)
    found = quality_per_exit(checkpoint.model, rows_of(checkpoint, splits).validation)
    return {"measure": "error" if checkpoint.num_classes == 1 else "accuracy", "validation": list(found)}


def training_from(place: Place) -> dict[str, Any]:
    """Return everything that a run's weights follow from, as JSON has it; data that are files by their content."""
    recipe = replace(place.run.recipe, summary="", teacher=place.run.teacher or place.run.recipe.teacher)
    values: dict[str, Any] = recipe.to_dict()
    values["run"] = {name: value for name, value in values["run"].items() if name not in _NO_WEIGHT}
    teacher = place.teacher or (Path(recipe.teacher) if recipe.teacher else None)
    sources = {"teacher_sha256": teacher / WEIGHTS_FILE if teacher else None, "data_sha256": Path(recipe.data.name)}
    hashes = {name: sha256_of(file) for name, file in sources.items() if file is not None and file.is_file()}
    return dict(json.loads(json.dumps({"recipe": values, **hashes})))


def recipe_of(place: Place) -> Recipe:
    """Return the run's recipe with the place of its teacher."""
    return replace(place.run.recipe, teacher=str(place.teacher)) if place.teacher else place.run.recipe


def is_trained(checkpoint: Path) -> bool:
    """Tell whether there is a checkpoint whose training is finished."""
    return is_checkpoint(checkpoint) and not (checkpoint / TRAINING_FILE).exists()


def load_record(folder: Path, step: str) -> Record | None:
    """Read the record of a step; None where there is none that can be read."""
    try:
        values = json.loads((folder / f"{step}.json").read_text(encoding="utf-8"))
        return Record(values["made_from"], values["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_record(folder: Path, step: str, record: Record) -> None:
    """Write the record of a step. Raises StorageError."""
    write_file(folder / f"{step}.json", (json.dumps(asdict(record), indent=1) + "\n").encode())


def done(
    where: Path,
    step: str,
    made_from: Mapping[str, Any],
    make: Callable[[], dict[str, Any]],
    say: Callable[[str], None],
    is_there: Callable[[], bool] = lambda: True,
) -> State:
    """Make a step in the folder `where` unless it is recorded as made from the same, and what it made is there."""
    wanted = dict(json.loads(json.dumps(made_from)))
    with held(where) as is_ours:
        if not is_ours:
            return "elsewhere"
        record = load_record(where, step)
        if record is not None and record.result is not None and record.made_from == wanted and is_there():
            return "done before"
        if record is not None and record.result is not None:
            say(f"{where}: {step} again: what it was made from is another")
        save_record(where, step, Record(wanted, None))
        save_record(where, step, Record(wanted, make()))
        return "made"


def sha256_of(file: Path) -> str:
    """Return the hash of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process, and tell whether it could be had; it is free again when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
