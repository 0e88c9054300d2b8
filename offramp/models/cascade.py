"""A cascade of transformer stages, post-norm as in the classic encoder, trained from nothing, an exit per stage.

Its layers are those of arXiv 1706.03762 (sections 3.1 to 3.5) with the sinusoidal positions; nothing is pretrained, so
its own word table learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import OptionError
from offramp.models.heads import Pooling, Tokens, check_exits, check_pooling, exit_head, mean_weights

NUM_POSITIONS = 512
_MASKED_SCORE = -1e4  # finite, as in encoder.py: -inf keeps the mask out of FP16, and exp(-1e4) is 0 just so


@dataclass(frozen=True)
class CascadeConfig:
    """The shape of a cascade: `exits` are numbers of layers, increasing, the last being the depth.

    `num_classes` is 1 for a regression. `pooling` is what every exit reads. Raises OptionError.
    """

    exits: tuple[int, ...] = (1, 2, 3, 4)
    num_classes: int = 2
    hidden_size: int = 128
    num_heads: int = 4
    inner_size: int = 512
    dropout: float = 0.1
    pooling: Pooling = "mean"
    vocab_size: int = 30522  # of the tokenizer that comes with BERT and MiniLM

    def __post_init__(self) -> None:
        check_exits(self.exits, 1)
        if self.hidden_size % (2 * self.num_heads):
            raise OptionError(
                f"hidden_size: got {self.hidden_size} for {self.num_heads} heads, expected a multiple of twice as many"
            )
        check_pooling("pooling", self.pooling)
        if min(self.num_classes, self.num_heads, self.inner_size, self.vocab_size) < 1 or not 0 <= self.dropout < 1:
            raise OptionError(f"cascade: got {self}, expected sizes from 1 and a dropout in [0, 1)")


class CascadeLayer(nn.Module):
    """One stage: attention, then two linear maps, each added to what came in and then normalised."""

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.mixed = (nn.Linear(width, width) for _ in range(4))
        self.inner, self.outer = nn.Linear(width, config.inner_size), nn.Linear(config.inner_size, width)
        self.norm_attention, self.norm_output = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, score_mask: Tensor) -> Tensor:
        """hidden (N, T, d) and score_mask (N, 1, 1, T), added to the scores, to (N, T, d)."""
        attended = self.mixed(self._attended(hidden, score_mask))
        hidden = self.norm_attention(hidden + self.dropout(attended))
        inner = self.outer(self.dropout(functional.relu(self.inner(hidden))))
        normed: Tensor = self.norm_output(hidden + self.dropout(inner))
        return normed

    def _attended(self, hidden: Tensor, score_mask: Tensor) -> Tensor:
        query, key, value = (self._by_head(part(hidden)) for part in (self.query, self.key, self.value))
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + score_mask  # (N, H, T, T)
        mixed: Tensor = self.dropout(scores.softmax(-1)) @ value  # (N, H, T, d / H)
        return mixed.transpose(1, 2).flatten(2)

    def _by_head(self, states: Tensor) -> Tensor:
        rows, length, width = states.shape
        by_head = states.reshape(rows, length, self.num_heads, width // self.num_heads)
        return by_head.transpose(1, 2)  # (N, H, T, d / H)


class CascadeTransformer(nn.Module):
    """Stages whose forward returns the logits (N, C) of every exit in order, the final exit last."""

    positions: Tensor

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.words.weight, std=config.hidden_size**-0.5)
        self.register_buffer("positions", sinusoids(NUM_POSITIONS, config.hidden_size), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(CascadeLayer(config) for _ in range(config.exits[-1]))
        self.heads = nn.ModuleList(
            exit_head(config.hidden_size, config.num_classes, config.pooling, config.dropout) for _ in config.exits
        )

    @property
    def hidden_size(self) -> int:
        """Return the width of the hidden state."""
        return self.config.hidden_size

    @property
    def num_positions(self) -> int:
        """Return the tokens that a text may have."""
        return NUM_POSITIONS

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Classify N texts: input_ids and attention_mask (1 = token, 0 = padding) are (N, T) int64."""
        states = self.states(input_ids, attention_mask)
        return tuple(head(hidden, tokens) for head, (hidden, tokens) in zip(self.heads, states, strict=True))

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Iterator[tuple[Tensor, Tokens]]:
        """Yield the hidden state (N, T, d) at each exit in turn; no layer runs before somebody asks beyond it."""
        kept = attention_mask[:, None, :].to(self.words.weight.dtype)  # (N, 1, T) in {0, 1}
        score_mask = (1.0 - kept)[:, None] * _MASKED_SCORE  # (N, 1, 1, T)
        tokens = Tokens(kept, mean_weights(kept))
        scaled = self.words(input_ids) * math.sqrt(self.config.hidden_size)
        hidden = self.dropout(scaled + self.positions[: input_ids.shape[1]])  # (N, T, d)
        for depth, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, score_mask)
            if depth in self.config.exits:
                yield hidden, tokens


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Return sines and cosines of every position, (T, d): arXiv 1706.03762, section 3.5."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))  # (d / 2,)
    angles = torch.arange(num_positions)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
