"""A decoder as the training loop sees it: from windows of tokens to what every exit says about every next token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from offramp.models.decoder import DecoderConfig, DecoderLayer, EarlyExitDecoder
from offramp.models.resolvent_block import Experts

_SPREAD = 0.02  # of fresh weights, as GPT-2's


class TokenAnswer(NamedTuple):
    """What an exit says about the N x T positions of a batch; `penalty` is added to the loss."""

    logits: Tensor  # (N x T, V)
    learned: Tensor | None  # (N x T,) in [0, 1]
    penalty: Tensor | None  # ()


class LanguageModel(nn.Module):
    """A decoder whose forward returns a TokenAnswer per exit, the final exit last; all positions go to full depth."""

    def __init__(self, decoder: EarlyExitDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    @property
    def config(self) -> DecoderConfig:
        """Return the decoder's configuration."""
        return self.decoder.config

    @property
    def heads(self) -> nn.ModuleList:
        """Return what stands at the exits, the final one's last."""
        return self.decoder.exits

    def forward(self, input_ids: Tensor) -> tuple[TokenAnswer, ...]:
        """Read windows of tokens (N, T)."""
        answers = [
            TokenAnswer(said.logits.flatten(0, 1), None if said.gate is None else said.gate.flatten(), None)
            for said in self.decoder(input_ids).exits
        ]
        experts = [part for part in self.decoder.modules() if isinstance(part, Experts)]
        if balances := [part.balance for part in experts if self.training and part.balance is not None]:
            answers[-1] = answers[-1]._replace(penalty=torch.stack(balances).mean())
        return tuple(answers)


def fresh_language_model(config: DecoderConfig) -> LanguageModel:
    """A decoder with random weights; what adds to the residual stream begins smaller (GPT-2, section 2.3)."""
    decoder = EarlyExitDecoder(config)
    for part in decoder.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=_SPREAD)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    with torch.no_grad():
        for layer in decoder.layers:
            if isinstance(layer, DecoderLayer):
                layer.query.weight *= config.head_size**-0.5
                layer.out.weight /= math.sqrt(2 * len(decoder.layers))
                layer.down.weight /= math.sqrt(2 * len(decoder.layers))
    return LanguageModel(decoder.eval())
