"""Training a classifier with exits, resumable after every epoch.

First encoder and heads together on the labelled texts; then, where there are texts without labels, the heads before
the final one alone, on what the final exit answers. It trains what it is given and saves where it is told; choosing
an encoder and data is the caller's.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from offramp.errors import DataError, OptionError
from offramp.models.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_training_state,
    save_checkpoint,
)
from offramp.models.data import (
    Batch,
    TextExample,
    TextSplits,
    batches,
    labels_of,
    load_tokenizer,
    texts_of,
    token_ids,
)
from offramp.models.encoder import EarlyExitEncoder
from offramp.models.losses import EARLY_WEIGHT, ExitLoss, distillation_loss, exit_weights, joint_loss
from offramp.trace import UNKNOWN

Precision = Literal["auto", "float32", "bfloat16"]

WEIGHT_DECAY = 0.01  # arXiv 1810.04805, appendix A.2; not on biases and LayerNorm
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class TrainOptions:
    """How to train; the defaults are the recipe measured in docs/log.md. Raises OptionError.

    `epochs` train everything, `distil_epochs` after them the early heads alone. `precision` is that of the matrix
    products; weights stay float32. "auto" takes bfloat16 where the CPU has instructions for it.
    """

    epochs: int = 2
    distil_epochs: int = 1
    batch_size: int = 32
    encoder_lr: float = 1e-4
    head_lr: float = 1e-3
    warmup_ratio: float = 0.1
    early_weight: float = EARLY_WEIGHT
    seed: int = 0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("distil_epochs", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise OptionError(f"{name}: got {getattr(self, name)}, expected {least} or more")
        for name in ("encoder_lr", "head_lr", "early_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise OptionError(f"{name}: got {getattr(self, name)}, expected a finite number from 0")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise OptionError(f"warmup_ratio: got {self.warmup_ratio}, expected a number in [0, 1]")
        if self.precision not in get_args(Precision):
            raise OptionError(f"precision: got {self.precision!r}, expected one of {get_args(Precision)}")


@dataclass(frozen=True)
class EpochReport:
    """One epoch: mean training loss, accuracy of every exit on the validation split, wall-clock seconds."""

    loss: float
    validation_accuracy: tuple[float, ...]
    seconds: float
    steps: int


@dataclass(frozen=True)
class TrainReport:
    """What a training run did, epochs before an interruption included."""

    epochs: tuple[EpochReport, ...]
    precision: str

    @property
    def validation_accuracy(self) -> tuple[float, ...]:
        """Return the accuracy of every exit after the last epoch."""
        return self.epochs[-1].validation_accuracy

    @property
    def seconds(self) -> float:
        """Return the wall-clock seconds of all epochs, validation included."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps."""
        return sum(epoch.steps for epoch in self.epochs)


@dataclass(frozen=True)
class TokenisedTexts:
    """Token ids of every text, not padded, and its label."""

    rows: Sequence[Sequence[int]]
    labels: Sequence[int]


def train_classifier(
    checkpoint: Checkpoint,
    splits: TextSplits,
    options: TrainOptions,
    out: Path | None = None,
    progress: bool = False,
) -> TrainReport:
    """Train the model of `checkpoint` in place and leave it in eval mode.

    With `out`, the checkpoint is saved there after every epoch, and `resume_training` can go on from it. With
    `progress`, a bar is drawn on stderr. Raises OptionError, StorageError, and DataError if labels and
    classes do not fit.
    """
    check_labels(checkpoint, splits)
    optimizer = optimizer_from_model(checkpoint.model, options)
    return run_epochs(Run(checkpoint, splits, options, optimizer, out, progress), ())


def resume_training(out: Path, splits: TextSplits, progress: bool = False) -> TrainReport:
    """Go on with the run that was interrupted in `out`, with its options; the weights become the same.

    Raises DataError if there is nothing to resume, or if the training texts are others than before.
    """
    state = load_training_state(out)
    checkpoint = load_checkpoint(out)
    check_labels(checkpoint, splits)
    try:
        if state["num_train"] != (sizes := [len(splits.train), len(splits.unlabelled)]):
            raise DataError(
                f"resuming {out}: got texts to train on, with and without labels: {sizes}, before: "
                f"{state['num_train']}; give the same data and seed"
            )
        options = TrainOptions(**state["options"])
        optimizer = optimizer_from_model(checkpoint.model, options)
        optimizer.load_state_dict(state["optimizer"])
        done = tuple(epoch_from_dict(epoch) for epoch in state["epochs"])
    except (KeyError, TypeError, ValueError) as exc:
        if isinstance(exc, DataError):
            raise
        raise DataError(f"resuming {out}: its training state does not fit: {exc!r}; train again") from exc
    return run_epochs(Run(checkpoint, splits, options, optimizer, out, progress), done)


@dataclass(frozen=True)
class Run:
    """All that the epochs of one run share."""

    checkpoint: Checkpoint
    splits: TextSplits
    options: TrainOptions
    optimizer: torch.optim.Optimizer
    out: Path | None
    progress: bool


@dataclass(frozen=True)
class Stage:
    """Epochs `first` to `last`, exclusive, and what they have in common."""

    first: int
    last: int
    texts: TokenisedTexts
    loss: ExitLoss
    heads_only: bool  # train the heads before the final one and nothing else


def stages_of(run: Run) -> tuple[Stage, ...]:
    """Return the stages of a run: the second only with early exits and texts without labels."""
    labelled = tokenised(run.checkpoint, run.splits.train)
    num_epochs, num_all = run.options.epochs, num_epochs_of(run)
    joint = Stage(0, num_epochs, labelled, joint_loss, heads_only=False)
    if num_all == num_epochs:
        return (joint,)
    extra = tokenised(run.checkpoint, [TextExample(text, UNKNOWN) for text in run.splits.unlabelled])
    texts = TokenisedTexts([*labelled.rows, *extra.rows], [*labelled.labels, *extra.labels])
    return joint, Stage(num_epochs, num_all, texts, distillation_loss, heads_only=True)


def num_epochs_of(run: Run) -> int:
    """Return the number of epochs of all stages."""
    has_second = run.splits.unlabelled and len(run.checkpoint.model.heads) > 1
    return run.options.epochs + (run.options.distil_epochs if has_second else 0)


def run_epochs(run: Run, done: tuple[EpochReport, ...]) -> TrainReport:
    """Train the epochs that are not `done`, validating and saving after each."""
    stages = stages_of(run)
    validation = tokenised(run.checkpoint, run.splits.validation)
    epochs = list(done)
    with progress_bar(run.progress) as bar:
        for epoch in range(len(done), stages[-1].last):
            start = time.perf_counter()
            stage = next(stage for stage in stages if epoch < stage.last)
            loss, steps = train_epoch(run, stage, epoch, bar)
            accuracy = accuracy_of(run.checkpoint.model, validation)
            epochs.append(EpochReport(loss, accuracy, time.perf_counter() - start, steps))
            if run.out is not None:
                save_checkpoint(run.out, run.checkpoint, training_state(run, epochs))
    run.checkpoint.model.eval()
    return TrainReport(tuple(epochs), precision_of_cpu(run.options.precision))


def train_epoch(run: Run, stage: Stage, epoch: int, bar: Progress) -> tuple[float, int]:
    """Take one step per batch; returns the mean loss and the number of steps."""
    model, options = run.checkpoint.model, run.options
    set_trained(model, stage.heads_only)
    texts = stage.texts
    num_steps = math.ceil(len(texts.rows) / options.batch_size)
    weights = exit_weights(len(model.config.exits), options.early_weight)
    bfloat16 = precision_of_cpu(options.precision) == "bfloat16"
    task = bar.add_task(f"epoch {epoch + 1}/{num_epochs_of(run)}", total=num_steps, loss=math.nan)
    seed = epoch_seed(options.seed, epoch)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step, batch in enumerate(batches(texts.rows, texts.labels, options.batch_size, seed)):
            done, last = (epoch - stage.first) * num_steps + step, (stage.last - stage.first) * num_steps
            set_learning_rates(run.optimizer, options, done, last)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                logits = logits_of(model, batch)  # E tensors (N, C)
            loss = stage.loss(logits, torch.from_numpy(batch.labels), weights)
            run.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            run.optimizer.step()
            losses.append(checked_loss(loss, epoch, step))
            bar.update(task, advance=1, loss=losses[-1])
    return sum(losses) / len(losses), len(losses)


def set_trained(model: EarlyExitEncoder, heads_only: bool) -> None:
    """Say what learns, and drops out: all but the word table, or only the heads before the final one.

    What does not learn gets no gradient, and AdamW passes over it, weight decay included.
    """
    model.train(not heads_only).requires_grad_(not heads_only)
    if heads_only:
        for head in list(model.heads)[:-1]:
            head.train().requires_grad_(True)
    model.embeddings.word_embeddings.weight.requires_grad_(False)


def checked_loss(loss: Tensor, epoch: int, step: int) -> float:
    """Return the loss as a number; OptionError if training has diverged."""
    value = float(loss.item())
    if not math.isfinite(value):
        raise OptionError(
            f"training, epoch {epoch + 1}, step {step + 1}: the loss is {value}; lower encoder_lr and head_lr"
        )
    return value


def logits_of(model: EarlyExitEncoder, batch: Batch) -> tuple[Tensor, ...]:
    """Run the model on a batch; one (N, C) per exit."""
    logits: tuple[Tensor, ...] = model(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask))
    return logits


def optimizer_from_model(model: EarlyExitEncoder, options: TrainOptions) -> torch.optim.AdamW:
    """Build AdamW with one learning rate for the encoder and one for the heads; the word table is frozen.

    Half of MiniLM's parameters are the word table; leaving it frozen cost no accuracy (docs/log.md) and saves
    its gradient and two moments.
    """
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "head" if name.startswith("heads.") else "encoder"
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)  # biases, LayerNorm: one axis
    return torch.optim.AdamW(
        [
            {"params": parameters, "part": part, "weight_decay": WEIGHT_DECAY if decays else 0.0}
            for (part, decays), parameters in groups.items()
        ],
        lr=options.encoder_lr,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, options: TrainOptions, step: int, num_steps: int) -> None:
    """Set both learning rates for one step."""
    scale = learning_rate_scale(step, num_steps, options.warmup_ratio)
    for group in optimizer.param_groups:
        group["lr"] = scale * (options.head_lr if group["part"] == "head" else options.encoder_lr)


def learning_rate_scale(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Return the share of the peak rate at a step, in (0, 1]: up in a line, then down in a line."""
    num_warmup = math.ceil(warmup_ratio * num_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return (num_steps - step) / (num_steps - num_warmup)


def precision_of_cpu(precision: Precision) -> Literal["float32", "bfloat16"]:
    """Resolve "auto": bfloat16 where the CPU multiplies it in hardware (AVX512_BF16 or AMX), else float32.

    Elsewhere bfloat16 is emulated and slower than float32.
    """
    if precision != "auto":
        return precision
    capabilities = torch.cpu.get_capabilities()
    in_hardware = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if in_hardware else "float32"


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch, so that a resumed run draws what the uninterrupted one would have."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def training_state(run: Run, epochs: Sequence[EpochReport]) -> dict[str, Any] | None:
    """Return what resuming needs, or None after the last epoch."""
    if len(epochs) == num_epochs_of(run):
        return None
    return {
        "options": asdict(run.options),
        "optimizer": run.optimizer.state_dict(),
        "epochs": [asdict(epoch) for epoch in epochs],
        "num_train": [len(run.splits.train), len(run.splits.unlabelled)],
    }


def epoch_from_dict(epoch: dict[str, Any]) -> EpochReport:
    """Rebuild the report of an epoch from a training state."""
    return EpochReport(**{**epoch, "validation_accuracy": tuple(epoch["validation_accuracy"])})


def accuracy_per_exit(checkpoint: Checkpoint, examples: Sequence[TextExample]) -> tuple[float, ...]:
    """Return the share of texts that each exit classifies right, in float32; OptionError without texts."""
    if not examples:
        raise OptionError("measuring accuracy: got no texts")
    return accuracy_of(checkpoint.model, tokenised(checkpoint, examples))


def accuracy_of(model: EarlyExitEncoder, texts: TokenisedTexts) -> tuple[float, ...]:
    """Return the accuracy of every exit; leaves the model in eval mode."""
    model.eval()
    num_right = np.zeros(len(model.config.exits), dtype=np.int64)  # (E,)
    with torch.inference_mode():
        for batch in batches(texts.rows, texts.labels, EVALUATION_BATCH, seed=0):
            labels = torch.from_numpy(batch.labels)
            logits = torch.stack(logits_of(model, batch))  # (E, N, C)
            num_right += (logits.argmax(dim=-1) == labels).sum(dim=-1).numpy()
    return tuple(float(right) / len(texts.rows) for right in num_right)


def tokenised(checkpoint: Checkpoint, examples: Sequence[TextExample]) -> TokenisedTexts:
    """Tokenise examples the way the checkpoint says."""
    tokenizer = load_tokenizer(checkpoint.tokenizer_path, checkpoint.max_length)
    return TokenisedTexts(token_ids(tokenizer, texts_of(examples)), labels_of(examples))


def check_labels(checkpoint: Checkpoint, splits: TextSplits) -> None:
    """Raise DataError unless texts and model have the same classes and there is something to train on."""
    if splits.label_names != checkpoint.label_names:
        raise DataError(
            f"training: got texts of classes {splits.label_names}, the model has {checkpoint.label_names}; "
            "make the model with the label names of the texts"
        )
    if not splits.train or not splits.validation:
        raise DataError(
            f"training: got {len(splits.train)} texts to train on and {len(splits.validation)} to validate, "
            "expected at least 1 each"
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
