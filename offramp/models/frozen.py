"""What learns on a frozen decoder: routers, gates, and layers and vocabularies of early exits; and how it begins.

The decoder that it is put on stays as it is: with every router's threshold at EVERYBODY and every exit closed, the new
one says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from offramp.errors import OptionError
from offramp.models.decoder import DecoderConfig, DecoderExit, EarlyExitDecoder

_NOT_SAVED = ("cosines", "sines")


@dataclass(frozen=True)
class Additions:
    """What is put on a decoder; fields as in DecoderConfig. `tokens` are those that early exits know, () for all."""

    exits: tuple[int, ...]
    gated: bool = False
    capacities: tuple[float, ...] = ()
    own_layers: int = 0
    tokens: tuple[int, ...] = ()


def decoder_with(decoder: EarlyExitDecoder, additions: Additions, seed: int = 0) -> EarlyExitDecoder:
    """A decoder of its own with the weights of `decoder` and what `additions` says.

    Layers of exits begin as the last layers of the decoder, so that what they hand to its vocabulary looks familiar;
    their heads as its rows for the tokens they know; routers and gates at random from `seed`. Raises OptionError when
    the exits end elsewhere, or tokens are none of the vocabulary.
    """
    config = _config_with(decoder.config, additions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = EarlyExitDecoder(config)
    for name in _NOT_SAVED:
        setattr(made, name, getattr(decoder, name))
    with torch.no_grad():
        made.embedding.load_state_dict(decoder.embedding.state_dict())
        for mine, theirs in zip(made.layers, decoder.layers, strict=True):
            mine.load_state_dict(theirs.state_dict(), strict=False)  # routers are new
        for leave in made.exits:
            _begin_exit(leave, decoder, additions.tokens)
    return made.eval()


def _config_with(config: DecoderConfig, additions: Additions) -> DecoderConfig:
    if additions.exits[-1:] != config.exits[-1:] or config.capacities or config.own_layers or config.draft_vocabulary:
        raise OptionError(
            f"additions: got exits {additions.exits} for a decoder with exits {config.exits}; expected the same last "
            f"one, and a decoder that nothing was put on before"
        )
    if any(not 0 <= token < config.vocabulary for token in additions.tokens):
        raise OptionError(f"additions: got tokens beyond the vocabulary of {config.vocabulary}")
    return replace(
        config,
        exits=additions.exits,
        gated=additions.gated,
        capacities=additions.capacities,
        own_layers=additions.own_layers,
        draft_vocabulary=len(additions.tokens),
    )


def _begin_exit(leave: nn.Module, decoder: EarlyExitDecoder, tokens: Sequence[int]) -> None:
    assert isinstance(leave, DecoderExit)
    final: Any = decoder.exits[-1]
    leave.norm.load_state_dict(final.norm.state_dict())
    for mine, theirs in zip(leave.layers, decoder.layers[len(decoder.layers) - len(leave.layers) :], strict=True):
        mine.load_state_dict(theirs.state_dict())
    if leave.head is not None:
        table = decoder.vocabulary(final)
        leave.head.weight.copy_(table if leave.draft is None else table[list(tokens)])
    if leave.draft is not None:
        leave.draft.set_tokens(torch.tensor(tokens))


def early_parts(decoder: EarlyExitDecoder) -> list[nn.Parameter]:
    """What exits before the final one have that learns: layers, normalisation and head, not their gates."""
    leaves: list[Any] = list(decoder.exits)[:-1]
    parts = [part for leave in leaves for part in (leave.layers, leave.norm, leave.head) if part is not None]
    return [parameter for part in parts for parameter in part.parameters()]
