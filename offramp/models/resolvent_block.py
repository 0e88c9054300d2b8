"""A ResNet-BK block: experts, and one complex number that carries the past.

LayerNorm → mixture of experts → a potential v_i per position → the causal Green's function L_i of the chain of
potentials (`resolvent.py`) → (Re, Im) → linear; that and what the experts say are added to what came in. What a layer
remembers of a position is its L, of which only the last is ever read. A position that has left at an exit before this
layer is no site of its chain: it hands on the L of the position before, its experts are not run.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.resolvent import causal_resolvent, resolvent_diagonal


class Sites(NamedTuple):
    """Which positions of a chunk take part in a layer, and how many lie before it."""

    active: tuple[Tensor, Tensor] | None  # row (N, 1) and position (N, A) of the active ones; None: all
    past_length: Tensor  # (N,)


class Experts(nn.Module):
    """Feed-forward networks of which each position asks the `top_k` that a router thinks most of.

    All are computed for all positions, and those that were not asked weigh nothing. With four of 128 x 256 that takes
    1.4 times as long as gathering positions by expert for one position, 1.2 times for 8 and 3.4 times for 128
    (bench/results/resolvent.json); but gathering needs NonZero, which TensorRT-RTX has not.
    """

    def __init__(self, width: int, inner: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(width, num_experts, bias=False)
        self.up = nn.Linear(width, num_experts * inner)
        self.down = nn.Linear(num_experts * inner, width, bias=False)
        self.balance: Tensor | None = None  # loss of the last batch in train mode

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, T, d) to (N, T, d)."""
        chances = self.router(hidden).float().softmax(-1)  # (N, T, E)
        weights = largest(chances, self.top_k)
        if self.training:
            self.balance = balance_loss(chances, weights)
        inner = functional.gelu(self.up(hidden)).view(*weights.shape, -1)  # (N, T, E, inner)
        said: Tensor = self.down((inner * weights[..., None].to(inner.dtype)).flatten(-2))
        return said


class ResolventLayer(nn.Module):
    """One block; `forward` is that of any layer of a decoder (`decoder.py`).

    `two_sided` takes G_ii instead of L_i: for texts that are there as a whole, never for a language model, because it
    sees the future. It has no past and all positions take part.
    """

    def __init__(self, width: int, experts: Experts, dropout: float = 0.0, *, two_sided: bool = False) -> None:
        super().__init__()
        self.two_sided = two_sided
        self.norm = nn.LayerNorm(width)
        self.experts = experts
        self.potential = nn.Linear(width, 1)
        self.out = nn.Linear(2, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, active: Tensor, chunk: Tensor, places: Sites, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """From the active positions (N, A, d) before the layer to those after it, and the L of the chunk (N, 1, T, 2).

        `chunk` (N, T, d) says how long that is. Active positions ascend; the last may be there several times. `past`
        has the L of P positions (N, 1, P, 2).
        """
        said = self.experts(self.norm(active))
        before = last_of(past[0][:, 0], places.past_length)  # (N, 2)
        device = said.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            potential = self.potential(said.float())[..., 0]  # (N, A)
            left = resolvent_diagonal(potential) if self.two_sided else causal_resolvent(potential, before)
            if places.active is not None:
                left = handed_on(torch.cat([before[:, None], left], 1), places.active, chunk)
        state = left[:, None]  # (N, 1, T, 2)
        mine = state[:, 0]  # read off the state, so that it belongs to the exit on whose way it is made
        mine = mine if places.active is None else mine[places.active]  # (N, A, 2)
        return active + self.dropout(said + self.out(mine)), (state,)


def last_of(past: Tensor, length: Tensor) -> Tensor:
    """The L of the last of `length` (N,) positions in past (N, P, 2), zeros where there is none: (N, 2)."""
    rows = torch.arange(len(length), device=length.device)
    last = past[rows, (length - 1).clamp(min=0)]
    return torch.where(length[:, None] > 0, last, torch.zeros_like(last))


def handed_on(values: Tensor, active: tuple[Tensor, Tensor], chunk: Tensor) -> Tensor:
    """The L of all positions of a chunk (N, T, 2) from that before it and those of the active ones, (N, 1 + A, 2).

    `chunk` (N, T, d) says how long it is.
    """
    nobody = chunk[..., 0].isnan()  # (N, T), of the hidden states because a segment has nothing else of that length
    is_active = nobody.index_put(active, torch.ones_like(active[1], dtype=torch.bool))
    latest = is_active.long().cumsum(1)  # (N, T), in `values`
    return values.gather(1, torch.stack([latest, latest], -1))


def balance_loss(chances: Tensor, weights: Tensor) -> Tensor:
    """E Σ f_e P_e: shares of positions that ask an expert, times mean chances; 1 when all are asked alike.

    Switch Transformer, arXiv 2101.03961, equation 4. chances and weights (N, T, E); what is asked has a weight above 0.
    """
    asked = (weights > 0).float()
    shares = asked.mean((0, 1)) / asked.sum(-1).mean()
    return chances.shape[-1] * (shares * chances.mean((0, 1))).sum()


def largest(chances: Tensor, top_k: int) -> Tensor:
    """The `top_k` largest of the last axis, and zeros; of equal ones all."""
    least = chances.topk(top_k, -1).values[..., -1:]
    return torch.where(chances >= least, chances, torch.zeros_like(chances))
