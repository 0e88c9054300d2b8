"""Losses over all exits at once, each a function of what the exits say, the targets and one weight per exit.

Classes are learned by cross-entropy, values (float targets) by squared error. What is never done here: choosing which
parts of the model learn from a loss; that is a strategy (`strategies.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from offramp.errors import OptionError
from offramp.trace import UNKNOWN

EARLY_WEIGHT = 0.3  # arXiv 2510.12856, section 4: lambda of an early exit
HALTING_EPSILON = 0.01  # arXiv 1603.08983, section 2.1
FINAL_WEIGHT = 1.0  # the same: lambda of the final exit


@dataclass(frozen=True)
class Answers:
    """What E exits say about N rows: logits (N, C) each, a learned confidence (N,) in [0, 1] or None each.

    C is 1 for a regression: the value itself. A language model's rows are positions. `teacher` are the logits (N, C) of
    another model, if there is one; `penalties` are numbers that the model itself wants small.
    """

    logits: tuple[Tensor, ...]
    learned: tuple[Tensor | None, ...]
    teacher: Tensor | None = None
    penalties: tuple[Tensor, ...] = ()


def answers_from_exits(exits: Sequence[Any], teacher: Tensor | None = None) -> Answers:
    """Sort what a model's forward returns: one tensor of logits per exit, or a NamedTuple that holds one."""
    return Answers(
        tuple(said if isinstance(said, Tensor) else said.logits for said in exits),
        tuple(None if isinstance(said, Tensor) else getattr(said, "learned", None) for said in exits),
        teacher,
        tuple(found for said in exits if (found := getattr(said, "penalty", None)) is not None),
    )


def exit_weights(num_exits: int, early_weight: float = EARLY_WEIGHT) -> tuple[float, ...]:
    """Return the weight of every exit, the final one last."""
    return (early_weight,) * (num_exits - 1) + (FINAL_WEIGHT,)


def linear_weights(num_exits: int) -> tuple[float, ...]:
    """Return weights that grow with depth, (k + 1) / E: deeper exits count more."""
    return tuple((k + 1) / num_exits for k in range(num_exits))


def exit_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of one exit, averaged over rows: cross-entropy for classes, squared error for values."""
    if targets.is_floating_point():
        return functional.mse_loss(logits.float()[:, 0], targets)
    return functional.cross_entropy(logits.float(), targets)


def joint_loss(logits: Sequence[Tensor], targets: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum over exits of the loss of each (arXiv 2510.12856, equation 1).

    logits: one (N, C) per exit; targets: (N,), classes or values; weights: one per exit; the result is a scalar,
    averaged over rows, not over weights. Raises OptionError if weights and exits differ in number.
    """
    _check_weights(logits, weights)
    losses = [weight * exit_loss(said, targets) for weight, said in zip(weights, logits, strict=True)]
    return torch.stack(losses).sum()


def labels_or_answers_loss(logits: Sequence[Tensor], targets: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum over early exits of the loss to the label, or to the final exit's answer.

    Shapes as in `joint_loss`; a row whose label is UNKNOWN has the final exit's probabilities for a target
    (self-distillation, arXiv 2004.02178, section 3.2.2), and the final exit learns nothing. Values are always known.
    Raises OptionError if weights and exits differ in number.
    """
    _check_weights(logits, weights)
    if targets.is_floating_point():
        return joint_loss(logits[:-1], targets, weights[:-1])
    answers = logits[-1].detach().float().softmax(dim=-1)  # (N, C)
    known = functional.one_hot(targets.clamp(min=0), answers.shape[-1]).to(answers.dtype)
    return _early_loss(logits, torch.where((targets != UNKNOWN)[:, None], known, answers), weights)


def self_distillation_loss(logits: Sequence[Tensor], targets: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum over early exits of the loss to the final exit's answer; labels are not looked at.

    FastBERT, arXiv 2004.02178, section 3.2.2: the cross-entropy differs from its divergence by a constant. A regression
    learns the final exit's value. Raises OptionError if weights and exits differ in number.
    """
    _check_weights(logits, weights)
    if targets.is_floating_point():
        return joint_loss(logits[:-1], logits[-1].detach().float()[:, 0], weights[:-1])
    return _early_loss(logits, logits[-1].detach().float().softmax(dim=-1), weights)


def teacher_loss(answers: Answers, temperature: float) -> Tensor:
    """Return T² KL(teacher ‖ final exit), both at temperature T (arXiv 2510.12856, equation 2; arXiv 1503.02531).

    A teacher's values are learned by squared error. Raises OptionError without a teacher.
    """
    if answers.teacher is None:
        raise OptionError("teacher_weight: got a weight and no teacher; name the teacher's checkpoint")
    final, teacher = answers.logits[-1].float(), answers.teacher.detach().float()
    if final.shape != teacher.shape:
        raise OptionError(f"teacher: its logits are {tuple(teacher.shape)}, the model's {tuple(final.shape)}")
    if final.shape[-1] == 1:
        return functional.mse_loss(final, teacher)
    student, wanted = (final / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * functional.kl_div(student, wanted, reduction="batchmean", log_target=True)


def calibration_loss(logits: Sequence[Tensor], targets: Tensor, weights: Sequence[float], temperature: float) -> Tensor:
    """Return T times the joint loss of logits ÷ T: the gradient of a wrong row keeps its size, that of a sure one not.

    A right row goes on learning until its margin is T times as large, a wrong one is punished the same. Raises
    OptionError for a regression, which has no temperature.
    """
    if targets.is_floating_point():
        raise OptionError("calibration_weight: got a regression, expected classes")
    return temperature * joint_loss([said.float() / temperature for said in logits], targets, weights)


def confidence_loss(answers: Answers, targets: Tensor) -> Tensor:
    """Return the sum over exits of the squared error of the learned confidence; 0 for a model without any.

    What it should be: 1 − tanh|error| for a value, 1 or 0 for a right or wrong class (BERxiT, EACL 2021, section 3.4).
    Rows without a label do not count; the target gets no gradient.
    """
    losses = [answers.logits[-1].new_zeros((), dtype=torch.float32)]
    for logits, learned in zip(answers.logits, answers.learned, strict=True):
        if learned is not None:
            known = torch.ones_like(targets, dtype=torch.bool) if targets.is_floating_point() else targets != UNKNOWN
            error = learned.float().reshape(-1) - confidence_target(logits, targets)
            losses.append((error[known] ** 2).sum() / known.sum().clamp(min=1))
    return torch.stack(losses).sum()


def confidence_target(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how sure an exit should have been, (N,) in [0, 1]."""
    said = logits.detach().float()
    if targets.is_floating_point():
        return 1.0 - torch.tanh((said[:, 0] - targets).abs())
    return (said.argmax(dim=-1) == targets).float()


def halting_weights(learned: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return how much each exit's answer weighs (N, E), and what pondering costs (N,): exits asked, and the remainder.

    Adaptive computation time, arXiv 1603.08983, section 2.1, equations 5 to 9: `learned` are the halting probabilities
    (N,) of all exits but the final one; a row halts where their sum comes to 1 - ε, with the remainder for a weight.
    Raises OptionError if an exit has none.
    """
    if not learned or any(found is None for found in learned):
        raise OptionError("strategy act: expected a model whose early exits have a gate; set model.gated = true")
    halting = torch.stack([found.float() for found in learned if found is not None], -1)  # (N, E - 1)
    before = torch.cat([torch.zeros_like(halting[:, :1]), halting.cumsum(-1)], -1)  # (N, E) of the exits before
    has_come = before < 1.0 - HALTING_EPSILON
    sums = before[:, 1:]
    halts = has_come & torch.cat([sums >= 1.0 - HALTING_EPSILON, torch.ones_like(has_come[:, :1])], -1)
    weights = torch.where(halts, 1.0 - before, torch.cat([halting, halting[:, :1]], -1)) * has_come
    return weights, has_come.sum(-1) + (weights * halts).sum(-1)


def halting_loss(logits: Sequence[Tensor], weights: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of the exits' mean logits; weights (N, E) are `halting_weights` (equation 10 there)."""
    mean = (torch.stack([said.float() for said in logits], -1) * weights[:, None]).sum(-1)
    return exit_loss(mean, targets)


def _early_loss(logits: Sequence[Tensor], targets: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted cross-entropy of the exits before the final one to target probabilities (N, C)."""
    losses = [
        weight * functional.cross_entropy(exit_logits.float(), targets)
        for weight, exit_logits in zip(weights[:-1], logits[:-1], strict=True)
    ]
    return torch.stack(losses).sum()


def _check_weights(logits: Sequence[Tensor], weights: Sequence[float]) -> None:
    if len(weights) != len(logits):
        raise OptionError(f"loss: got {len(weights)} weights for {len(logits)} exits; give one weight per exit")
