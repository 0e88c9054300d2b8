"""Regression with learned exits: every exit before the final one answers a value, and how sure it is of it.

BERxiT (EACL 2021, section 3.4): there are no class probabilities, so a head predicts from the same hidden state how
far off the value will be, 1 − tanh|error|, and rows leave where that is high. Below stands a text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from offramp.errors import OptionError
from offramp.models.heads import Pooling, Tokens, check_exits, check_pooling, exit_head


class Value(NamedTuple):
    """What an exit says: the value as logits (N, 1), and learned (N,) in [0, 1], which is large where it is sure."""

    logits: Tensor
    learned: Tensor


@dataclass(frozen=True)
class RegressionConfig:
    """Where the exits are and what their heads read; values are answered in the unit of the targets.

    `pooling` is the final exit's, `early_pooling` the others'; a confidence reads what the value beside it reads.
    `offset` and `scale` are the targets' mean and spread, so that a fresh head is near them. Raises OptionError.
    """

    exits: tuple[int, ...] = (0, 2, 4, 6)
    pooling: Pooling = "mean"
    early_pooling: Pooling = "window"
    dropout: float = 0.1
    offset: float = 0.0
    scale: float = 1.0
    num_classes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_exits(self.exits, 0)
        check_pooling("pooling", self.pooling)
        check_pooling("early_pooling", self.early_pooling)
        if not self.scale > 0:
            raise OptionError(f"scale: got {self.scale}, expected a positive number")


class ValueHead(nn.Module):
    """One value, and where rows may leave how sure it is."""

    def __init__(self, hidden_size: int, pooling: Pooling, dropout: float, *, has_confidence: bool) -> None:
        super().__init__()
        self.value = exit_head(hidden_size, 1, pooling, dropout)
        self.confidence = exit_head(hidden_size, 1, pooling, dropout) if has_confidence else None

    def forward(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """hidden (N, T, d) to a value (N, 1) and a confidence (N,) in [0, 1] or None."""
        value = self.value(hidden, tokens)
        if self.confidence is None:
            return value, None
        return value, torch.sigmoid(self.confidence(hidden, tokens).float())[:, 0]


class LearnedRegressor(nn.Module):
    """An encoder whose forward returns a Value per exit, for the final exit the value (N, 1) alone."""

    def __init__(self, encoder: nn.Module, hidden_size: int, config: RegressionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        early = len(config.exits) - 1
        poolings = [config.early_pooling] * early + [config.pooling]
        self.heads = nn.ModuleList(
            ValueHead(hidden_size, pooling, config.dropout, has_confidence=place < early)
            for place, pooling in enumerate(poolings)
        )

    @property
    def layers(self) -> nn.Module:
        """Return the layers of the encoder."""
        layers: nn.Module = self.encoder.layers  # type: ignore[assignment]
        return layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Value | Tensor, ...]:
        """Answer N texts: input_ids and attention_mask (1 = token, 0 = padding) are (N, T) int64."""
        answers: list[Value | Tensor] = []
        states = self.encoder.states(input_ids, attention_mask)  # type: ignore[operator]
        for head, (hidden, tokens) in zip(self.heads, states, strict=True):
            said, learned = head(hidden, tokens)
            value = said * self.config.scale + self.config.offset  # (N, 1)
            answers.append(value if learned is None else Value(value, learned))
        return tuple(answers)
