"""The training loop: one for classes and values, encoders and CNNs, and every strategy.

It takes a step per batch, validates after every epoch, and leaves behind what a killed run resumes from. It trains
what it is given and saves where it is told; choosing a model, data and a plan is the caller's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from offramp.errors import DataError, OptionError
from offramp.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from offramp.models.devices import device_from_name, device_of, placed, precision_on, products
from offramp.models.evaluate import answers_of, measure_of, quality_per_exit
from offramp.models.plan import Plan, RunOptions, Stage
from offramp.models.randomness import forked_random_state, random_state, seed_all, set_random_state
from offramp.models.rows import Batch, Rows, TrainingRows, joined
from offramp.models.schedule import layers_dropped, learning_rate_scale, set_annealed
from offramp.models.snapshot import (
    EpochReport,
    Position,
    Snapshot,
    bytes_from_snapshot,
    load_snapshot,
    restore,
    save_snapshot,
)
from offramp.models.strategies import HEADS, Learners, set_learners, step_loss


@dataclass(frozen=True)
class TrainReport:
    """What a training run did, epochs before an interruption included."""

    epochs: tuple[EpochReport, ...]
    precision: str
    measure: str  # what validation says of every exit: accuracy, error (the mean absolute one), or perplexity

    @property
    def validation(self) -> tuple[float, ...]:
        """Return what every exit did after the last epoch, in its `measure`."""
        return self.epochs[-1].validation

    @property
    def seconds(self) -> float:
        """Return the wall-clock seconds of all epochs, validation included."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps."""
        return sum(epoch.steps for epoch in self.epochs)


@dataclass(frozen=True)
class Output:
    """Where a run is saved (None: nowhere), what the caller wants to find there, and whether a bar is drawn."""

    folder: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False


def train_model(
    checkpoint: Checkpoint,
    rows: TrainingRows,
    plan: Plan,
    output: Output = Output(),
    teacher: nn.Module | None = None,
) -> TrainReport:
    """Train the model of `checkpoint` in place and leave it in eval mode.

    With a folder, the run can be killed at any step and `resume_training` goes on from there. `teacher` answers the
    same inputs, for stages that weigh it. Raises OptionError, StorageError, and DataError if targets and model do not
    fit.
    """
    check_rows(checkpoint, rows)
    align_weights(checkpoint.model)
    with placed(device_from_name(plan.run.device), checkpoint.model, teacher):
        run = Run(checkpoint, rows, plan, optimizer_from_model(checkpoint.model, plan), output, teacher)
        if output.folder is not None:
            save_checkpoint(output.folder, checkpoint, bytes_from_snapshot(snapshot_of(run, Position())))
        return run_epochs(run, Position())


def resume_training(
    folder: Path, rows: TrainingRows, progress: bool = False, teacher: nn.Module | None = None
) -> TrainReport:
    """Go on with the run that was killed in `folder`, with its plan; the weights become the same.

    Raises DataError if there is nothing to resume, or if the rows are others than before.
    """
    snapshot = load_snapshot(folder)
    checkpoint = load_checkpoint(folder)
    check_rows(checkpoint, rows)
    if snapshot.sizes != rows.sizes():
        raise DataError(
            f"resuming {folder}: got rows to train on, with and without labels: {rows.sizes()}, before: "
            f"{snapshot.sizes}; give the same data and seed"
        )
    with placed(device_from_name(snapshot.plan.run.device), checkpoint.model, teacher):
        optimizer = optimizer_from_model(checkpoint.model, snapshot.plan)
        restore(snapshot, checkpoint.model, optimizer, folder)
        output = Output(folder, snapshot.extra, progress)
        return run_epochs(Run(checkpoint, rows, snapshot.plan, optimizer, output, teacher), snapshot.position)


@dataclass(frozen=True)
class Run:
    """All that the steps of one run share."""

    checkpoint: Checkpoint
    rows: TrainingRows
    plan: Plan
    optimizer: torch.optim.Optimizer
    output: Output
    teacher: nn.Module | None

    @property
    def model(self) -> nn.Module:
        """Return the model that is trained."""
        return self.checkpoint.model


@dataclass(frozen=True)
class EpochPlace:
    """One epoch of a run: its stage, that stage's first epoch, and its number of steps."""

    stage: Stage
    first: int
    epoch: int
    num_steps: int

    def stage_step(self, step: int) -> int:
        """Return how many steps of the stage are done before step `step` of this epoch."""
        return (self.epoch - self.first) * self.num_steps + step


def run_epochs(run: Run, position: Position) -> TrainReport:
    """Train from `position` to the end, validating after each epoch, and save the finished checkpoint."""
    with progress_bar(run.output.progress) as bar, forked_random_state():
        while position.epoch < run.plan.num_epochs:
            report = train_epoch(run, position, bar)
            position = Position((*position.epochs, report))
            if run.output.folder is not None:
                finished = position.epoch == run.plan.num_epochs
                state = None if finished else bytes_from_snapshot(snapshot_of(run, position))
                save_checkpoint(run.output.folder, run.checkpoint, state)
    run.model.eval()
    precision = precision_on(device_of(run.model), run.plan.run.precision)
    return TrainReport(position.epochs, precision, measure_of(run.rows.validation))


def train_epoch(run: Run, position: Position, bar: Progress) -> EpochReport:
    """Take the steps of one epoch that are not done yet, then validate."""
    started = time.perf_counter() - position.seconds
    stage, first = run.plan.stage_of(position.epoch)
    rows = stage_rows(run, stage)
    options = run.plan.run
    place = EpochPlace(stage, first, position.epoch, math.ceil(len(rows.targets) / options.batch_size))
    task = bar.add_task(f"epoch {place.epoch + 1}/{run.plan.num_epochs}", total=place.num_steps, loss=math.nan)
    bar.advance(task, position.step)
    losses = take_steps(run, place, rows, position, started, (bar, task))
    set_annealed(run.model, stage.anneal, place.epoch + 1 - place.first)
    validation = quality_per_exit(run.model, run.rows.validation)
    return EpochReport(sum(losses) / len(losses), validation, time.perf_counter() - started, len(losses))


def take_steps(
    run: Run, place: EpochPlace, rows: Rows, position: Position, started: float, shown: tuple[Progress, TaskID]
) -> list[float]:
    """Take the steps of an epoch from `position` on; returns the losses of all its steps."""
    seed = epoch_seed(run.plan.run.seed, place.epoch)
    seed_all(seed)
    if position.random is not None:
        set_random_state(position.random)
    losses = list(position.losses)
    learners: Learners | None = None
    saved = time.perf_counter()
    batches = islice(rows.batches(run.plan.run.batch_size, seed), position.step, None)
    with layers_dropped(run.model, place.stage.layer_dropout):
        for step, batch in enumerate(batches, start=position.step):
            wanted = place.stage.chosen.learns(place.stage_step(step))
            if wanted != learners:
                set_learners(run.model, learners := wanted, run.plan.run.frozen)
            losses.append(take_step(run, place, step, batch))
            shown[0].update(shown[1], advance=1, loss=losses[-1])
            if run.output.folder is not None and is_due(run.plan.run, step + 1, saved):
                seconds = time.perf_counter() - started
                now = Position(position.epochs, tuple(losses), seconds, random_state())
                save_snapshot(run.output.folder, snapshot_of(run, now))
                saved = time.perf_counter()
    return losses


def take_step(run: Run, place: EpochPlace, step: int, batch: Batch) -> float:
    """Take one step; returns the loss."""
    stage, options = place.stage, run.plan.run
    done = place.stage_step(step)
    set_learning_rates(run.optimizer, stage, done, stage.epochs * place.num_steps)
    set_annealed(run.model, stage.anneal, done / place.num_steps)
    device = device_of(run.model)
    with products(options.precision, device):
        answers = answers_of(run.model, batch, run.teacher if stage.loss.teacher_weight > 0 else None)
    loss = step_loss(stage.chosen, stage.loss, answers, torch.from_numpy(batch.targets).to(device), done)
    run.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    run.optimizer.step()
    return checked_loss(loss, place.epoch, step)


def stage_rows(run: Run, stage: Stage) -> Rows:
    """Return the rows that a stage learns from: those without labels too, where its strategy has a use for them."""
    return joined(run.rows.train, run.rows.unlabelled) if stage.chosen.takes_unlabelled else run.rows.train


def is_due(options: RunOptions, num_steps: int, saved: float) -> bool:
    """Tell whether a snapshot is to be written after `num_steps` steps of an epoch, the last one at time `saved`."""
    by_steps = options.snapshot_steps > 0 and num_steps % options.snapshot_steps == 0
    return by_steps or time.perf_counter() - saved > options.snapshot_seconds


def snapshot_of(run: Run, position: Position) -> Snapshot:
    """Return all that resuming at `position` needs."""
    return Snapshot(
        run.plan,
        position,
        run.model.state_dict(),
        run.optimizer.state_dict(),
        run.rows.sizes(),
        run.output.extra,
    )


def align_weights(model: nn.Module) -> None:
    """Move all weights to memory of their own, as a resumed run has them.

    Pretrained ones lie in the middle of a file's, and products of a single row or column then round differently (1e-7
    seen in a regression head), so that a resumed run would not end with the same bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def checked_loss(loss: Tensor, epoch: int, step: int) -> float:
    """Return the loss as a number; OptionError if training has diverged."""
    value = float(loss.item())
    if not math.isfinite(value):
        raise OptionError(
            f"training, epoch {epoch + 1}, step {step + 1}: the loss is {value}; lower encoder_lr and head_lr"
        )
    return value


def optimizer_from_model(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    """Build AdamW with one learning rate for the heads and one for the rest; what the plan freezes is left out."""
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(plan.run.frozen):
            part = "head" if name.startswith(HEADS) else "encoder"
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)  # biases, LayerNorm: one axis
    return torch.optim.AdamW(
        [
            {"params": parameters, "part": part, "weight_decay": plan.run.weight_decay if decays else 0.0}
            for (part, decays), parameters in groups.items()
        ],
        lr=plan.stages[0].encoder_lr,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, stage: Stage, step: int, num_steps: int) -> None:
    """Set both learning rates for one step of a stage."""
    scale = learning_rate_scale(step, num_steps, stage.warmup_ratio)
    for group in optimizer.param_groups:
        group["lr"] = scale * (stage.head_lr if group["part"] == "head" else stage.encoder_lr)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch, so that a resumed run draws what the uninterrupted one would have."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def check_rows(checkpoint: Checkpoint, rows: TrainingRows) -> None:
    """Raise DataError unless targets and model fit and there is something to train on."""
    num_train, num_validation = len(rows.train.targets), len(rows.validation.targets)
    if not num_train or not num_validation:
        raise DataError(
            f"training: got {num_train} rows to train on and {num_validation} to validate, expected at least 1 each"
        )
    num_classes = checkpoint.num_classes
    for targets in (rows.train.targets, rows.validation.targets):
        is_value = np.issubdtype(targets.dtype, np.floating)
        if is_value != (num_classes == 1) or (not is_value and int(targets.max()) >= num_classes):
            raise DataError(
                f"training: got targets of {targets.dtype} up to {targets.max()}, the model answers with "
                f"{num_classes} numbers; expected float32 values for 1, classes below {num_classes} otherwise"
            )


@contextmanager
def progress_bar(shown: bool) -> Iterator[Progress]:
    """Open a progress bar on stderr, or one that draws nothing."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        yield bar
