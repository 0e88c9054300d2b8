"""Training strategies: what a step minimises and what learns from it. One loop (`train.py`) runs them all.

A strategy is a frozen object of two small functions; a stage of a recipe names one and weighs it (`LossOptions`).
Two-stage training is the stages `final` and then `early_heads`; the demo is `joint`, then `labels_or_answers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from offramp.errors import OptionError
from offramp.models.losses import (
    EARLY_WEIGHT,
    Answers,
    calibration_loss,
    confidence_loss,
    exit_loss,
    exit_weights,
    halting_loss,
    halting_weights,
    joint_loss,
    labels_or_answers_loss,
    linear_weights,
    self_distillation_loss,
    teacher_loss,
)

Learners = Literal["all", "early_heads", "final"]  # final: everything but the heads before the final one
WeightRule = Literal["early", "equal", "linear"]
StrategyLoss = Callable[[Answers, Tensor, Sequence[float], int], Tensor]
HEADS = ("heads.", "decoder.exits.")  # of the names of parameters: those of the exits


@dataclass(frozen=True)
class LossOptions:
    """How a strategy weighs exits and terms. Raises OptionError.

    `weights` are one number per exit, final one last; without them `rule` makes them: "early" gives `early_weight` to
    all exits before the final one, "linear" (k + 1) / E to exit k, "equal" 1 to all. The other terms are added where
    their weight is above 0: a teacher's answers for the final exit, the exits' calibration, learned confidences, and
    penalties: what pondering costs (strategy act) and what the model itself wants small, such as an uneven load of
    experts.
    """

    weights: tuple[float, ...] = ()
    rule: WeightRule = "early"
    early_weight: float = EARLY_WEIGHT
    temperature: float = 2.0  # of teacher and calibration; arXiv 2510.12856, section 6
    teacher_weight: float = 0.0  # 0.5 there
    calibration_weight: float = 0.0
    confidence_weight: float = 0.0
    penalty_weight: float = 0.01  # arXiv 2101.03961, section 2.2; arXiv 1603.08983, section 3

    def __post_init__(self) -> None:
        if self.rule not in get_args(WeightRule):
            raise OptionError(f"rule: got {self.rule!r}, expected one of {get_args(WeightRule)}")
        for name in ("early_weight", "teacher_weight", "calibration_weight", "confidence_weight", "penalty_weight"):
            check_from_zero(name, getattr(self, name))
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise OptionError(f"temperature: got {self.temperature}, expected a positive number")
        for weight in self.weights:
            check_from_zero("weights", weight)

    def exit_weights(self, num_exits: int) -> tuple[float, ...]:
        """Return one weight per exit; OptionError if other numbers were given."""
        if self.weights:
            if len(self.weights) != num_exits:
                raise OptionError(f"weights: got {len(self.weights)} for {num_exits} exits; give one per exit")
            return self.weights
        if self.rule == "early":
            return exit_weights(num_exits, self.early_weight)
        return linear_weights(num_exits) if self.rule == "linear" else (1.0,) * num_exits


@dataclass(frozen=True)
class Strategy:
    """`loss` of a step from answers, targets, one weight per exit and the step's number; who `learns` at that step.

    A strategy that `takes_unlabelled` also sees the rows that have no labels, with the target UNKNOWN; one that
    `ponders` is charged for the exits that it asks.
    """

    loss: StrategyLoss
    learns: Callable[[int], Learners] = field(default=lambda step: "all")
    takes_unlabelled: bool = False
    ponders: bool = False


def joint(answers: Answers, targets: Tensor, weights: Sequence[float], step: int) -> Tensor:
    """Every exit on its own label."""
    return joint_loss(answers.logits, targets, weights)


def final(answers: Answers, targets: Tensor, weights: Sequence[float], step: int) -> Tensor:
    """The final exit alone: what a model without exits learns."""
    return weights[-1] * exit_loss(answers.logits[-1], targets)


def early_heads(answers: Answers, targets: Tensor, weights: Sequence[float], step: int) -> Tensor:
    """The exits before the final one on their labels."""
    return joint_loss(answers.logits[:-1], targets, weights[:-1])


def alternating(answers: Answers, targets: Tensor, weights: Sequence[float], step: int) -> Tensor:
    """Even steps: the early heads alone; odd steps: the final exit with all that it stands on."""
    return early_heads(answers, targets, weights, step) if _early_turn(step) else final(answers, targets, weights, step)


def berxit(answers: Answers, targets: Tensor, weights: Sequence[float], step: int) -> Tensor:
    """Even steps: all exits together; odd steps: the final one (BERxiT, EACL 2021, section 3.2)."""
    return joint(answers, targets, weights, step) if _early_turn(step) else final(answers, targets, weights, step)


def self_distillation(answers: Answers, targets: Tensor, weights: Sequence[float], step: int) -> Tensor:
    """The early heads on what the final exit answers."""
    return self_distillation_loss(answers.logits, targets, weights)


def labels_or_answers(answers: Answers, targets: Tensor, weights: Sequence[float], step: int) -> Tensor:
    """The early heads on their labels, and on the final exit's answers where there is none."""
    return labels_or_answers_loss(answers.logits, targets, weights)


def act(answers: Answers, targets: Tensor, weights: Sequence[float], step: int) -> Tensor:
    """The mean of all exits' logits, weighed by when a row halts (Graves, arXiv 1603.08983); weights are not read.

    What the gates learn is converted as it is: the halting probability is the exit's learned score, by which policies
    let rows leave.
    """
    return halting_loss(answers.logits, halting_weights(answers.learned[:-1])[0], targets)


def _early_turn(step: int) -> bool:
    return step % 2 == 0


STRATEGIES: dict[str, Strategy] = {
    "joint": Strategy(joint),
    "final": Strategy(final, lambda step: "final"),
    "early_heads": Strategy(early_heads, lambda step: "early_heads"),
    "alternating": Strategy(alternating, lambda step: "early_heads" if _early_turn(step) else "final"),
    "berxit": Strategy(berxit, lambda step: "all" if _early_turn(step) else "final"),
    "act": Strategy(act, ponders=True),
    "self_distillation": Strategy(self_distillation, lambda step: "early_heads", takes_unlabelled=True),
    "labels_or_answers": Strategy(labels_or_answers, lambda step: "early_heads", takes_unlabelled=True),
}


def step_loss(strategy: Strategy, options: LossOptions, answers: Answers, targets: Tensor, step: int) -> Tensor:
    """Return what one step minimises: the strategy's loss and the terms that `options` gives a weight.

    targets: (N,), or (N, T) where the rows of `answers` are N x T positions.
    """
    weights, targets = options.exit_weights(len(answers.logits)), targets.flatten()
    terms = [strategy.loss(answers, targets, weights, step)]
    if options.teacher_weight > 0 and strategy.learns(step) != "early_heads":
        terms.append(options.teacher_weight * teacher_loss(answers, options.temperature))
    if options.calibration_weight > 0:
        early = len(weights) - (strategy.learns(step) == "early_heads")
        loss = calibration_loss(answers.logits[:early], targets, weights[:early], options.temperature)
        terms.append(options.calibration_weight * loss)
    if options.confidence_weight > 0 and strategy.learns(step) != "final":
        terms.append(options.confidence_weight * confidence_loss(answers, targets))
    if options.penalty_weight > 0:
        terms += [options.penalty_weight * penalty for penalty in answers.penalties]
        if strategy.ponders:
            terms.append(options.penalty_weight * halting_weights(answers.learned[:-1])[1].mean())
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def set_learners(model: nn.Module, learners: Learners, frozen: Sequence[str]) -> None:
    """Say what learns, and drops out: all, the early heads alone, or all but those; never a name in `frozen`.

    Names are prefixes of parameter names. What does not learn gets no gradient, and AdamW passes over it, weight decay
    included.
    """
    model.train(learners != "early_heads").requires_grad_(learners != "early_heads")
    for head in early_heads_of(model):
        head.train(learners != "final").requires_grad_(learners != "final")
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(frozen)):
            parameter.requires_grad_(False)


def early_heads_of(model: nn.Module) -> list[nn.Module]:
    """Return the heads before the final one: `model.heads` without its last. Raises OptionError without heads."""
    heads = getattr(model, "heads", None)
    if not isinstance(heads, nn.ModuleList):
        raise OptionError(f"training {type(model).__name__}: it has no ModuleList called heads, one head per exit")
    return list(heads)[:-1]


def check_from_zero(name: str, value: float) -> None:
    """Raise OptionError unless `value` is a finite number from 0."""
    if not (math.isfinite(value) and value >= 0):
        raise OptionError(f"{name}: got {value}, expected a finite number from 0")
