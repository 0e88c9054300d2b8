"""Routers that say for whom a layer's FFN runs (Mixture-of-Depths, arXiv 2404.02258): a linear score per token.

The decoder is frozen and never learned to do without an FFN, so where one is skipped a shortcut stands in: an affine
map of what the FFN would have read, fitted by least squares (as "Jump to conclusions", arXiv 2303.09435, fits whole
layers), of an eighth of its weights. A router has one thing to learn: where the shortcut will not do. Scores of all
layers are on one scale, and one threshold over all of them gives more FFNs to the layers and tokens that need them;
`offramp` keeps the threshold per layer, so that other rules fit the same graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import OptionError

EVERYBODY = -1e4  # a threshold that every score reaches


@dataclass(frozen=True)
class RouterOptions:
    """What routers are trained for. Raises OptionError.

    The capacity of a step falls from 1 to `capacity` over the first `schedule` of all steps. `sharpness` divides scores
    in the gradient of the hard choice. `z_weight` as in ST-MoE (arXiv 2202.08906, section 5: 1e-3); `entropy_weight`
    makes choices clear, so that few tokens lie at a threshold.
    """

    capacity: float = 0.55
    schedule: float = 0.5
    sharpness: float = 1.0
    z_weight: float = 1e-3
    entropy_weight: float = 1e-3

    def __post_init__(self) -> None:
        if not (0 < self.capacity <= 1 and 0 <= self.schedule <= 1 and self.sharpness > 0):
            raise OptionError(
                f"routers: got {self}, expected a capacity in (0, 1], a schedule in [0, 1], sharpness > 0"
            )

    def capacity_at(self, done: float) -> float:
        """The capacity when the share `done` of all steps is done."""
        if done >= self.schedule:
            return self.capacity
        return 1 + (self.capacity - 1) * done / self.schedule


def feed_where(
    active: Tensor,
    normed: Tensor,
    chosen: Tensor,
    feed: Callable[[Tensor], Tensor],
    shortcut: Callable[[Tensor], Tensor],
) -> Tensor:
    """`active` (N, A, d) plus `feed(normed)` at positions `chosen` (N, A), and `shortcut(normed)` at all others.

    Each is computed for its own positions alone.
    """
    fed, read = active.flatten(0, 1), normed.flatten(0, 1)
    for where, way in ((chosen, feed), (~chosen, shortcut)):
        places = where.flatten().nonzero()[:, 0]  # (R,)
        fed = fed.index_add(0, places, way(read[places]))
    return fed.view_as(active)


def straight_through(scores: Tensor, threshold: Tensor | float, sharpness: float) -> Tensor:
    """1 where a score reaches the threshold, else 0, with the gradient of a sigmoid; same shape."""
    soft = ((scores - threshold) / sharpness).sigmoid()
    return (scores >= threshold).to(scores.dtype) + (soft - soft.detach())


def z_loss(scores: Tensor) -> Tensor:
    """The mean squared logarithm of a router's partition function (ST-MoE, arXiv 2202.08906, equation 5).

    The two experts are the FFN and nothing, with logits s / 2 and -s / 2: it draws scores to 0 from both sides.
    """
    halves = torch.stack([scores / 2, -scores / 2])
    return halves.logsumexp(0).square().mean()


def choice_entropy(scores: Tensor) -> Tensor:
    """The mean entropy of the choices, over log 2: 0 when all are clear, 1 when all scores are 0."""
    both = functional.binary_cross_entropy_with_logits(scores, scores.sigmoid(), reduction="mean")
    return both / math.log(2)


def threshold_at(scores: Tensor, capacity: float) -> Tensor:
    """What the share `capacity` of all scores reaches; EVERYBODY at 1."""
    if capacity >= 1:
        return torch.tensor(EVERYBODY)
    ordered = scores.detach().flatten().sort(descending=True).values
    return ordered[max(0, round(capacity * len(ordered)) - 1)]


@dataclass(frozen=True)
class RoutedPass:
    """What a decoder with routers says when every FFN is computed, so that there is a gradient: logits (N, T, V)."""

    logits: Tensor
    scores: Tensor  # (L, N, T)


Gates = Callable[[int, Tensor], Tensor | None]  # layer and scores (N, T) -> shares of its FFN (N, T), None for 1
Look = Callable[[int, Tensor, Tensor], None]  # layer, what its FFN reads (N, T, d) and what it says (N, T, d)


def routed_pass(decoder: Any, ids: Tensor, gates: Gates, look: Look | None = None) -> RoutedPass:
    """Read whole texts (N, T) at full depth, with the share of every FFN that `gates` makes of its router's scores.

    The rest is the shortcut's. `look` is shown what FFNs read and say.
    """
    places, nothing = decoder.whole(*ids.shape)
    hidden, scores = decoder.embedding(ids), []
    for number, layer in enumerate(decoder.layers):
        hidden, _ = layer.attend(hidden, hidden, places, nothing)
        normed = layer.ffn_norm(hidden)
        scores.append(layer.router(normed)[..., 0].float())
        share, fed = gates(number, scores[-1]), layer.feed(normed)
        if look is not None:
            look(number, normed, fed)
        if share is not None:
            instead = layer.shortcut(normed)
            fed = instead + (fed - instead) * share[..., None].to(fed.dtype)
        hidden = hidden + fed
    return RoutedPass(decoder.said(decoder.exits[-1], hidden).logits, torch.stack(scores))


def router_loss(decoder: Any, ids: Tensor, threshold: Tensor, options: RouterOptions) -> tuple[Tensor, Tensor]:
    """The divergence from the full model on texts (N, T) plus the regularisation, and the scores (L, N, T).

    KL(full | routed) per token, so that no labels are needed (distillation, arXiv 1503.02531).
    """
    with torch.no_grad():
        wanted = routed_pass(decoder, ids, lambda _, __: None).logits.float().log_softmax(-1)
    said = routed_pass(decoder, ids, lambda _, scores: straight_through(scores, threshold, options.sharpness))
    apart = said.logits.float().log_softmax(-1)
    divergence = functional.kl_div(apart.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
    scores = said.scores - threshold
    return divergence + options.z_weight * z_loss(scores) + options.entropy_weight * choice_entropy(scores), said.scores


class LeastSquares:
    """Affine maps, one per layer, from rows (P, d) to targets (P, k), added up batch by batch in float64."""

    def __init__(self, layers: int, width: int, targets: int, device: torch.device) -> None:
        self._squares = torch.zeros(layers, width + 1, width + 1, dtype=torch.float64, device=device)
        self._products = torch.zeros(layers, width + 1, targets, dtype=torch.float64, device=device)

    def add(self, layer: int, rows: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """One more batch of a layer; `weights` (P,) say how much each row counts, 1 without."""
        extended = functional.pad(rows.detach().double(), (0, 1), value=1.0)  # (P, d + 1)
        weighed = extended if weights is None else extended * weights[:, None].double()
        self._squares[layer] += weighed.T @ extended
        self._products[layer] += weighed.T @ targets.detach().double()

    @torch.no_grad()
    def fit(self, maps: Sequence[nn.Linear], ridge: float) -> None:
        """Set `maps`; `ridge` is the share of the mean square of a feature that is added to all of them."""
        for linear, squares, products in zip(maps, self._squares, self._products, strict=True):
            added = ridge * squares.diagonal()[:-1].mean() * torch.eye(len(squares)).to(squares)
            added[-1, -1] = 0  # the mean is not held back
            found = torch.linalg.solve(squares + added, products)  # (d + 1, k)
            linear.weight.copy_(found[:-1].T)
            linear.bias.copy_(found[-1])


@torch.no_grad()
def fit_shortcuts(decoder: Any, texts: Sequence[Tensor], capacity: float = 0.0) -> None:
    """Set all shortcuts to the least squares of what FFNs say on these texts, (N, T) each.

    With a `capacity` those count whose FFN would be skipped then, and the others a little, lest a layer that is never
    skipped has nothing to learn from.
    """
    width, threshold = decoder.config.width, torch.tensor(math.inf)
    if capacity:
        found = [routed_pass(decoder, ids, lambda _, __: None).scores.flatten() for ids in texts]
        threshold = threshold_at(torch.cat(found), capacity)
    sums = LeastSquares(len(decoder.layers), width, width, texts[0].device)

    def look(layer: int, normed: Tensor, fed: Tensor) -> None:
        rows = normed.flatten(0, 1)
        skipped = decoder.layers[layer].router(rows)[:, 0] < threshold
        sums.add(layer, rows, fed.flatten(0, 1), skipped.double().clamp(min=_OTHERS))

    for ids in texts:
        routed_pass(decoder, ids, lambda _, __: None, look)
    sums.fit([layer.shortcut for layer in decoder.layers], _SHORTCUT_RIDGE)


def fit_routers(decoder: Any, texts: Sequence[Tensor]) -> None:
    """Set all routers to the least squares of how much each FFN is missed on these texts, (N, T) each.

    A shortcut in the place of an FFN, f apart from it, moves the answers by a divergence of (g . f)^2 / 2 in the mean
    over answers drawn from the model, g being the gradient of their negative log-likelihood: the Fisher information in
    the direction f. A router's score is fitted to the logarithm of it (in closed form: one backward pass per text, no
    learning rate).
    """
    sums = LeastSquares(len(decoder.layers), decoder.config.width, 1, texts[0].device)
    for ids in texts:
        shares: list[Tensor] = []
        read: list[Tensor] = []

        def gates(_: int, scores: Tensor, shares: list[Tensor] = shares) -> Tensor:
            shares.append(torch.ones_like(scores, requires_grad=True))
            return shares[-1]

        def look(_: int, normed: Tensor, __: Tensor, read: list[Tensor] = read) -> None:
            read.append(normed)

        logits = routed_pass(decoder, ids, gates, look).logits.float().flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        parts = torch.autograd.grad(functional.cross_entropy(logits, drawn, reduction="sum"), shares)
        for layer, (normed, part) in enumerate(zip(read, parts, strict=True)):
            missed = (part.flatten().double().square() + _LEAST).log()
            sums.add(layer, normed.flatten(0, 1), missed[:, None])
    sums.fit([layer.router for layer in decoder.layers], _ROUTER_RIDGE)


_LEAST = 1e-6  # of a squared gradient, so that it has a logarithm; layers of SmolLM2 have 0.1 to 4 in the mean
_SHORTCUT_RIDGE, _ROUTER_RIDGE = 0.03, 0.3
_OTHERS = 0.05  # what a token whose FFN runs counts for the shortcut


@torch.no_grad()
def set_thresholds(decoder: Any, texts: Sequence[Tensor]) -> None:
    """Set `decoder.thresholds` so that every capacity of its config is met on these texts, (N, T) each.

    One at a time, from the largest: skipping changes what later routers read, so scores are taken while skipping, at
    the threshold so far, a few rounds until the share is met.
    """
    for index, capacity in enumerate(decoder.config.capacities):
        threshold = torch.tensor(EVERYBODY)
        for _ in range(_ROUNDS):
            hard = functools.partial(_hard, threshold)
            found = [routed_pass(decoder, ids, hard).scores for ids in texts]
            threshold = threshold_at(torch.cat([scores.flatten() for scores in found]), capacity)
        decoder.thresholds[index] = threshold


def _hard(threshold: Tensor, _: int, scores: Tensor) -> Tensor:
    return (scores >= threshold).float()


_ROUNDS = 3


def freeze_all_but_routers(decoder: nn.Module) -> list[nn.Parameter]:
    """Let routers learn and nothing else; returns their parameters."""
    decoder.requires_grad_(False)
    routers = [layer.router for layer in decoder.layers]  # type: ignore[union-attr]
    for router in routers:
        router.requires_grad_(True)
    return [parameter for router in routers for parameter in router.parameters()]
