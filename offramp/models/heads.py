"""Exit heads: from the hidden state of all tokens to the logits of one exit.

A head sees one hidden state and the mask, never another exit, so any subset of exits can be cut out. Sums over
tokens are matrix products, because ONNX Runtime's ReduceSum gives other bits in another batch (5.7e-6 seen,
docs/tolerances.md), and then an answer would depend on its neighbours; a maximum does not round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import OptionError

Pooling = Literal["window", "mean", "cls"]

# Features per token of a window head: with 384 dimensions 0.7 % of the products of six layers.
WINDOW_FEATURES = 64


def check_exits(exits: Sequence[int], first: int) -> None:
    """Raise OptionError unless exits are increasing numbers from `first`."""
    if not exits or exits[0] < first or any(low >= high for low, high in pairwise(exits)):
        raise OptionError(f"exits: got {exits}, expected increasing numbers from {first}, such as (2, 4)")


def check_head_options(exits: Sequence[int], num_classes: int, poolings: tuple[str, str], dropout: float) -> None:
    """Raise OptionError unless heads can be made of these; `poolings` are the early exits' and the final one's."""
    check_exits(exits, 0)
    if num_classes < 2:
        raise OptionError(f"num_classes: got {num_classes}, expected 2 or more")
    for name, pooling in zip(("early_pooling", "pooling"), poolings, strict=True):
        check_pooling(name, pooling)
    if not 0.0 <= dropout < 1.0:
        raise OptionError(f"dropout: got {dropout}, expected a number in [0, 1)")


def check_pooling(name: str, pooling: str) -> None:
    """Raise OptionError unless the option `name` is a pooling."""
    if pooling not in get_args(Pooling):
        raise OptionError(f"{name}: got {pooling!r}, expected one of {get_args(Pooling)}")


@dataclass(frozen=True)
class Tokens:
    """Which tokens of N rows count: `kept` (N, 1, T) in {0, 1}, `mean_weights` (N, 2, T) of `kept`."""

    kept: Tensor
    mean_weights: Tensor


class WindowHead(nn.Module):
    """Features of every token and its two neighbours, their mean and maximum, then the classes.

    After the embeddings and the first layers, where tokens know little of each other, it is right more often than
    a linear head two layers later (docs/log.md). The shape is that of a convolution for sentences (Kim 2014,
    arXiv 1408.5882), written as a product so that a row gives the same bits in every batch.
    """

    def __init__(self, hidden_size: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.mix = nn.Linear(hidden_size, 3 * WINDOW_FEATURES)
        self.dropout = nn.Dropout(dropout)
        self.classes = nn.Linear(2 * WINDOW_FEATURES, num_classes)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Classify N rows: hidden (N, T, d) to (N, C)."""
        kept = tokens.kept.transpose(1, 2)  # (N, T, 1)
        before, own, after = (self.mix(hidden) * kept).split(WINDOW_FEATURES, dim=-1)  # (N, T, F) each
        left = functional.pad(before, (0, 0, 1, 0))[:, :-1]  # of the token before, 0 at the start
        right = functional.pad(after, (0, 0, 0, 1))[:, 1:]
        features = functional.relu(left + own + right) * kept  # (N, T, F) >= 0, so that padding is never the maximum
        pooled = torch.cat([weighted_mean(features, tokens), features.amax(dim=1)], dim=-1)  # (N, 2 F)
        logits: Tensor = self.classes(self.dropout(pooled))
        return logits


class LinearHead(nn.ModuleList):
    """A linear classifier on the mean over tokens, or on the first token."""

    def __init__(self, hidden_size: int, num_classes: int, pooling: Pooling, dropout: float) -> None:
        super().__init__([nn.Dropout(dropout), nn.Linear(hidden_size, num_classes)])
        self.pooling = pooling

    def forward(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Classify N rows: hidden (N, T, d) to (N, C)."""
        pooled = hidden[:, 0] if self.pooling == "cls" else weighted_mean(hidden, tokens)  # (N, d)
        dropout, linear = self
        logits: Tensor = linear(dropout(pooled))
        return logits


def exit_head(hidden_size: int, num_classes: int, pooling: Pooling, dropout: float) -> nn.Module:
    """Build the head of one exit."""
    if pooling == "window":
        return WindowHead(hidden_size, num_classes, dropout)
    return LinearHead(hidden_size, num_classes, pooling, dropout)


def mean_weights(kept: Tensor) -> Tensor:
    """Return the weight of every token in the mean of its row, twice: kept (N, 1, T) in {0, 1} to (N, 2, T).

    A row without tokens gets zeros, not NaN. The sum is exact in any order: it counts ones. Twice, because ONNX
    Runtime's kernel for products with a single row rounds by the padded length (docs/tolerances.md).
    """
    weights = kept / kept.sum(dim=-1, keepdim=True).clamp(min=1.0)
    return torch.cat([weights, weights], dim=1)


def weighted_mean(states: Tensor, tokens: Tokens) -> Tensor:
    """Return the mean over the tokens of every row: (N, T, d) to (N, d)."""
    return torch.matmul(tokens.mean_weights, states)[:, 0]
