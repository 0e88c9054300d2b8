"""Losses over all exits at once; a training strategy is one function of the type `ExitLoss`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from offramp.errors import OptionError
from offramp.trace import UNKNOWN

EARLY_WEIGHT = 0.3  # arXiv 2510.12856, section 4: lambda of an early exit
FINAL_WEIGHT = 1.0  # the same: lambda of the final exit

# (one (N, C) tensor of logits per exit, labels (N,) int64, one weight per exit) -> scalar
ExitLoss = Callable[[Sequence[Tensor], Tensor, Sequence[float]], Tensor]


def exit_weights(num_exits: int, early_weight: float = EARLY_WEIGHT) -> tuple[float, ...]:
    """Return the weight of every exit, the final one last."""
    return (early_weight,) * (num_exits - 1) + (FINAL_WEIGHT,)


def joint_loss(logits: Sequence[Tensor], labels: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum over exits of the cross-entropy (arXiv 2510.12856, equation 1).

    logits: one (N, C) per exit; labels: (N,) int64; weights: one per exit; the result is a scalar, averaged
    over rows, not over weights. Raises OptionError if weights and exits differ in number.
    """
    if len(weights) != len(logits):
        raise OptionError(f"joint loss: got {len(weights)} weights for {len(logits)} exits; give one weight per exit")
    losses = [
        weight * functional.cross_entropy(exit_logits.float(), labels)
        for weight, exit_logits in zip(weights, logits, strict=True)
    ]
    return torch.stack(losses).sum()


def distillation_loss(logits: Sequence[Tensor], labels: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum over early exits of the cross-entropy to the label, or to the final exit's answer.

    Shapes as in `joint_loss`; a row whose label is UNKNOWN has the final exit's probabilities for a target
    (self-distillation, arXiv 2004.02178, section 3.2.2), and the final exit learns nothing. Raises OptionError
    if weights and exits differ in number.
    """
    if len(weights) != len(logits):
        raise OptionError(f"distillation: got {len(weights)} weights for {len(logits)} exits; give one per exit")
    answers = logits[-1].detach().float().softmax(dim=-1)  # (N, C)
    known = functional.one_hot(labels.clamp(min=0), answers.shape[-1]).to(answers.dtype)
    targets = torch.where((labels != UNKNOWN)[:, None], known, answers)
    losses = [
        weight * functional.cross_entropy(exit_logits.float(), targets)
        for weight, exit_logits in zip(weights[:-1], logits[:-1], strict=True)
    ]
    return torch.stack(losses).sum()
