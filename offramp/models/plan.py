"""How to train: a run's options and its stages, one after another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from offramp.errors import OptionError
from offramp.models.devices import Precision
from offramp.models.strategies import STRATEGIES, LossOptions, Strategy, check_from_zero

WEIGHT_DECAY = 0.01  # arXiv 1810.04805, appendix A.2; not on biases and LayerNorm
# Half of MiniLM's parameters are the word table; leaving it frozen cost no accuracy (docs/log.md) and saves its
# gradient and two moments.
FROZEN = ("embeddings.word_embeddings.", "encoder.embeddings.word_embeddings.")


@dataclass(frozen=True)
class RunOptions:
    """What all stages of a run share. Raises OptionError.

    `device` is cpu, cuda, cuda:1 …; "auto" takes a GPU where there is one. `precision` is that of the matrix products;
    weights stay float32. "auto" takes bfloat16 where the device has instructions for it. Parameters whose names begin
    with one of `frozen` never learn. With `from_teacher` the model begins with what its teacher has of it. A snapshot
    that a killed run resumes from is written every `snapshot_steps` steps (0: none) and when `snapshot_seconds` have
    passed; neither changes the weights.
    """

    batch_size: int = 32
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    weight_decay: float = WEIGHT_DECAY
    frozen: tuple[str, ...] = FROZEN
    from_teacher: bool = False
    snapshot_seconds: float = 60.0
    snapshot_steps: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("seed", 0), ("snapshot_steps", 0)):
            check_at_least(name, getattr(self, name), least)
        check_from_zero("weight_decay", self.weight_decay)
        if not self.snapshot_seconds > 0:
            raise OptionError(f"snapshot_seconds: got {self.snapshot_seconds}, expected a positive number")
        if self.precision not in get_args(Precision):
            raise OptionError(f"precision: got {self.precision!r}, expected one of {get_args(Precision)}")


@dataclass(frozen=True)
class Stage:
    """Some epochs with one strategy; learning rates warm up and fall to 0 within them. Raises OptionError.

    `encoder_lr` is the rate of all parameters outside the heads. `anneal` gives numbers that the model reads in
    forward, by attribute: one value for the beginning and one for the end of every epoch (`schedule.annealed`).
    `layer_dropout` is how often the last layer is skipped (`schedule.layer_rates`).
    """

    strategy: str = "joint"
    epochs: int = 2
    encoder_lr: float = 1e-4
    head_lr: float = 1e-3
    warmup_ratio: float = 0.1
    loss: LossOptions = field(default_factory=LossOptions)
    layer_dropout: float = 0.0
    anneal: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_at_least("epochs", self.epochs, 1)
        for name in ("encoder_lr", "head_lr"):
            check_from_zero(name, getattr(self, name))
        for name, most in (("warmup_ratio", 1.0), ("layer_dropout", 1.0)):
            if not 0.0 <= getattr(self, name) <= most:
                raise OptionError(f"{name}: got {getattr(self, name)}, expected a number in [0, {most:g}]")
        if self.strategy not in STRATEGIES:
            raise OptionError(f"strategy: got {self.strategy!r}, expected one of {', '.join(STRATEGIES)}")
        for name, values in self.anneal.items():
            if not values or not all(math.isfinite(value) for value in values):
                raise OptionError(f"anneal: got {name} = {values}, expected finite numbers, at least one")

    @property
    def chosen(self) -> Strategy:
        """Return the strategy itself."""
        return STRATEGIES[self.strategy]


@dataclass(frozen=True)
class Plan:
    """The stages of a run and what they share. Raises OptionError without stages."""

    stages: tuple[Stage, ...]
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if not self.stages:
            raise OptionError("plan: got no stages, expected at least one")

    @property
    def num_epochs(self) -> int:
        """Return the epochs of all stages."""
        return sum(stage.epochs for stage in self.stages)

    def stage_of(self, epoch: int) -> tuple[Stage, int]:
        """Return the stage that an epoch of the run belongs to, and that stage's first epoch."""
        first = 0
        for stage in self.stages:
            if epoch < first + stage.epochs:
                return stage, first
            first += stage.epochs
        raise AssertionError(f"epoch {epoch} of {self.num_epochs}")


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise OptionError unless `value` is at least `least`."""
    if value < least:
        raise OptionError(f"{name}: got {value}, expected {least} or more")
