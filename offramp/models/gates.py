"""Gates that say, before any vocabulary is asked, whether a token leaves: trained on what leaving would cost.

An exit's gate is a linear score of its normalised hidden state. Choices are discrete, so their gradient is that of the
Gumbel-softmax with a temperature of its own (decoupled straight-through, arXiv 2410.13331).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offramp.errors import OptionError


@dataclass(frozen=True)
class GateOptions:
    """What gates are trained for: `cost_weight` nats per token are paid for passing all layers. Raises OptionError.

    `forward_temperature` is how much chance there is in the choices, `backward_temperature` how wide their gradient is.
    """

    cost_weight: float = 1.0
    forward_temperature: float = 0.5
    backward_temperature: float = 2.0

    def __post_init__(self) -> None:
        if not (self.cost_weight >= 0 and self.forward_temperature > 0 and self.backward_temperature > 0):
            raise OptionError(f"gates: got {self}, expected cost_weight >= 0 and temperatures above 0")


def leaves_by_chance(scores: Tensor, options: GateOptions) -> Tensor:
    """Hard choices, 1 for leaving, of the same shape as `scores`; the gradient is that of a soft one.

    Two Gumbel variables differ by a logistic one, g. The choice is [s + t_f g > 0]: with t_f = 1 a draw of sigmoid(s),
    with less chance below. Its gradient is that of sigmoid((s + t_f g) / t_b).
    """
    uniform = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
    moved = scores + options.forward_temperature * uniform.logit()
    soft = (moved / options.backward_temperature).sigmoid()
    return (moved > 0).to(scores.dtype) + (soft - soft.detach())


def exit_shares(leaves: Sequence[Tensor]) -> Tensor:
    """From choices at the E - 1 early exits, (P,) each, to who leaves where, (E, P): the first that says so."""
    staying = torch.ones_like(leaves[0])
    shares = []
    for leaving in leaves:
        shares.append(staying * leaving)
        staying = staying * (1 - leaving)
    return torch.stack([*shares, staying])


def gate_loss(scores: Sequence[Tensor], losses: Tensor, costs: Sequence[float], options: GateOptions) -> Tensor:
    """Expected loss plus expected cost of P tokens, with gates' `scores` (P,) at the E - 1 early exits.

    `losses` (E, P) is what each exit's answer costs in nats; `costs` (E,) the share of the layers it needs.
    """
    shares = exit_shares([leaves_by_chance(score, options) for score in scores])
    paid = losses + options.cost_weight * losses.new_tensor(costs)[:, None]
    return (shares * paid).sum(0).mean()


def best_gates(losses: Tensor, costs: Sequence[float], cost_weight: float) -> Tensor:
    """Which early exits, asked in order, a token that knew all its losses would leave at: (E - 1, P) bool.

    It leaves when no later exit is cheaper, loss and cost together. What gates begin from, as targets.
    """
    paid = losses + cost_weight * losses.new_tensor(costs)[:, None]
    later = paid.flip(0).cummin(0).values.flip(0)
    return paid[:-1] <= later[1:]


def warm_loss(scores: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """Cross-entropy of gates to `wanted` (E - 1, P), for their first steps."""
    return functional.binary_cross_entropy_with_logits(torch.stack(list(scores)), wanted.to(scores[0].dtype))
