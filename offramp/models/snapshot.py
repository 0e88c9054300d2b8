"""What a killed run resumes from: one file, written whole or not at all, with everything that later steps depend on.

Weights, optimizer, random generators, the place in the run and what it has reported so far; data order and rates
follow from seed and place. Resuming gives, on one machine's CPU, the weights of the run that was never killed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offramp.errors import DataError
from offramp.models.options import options_from_dict
from offramp.models.plan import Plan
from offramp.storage import write_file

TRAINING_FILE = "training.pt"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class EpochReport:
    """One epoch: mean training loss, what every exit did on the validation rows, wall-clock seconds.

    `validation` is the accuracy of every exit, its mean absolute error in a regression, or its perplexity.
    """

    loss: float
    validation: tuple[float, ...]
    seconds: float
    steps: int


@dataclass(frozen=True)
class Position:
    """Where a run is: `step` batches of epoch `epoch` are done, with these losses, after `seconds` of that epoch.

    `random` is the state of the generators there; None at the beginning of an epoch, which seeds them.
    """

    epochs: tuple[EpochReport, ...] = ()
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    random: dict[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """Return the epoch, from 0."""
        return len(self.epochs)

    @property
    def step(self) -> int:
        """Return the batches of the epoch that are done."""
        return len(self.losses)


@dataclass(frozen=True)
class Snapshot:
    """A run that has come to `position`; `model` and `optimizer` are state dicts, `extra` is the caller's."""

    plan: Plan
    position: Position
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    sizes: list[int]
    extra: Mapping[str, Any]


def save_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write the snapshot into the checkpoint directory `folder`, replacing an older one. Raises StorageError."""
    write_file(folder / TRAINING_FILE, bytes_from_snapshot(snapshot))


def bytes_from_snapshot(snapshot: Snapshot) -> bytes:
    """Return the content of the file."""
    state = {
        "version": FORMAT_VERSION,
        "plan": asdict(snapshot.plan),
        "position": asdict(snapshot.position),
        "model": dict(snapshot.model),
        "optimizer": dict(snapshot.optimizer),
        "sizes": snapshot.sizes,
        "extra": dict(snapshot.extra),
    }
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def load_snapshot(folder: Path) -> Snapshot:
    """Read the snapshot of an unfinished run; DataError if it is missing or damaged."""
    file = folder / TRAINING_FILE
    if not file.is_file():
        raise DataError(f"resuming {folder}: no {TRAINING_FILE}, so training there is finished or was never begun")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["version"] != FORMAT_VERSION:
            raise ValueError(f"format version {state['version']}, this offramp reads {FORMAT_VERSION}")
        return Snapshot(
            plan=options_from_dict(Plan, state["plan"], "plan"),
            position=options_from_dict(Position, state["position"], "position"),
            model=state["model"],
            optimizer=state["optimizer"],
            sizes=list(state["sizes"]),
            extra=state["extra"],
        )
    except Exception as exc:  # torch.load raises UnpicklingError, RuntimeError, EOFError, OSError and more
        raise DataError(f"resuming {folder}: {TRAINING_FILE}: {exc!r}; train again without resuming") from exc


def restore(snapshot: Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer, where: Path) -> None:
    """Put a snapshot's weights and moments into a model and its optimizer; DataError if they do not fit."""
    try:
        model.load_state_dict(snapshot.model)
        optimizer.load_state_dict(dict(snapshot.optimizer))
    except (KeyError, TypeError, ValueError, RuntimeError) as exc:
        raise DataError(f"resuming {where}: its training state does not fit: {exc}; train again") from exc
