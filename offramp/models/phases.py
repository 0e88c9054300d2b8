"""The phases of a hierarchical language model: on a frozen decoder first routers learn, then early exits, then gates.

Each phase is one function that changes the decoder in place and returns what it measured. Texts come as tokens (R, T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import OptionError
from offramp.models.decoder import EarlyExitDecoder, ExitSaid
from offramp.models.devices import device_of, products
from offramp.models.frozen import early_parts
from offramp.models.gates import GateOptions, best_gates, gate_loss, warm_loss
from offramp.models.randomness import forked_random_state
from offramp.models.routers import (
    RouterOptions,
    fit_routers,
    fit_shortcuts,
    freeze_all_but_routers,
    router_loss,
    set_thresholds,
    threshold_at,
)
from offramp.models.states import States

Tokens = NDArray[np.int64]
_CLIP = 1.0  # norm of a step's gradient


@dataclass(frozen=True)
class Steps:
    """How many steps of how many texts, at which learning rate; it warms up over a tenth and falls to 0."""

    steps: int
    batch: int = 8
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or not self.learning_rate > 0:
            raise OptionError(f"steps: got {self}, expected 0 or more steps of 1 or more texts, a rate above 0")


@dataclass(frozen=True)
class RouterPhase:
    """`fitted` texts for the least squares that routers begin with, then steps, then `calibrated` texts.

    The fit goes `rounds` times over its texts: shortcuts from the second on for those whose FFN routers would skip.
    """

    fitted: int = 64
    learn: Steps = Steps(0, 4, 3e-3)
    calibrated: int = 16
    options: RouterOptions = RouterOptions()  # noqa: RUF009
    rounds: int = 2


@dataclass(frozen=True)
class GatePhase:
    """How gates learn: the first half of the steps from the best choices, the rest by chance (gates.py)."""

    learn: Steps = Steps(400, 64, 1e-2)
    options: GateOptions = GateOptions()  # noqa: RUF009


@dataclass
class Losses:
    """Losses of a phase's steps."""

    steps: list[float] = field(default_factory=list)


def train_routers(decoder: EarlyExitDecoder, tokens: Tokens, phase: RouterPhase, seed: int = 0) -> Losses:
    """Phase 1. Fit shortcuts to FFNs and routers to how much these are missed, let routers learn, set thresholds."""
    if not decoder.config.capacities:
        raise OptionError("training routers: the decoder has none; give it capacities")
    device = device_of(decoder)
    texts = torch.from_numpy(tokens).to(device)
    if phase.fitted:
        parts = torch.split(texts[: phase.fitted], phase.learn.batch)
        decoder.requires_grad_(False)
        with products(device=device), forked_random_state():
            torch.manual_seed(seed)
            for number in range(phase.rounds):
                fit_shortcuts(decoder, parts, phase.options.capacity if number else 0.0)
                fit_routers(decoder, parts)
    parameters = freeze_all_but_routers(decoder)
    scores = [torch.zeros(1)]

    def loss(ids: Tensor, done: float) -> Tensor:
        threshold = threshold_at(scores[0], phase.options.capacity_at(done))
        found, scores[0] = router_loss(decoder, ids, threshold, phase.options)
        return found

    losses = _learn(parameters, lambda at, done: loss(texts[at.to(device)], done), phase.learn, len(texts), seed)
    with products(device=device):
        set_thresholds(decoder, torch.split(texts[-phase.calibrated :], phase.learn.batch))
    decoder.requires_grad_(False)
    return losses


def train_exits(decoder: EarlyExitDecoder, states: States, first: int, learn: Steps, seed: int = 0) -> Losses:
    """Phase 2. Layers, normalisation and vocabulary of early exits learn what the final exit says.

    Positions from `first` on count: before it stand prompts. The loss is half the cross-entropy to the final exit's
    most likely token, which is what a proposal must be, and half that to its probabilities.
    """
    decoder.requires_grad_(False)
    parameters = early_parts(decoder)
    for parameter in parameters:
        parameter.requires_grad_(True)

    def loss(at: Tensor, _: float) -> Tensor:
        told = _final_logits(decoder, states.hidden[-1, at, first:])
        parts = []
        for index in range(len(decoder.exits) - 1):
            logits = said_at(decoder, index, states.hidden[index, at]).logits
            said = logits[:, first:].float().log_softmax(-1).flatten(0, 1)
            # a token that the exit does not know has no gradient and a large constant loss: it does not count
            most = told.flatten(0, 1).argmax(-1)
            likely = functional.nll_loss(said, most, reduction="none").clamp(max=_MOST_NATS).mean()
            known = (said > -_MOST_NATS).float()
            parts.append(likely - (told.flatten(0, 1).softmax(-1) * said * known).sum(-1).mean())
        return torch.stack(parts).mean() / 2

    losses = _learn(parameters, loss, learn, len(states.tokens), seed)
    decoder.requires_grad_(False)
    return losses


_MOST_NATS = 100.0  # no token that an exit knows is that unlikely; one that it does not know is far beyond


def said_at(decoder: Any, index: int, hidden: Tensor) -> ExitSaid:
    """What an early exit says about whole texts, from states (N, T, d) before its own layers."""
    leave, hidden = decoder.exits[index], hidden.to(decoder.embedding.weight)
    places, nothing = decoder.whole(*hidden.shape[:2])
    for layer in leave.layers:
        hidden, _ = layer(hidden, hidden, places, nothing)
    said: ExitSaid = decoder.said(leave, hidden)
    return said


@torch.no_grad()
def agreement(decoder: EarlyExitDecoder, states: States, first: int) -> list[float]:
    """How often each early exit's most likely token is the final exit's, at positions from `first` on."""
    right = np.zeros(len(decoder.exits) - 1)
    with products(device=device_of(decoder)):
        for at in torch.split(torch.arange(len(states.tokens)), 16):
            told = _final_logits(decoder, states.hidden[-1, at, first:]).argmax(-1)
            for index in range(len(right)):
                said = said_at(decoder, index, states.hidden[index, at]).logits[:, first:]
                right[index] += (said.argmax(-1) == told).sum().item()
    return list(right / states.tokens[:, first:].numel())


def train_gates(decoder: EarlyExitDecoder, states: States, phase: GatePhase, seed: int = 0) -> Losses:
    """Phase 3. Gates learn when leaving costs less than going on: the divergence from the final exit, and layers."""
    if not decoder.config.gated:
        raise OptionError("training gates: the decoder has none; make it gated")
    features, losses = _gate_features(decoder, states)
    costs = [at / decoder.config.exits[-1] for at in decoder.config.exits]
    wanted = best_gates(losses, costs, phase.options.cost_weight)
    device = losses.device
    decoder.requires_grad_(False)
    gates: list[Any] = [leave.gate for leave in list(decoder.exits)[:-1]]
    for gate in gates:
        gate.requires_grad_(True)

    def loss(at: Tensor, done: float) -> Tensor:
        at = at.to(device)
        scores = [gate(read[at].float())[..., 0] for gate, read in zip(gates, features, strict=True)]
        if done < _WARM:
            return warm_loss(scores, wanted[:, at])
        return gate_loss(scores, losses[:, at], costs, phase.options)

    found = _learn([p for gate in gates for p in gate.parameters()], loss, phase.learn, losses.shape[1], seed)
    decoder.requires_grad_(False)
    return found


_WARM = 0.5  # share of the gates' steps that follow the best choices


@torch.no_grad()
def _gate_features(decoder: Any, states: States) -> tuple[list[Tensor], Tensor]:
    """What gates read, (P, d) each, and what every exit's answer costs, (E, P) in nats: KL(final | exit), capped."""
    features: list[list[Tensor]] = [[] for _ in range(len(decoder.exits) - 1)]
    costs: list[Tensor] = []
    with products(device=device_of(decoder)):
        for at in torch.split(torch.arange(len(states.tokens)), 8):
            told = _final_logits(decoder, states.hidden[-1, at]).float().log_softmax(-1).flatten(0, 1)
            found = []
            for index, kept in enumerate(features):
                said = said_at(decoder, index, states.hidden[index, at])
                kept.append(said.hidden.flatten(0, 1).half())
                apart = said.logits.float().log_softmax(-1).flatten(0, 1).clamp(min=-_WORST_NATS)
                found.append((told.exp() * (told - apart)).sum(-1).clamp(0, _WORST_NATS))
            costs.append(torch.stack([*found, torch.zeros_like(found[0])]))
    return [torch.cat(kept) for kept in features], torch.cat(costs, 1)


_WORST_NATS = 20.0  # what an answer with a probability of nearly 0 costs at most


@torch.no_grad()
def _final_logits(decoder: EarlyExitDecoder, normed: Tensor) -> Tensor:
    final: Any = decoder.exits[-1]
    table = decoder.vocabulary(final)
    return functional.linear(normed.to(table), table)


@torch.no_grad()
def continuations(decoder: EarlyExitDecoder, prompts: Tokens, length: int) -> Tokens:
    """Prompts (R, P) continued to `length` tokens by the decoder itself at full depth, greedily: (R, length)."""
    config, weight = decoder.config, decoder.embedding.weight
    rows, before = prompts.shape
    shape = rows, config.kv_heads, length, config.head_size
    past = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(config.num_remembering)]
    tokens = weight.new_zeros(rows, length, dtype=torch.int64)
    tokens[:, :before] = torch.from_numpy(prompts)
    start, end = 0, before
    while end < length:
        chunk = tokens[:, start:end]
        active = [torch.arange(end - start, device=weight.device).repeat(rows, 1)] * (len(config.exits) - 1)
        seen = [(keys[:, :, : max(start, 1)], values[:, :, : max(start, 1)]) for keys, values in past]
        said = decoder(chunk, tokens.new_full((rows,), start), active, seen)
        for (keys, values), (key, value) in zip(past, said.present, strict=True):
            keys[:, :, start:end], values[:, :, start:end] = key, value
        tokens[:, end] = said.exits[-1].logits[:, -1].argmax(-1)
        start, end = end, end + 1
    return tokens.cpu().numpy()


def _learn(
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[Tensor, float], Tensor],
    learn: Steps,
    rows: int,
    seed: int,
) -> Losses:
    """AdamW over steps of `learn.batch` of the rows; `loss_of` is given their indices and the share of steps done."""
    found = Losses()
    optimizer = torch.optim.AdamW(parameters, lr=learn.learning_rate, weight_decay=0.01)
    device = parameters[0].device
    with forked_random_state():
        torch.manual_seed(seed)
        order = _batches(rows, learn.batch)
        for step in range(learn.steps):
            done = step / learn.steps
            for group in optimizer.param_groups:
                group["lr"] = learn.learning_rate * min(1.0, 10 * (done + 1 / learn.steps)) * (1 - done)
            with products(device=device):
                loss = loss_of(next(order), done)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, _CLIP)
            optimizer.step()
            found.steps.append(float(loss.detach()))
            if not np.isfinite(found.steps[-1]):
                raise OptionError(f"training, step {step + 1}: the loss is {found.steps[-1]}; lower the learning rate")
    return found


def _batches(rows: int, size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.split(torch.randperm(rows), size)
