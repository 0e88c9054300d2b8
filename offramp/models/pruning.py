"""Progressive token pruning: after some layers the sequence really becomes shorter (arXiv 2510.12856, Algorithm 1).

Every row keeps its own ceil((1 - p)(t - 1)) tokens and [CLS], t being its tokens without padding: in their order, at
the front, and behind them padding up to what the padded length comes to. So a row's answer does not depend on what it
was batched with or padded to.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from offramp.errors import OptionError
from offramp.models.window_attention import additive

Importance = Literal["norm", "attention"]

_STEPS = 1000  # a ratio is rounded to this many steps, so that counts are exact integers everywhere
_CLS_IMPORTANCE = 1e4  # above all others, and a number that FP16 has


@dataclass(frozen=True)
class Pruning:
    """Where tokens go, and which.

    After each of `layers` a row loses `ratio` of its tokens, [CLS] never, and keeps `min_tokens` at least.
    `importance` is the L2 norm of a token's state or the attention that it received in the layer before. With
    `merge` the tokens that go leave their mean, weighted by importance, behind the others as one token more.
    Raises OptionError.
    """

    layers: tuple[int, ...] = (2, 4)
    ratio: float = 0.3
    importance: Importance = "norm"
    min_tokens: int = 4
    merge: bool = False

    def __post_init__(self) -> None:
        increasing = all(low < high for low, high in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or self.layers[0] < 1 or not increasing:
            raise OptionError(
                f"pruning layers: got {self.layers}, expected numbers of layers from 1, increasing: (2, 4)"
            )
        check_ratio(self.ratio)
        if self.importance not in get_args(Importance):
            raise OptionError(f"importance: got {self.importance!r}, expected one of {get_args(Importance)}")
        if self.min_tokens < 1:
            raise OptionError(f"min_tokens: got {self.min_tokens}, expected 1 or more")


def check_ratio(ratio: float) -> None:
    """Raise OptionError unless `ratio` is a share of tokens that may go."""
    if not 0.0 <= ratio < 1.0:
        raise OptionError(f"pruning ratio: got {ratio}, expected a number in [0, 1)")


def num_kept(num_tokens: int, ratio: float, pruning: Pruning) -> int:
    """Return how many of `num_tokens` tokens of a row are left, [CLS] and a merged token included; never more.

    Also right for a length that torch.export leaves open.
    """
    stay = _STEPS - round(_STEPS * ratio)
    kept = (stay * (num_tokens - 1) + _STEPS - 1) // _STEPS + 1
    kept = torch.sym_max(kept, pruning.min_tokens) + int(pruning.merge)  # type: ignore[no-untyped-call]
    return torch.sym_min(kept, num_tokens)  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True)
class Shortening:
    """One pruning of rows of at most `limit` tokens: by how much now, which annealing changes."""

    pruning: Pruning
    ratio: float
    limit: int

    def num_kept(self, num_tokens: Tensor, *, merged: bool) -> Tensor:
        """Return how many tokens each row keeps of num_tokens (N,) int64, with or without the merged one: (N,)."""
        counts = counts_up_to(self.limit, self.ratio, self.pruning if merged else replace(self.pruning, merge=False))
        return torch.tensor(counts, device=num_tokens.device).index_select(0, num_tokens)


@lru_cache(maxsize=64)
def counts_up_to(limit: int, ratio: float, pruning: Pruning) -> tuple[int, ...]:
    """Return `num_kept` of every number of tokens from 0 to `limit`: one lookup instead of nine operators."""
    return tuple(num_kept(tokens, ratio, pruning) for tokens in range(limit + 1))


def prune(hidden: Tensor, kept: Tensor, importance: Tensor, how: Shortening) -> tuple[Tensor, Tensor]:
    """Drop the least important tokens of every row, padding first, and of equally important tokens the later.

    hidden (N, T, d), kept (N, 1, T) in {0, 1} and importance (N, T) >= 0 to hidden (N, K, d) and kept (N, 1, K).
    """
    length = hidden.shape[1]
    most = num_kept(length, how.ratio, how.pruning)  # K
    # From 1, unlike the places in window_attention: the exporter would make one tensor of both, and what reads that
    # behind the cut would need the length before the pruning.
    ranks = torch.arange(1, most + 1, device=hidden.device)  # (K,)
    num_tokens = kept[:, 0].sum(dim=1).to(torch.int64)  # (N,); exact: it counts ones
    scores = importance + additive(kept)[:, 0]  # (N, T); padding goes first
    scores = functional.pad(scores[:, 1:], (1, 0), value=_CLS_IMPORTANCE)
    ranked = ranked_places(scores, most)  # (N, K)
    chosen = ranks <= how.num_kept(num_tokens, merged=False)[:, None]  # (N, K)
    # In their order; what was not chosen becomes padding: the last token, which is as good as any.
    order = torch.where(chosen, ranked, length - 1).topk(most, dim=1, largest=False, sorted=True).values  # (N, K)
    short = hidden.gather(1, order[:, :, None].expand(-1, -1, hidden.shape[2]))  # (N, K, d)
    left = chosen
    if how.pruning.merge:
        left = ranks <= how.num_kept(num_tokens, merged=True)[:, None]  # (N, K)
        mean = mean_of_dropped(hidden, kept, importance, ranked, chosen)
        short = torch.where((left & ~chosen)[:, :, None], mean[:, None], short)
    return short, left[:, None].to(hidden.dtype)


def ranked_places(scores: Tensor, most: int) -> Tensor:
    """Return the places of the `most` highest scores of every row, highest first, the earlier of equals first.

    scores (N, T) to (N, K). ONNX's TopK breaks ties like this, torch's does not and its stable sort cannot be exported.
    """
    if torch.compiler.is_exporting():
        return scores.topk(most, dim=1).indices
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :most]


def mean_of_dropped(hidden: Tensor, kept: Tensor, importance: Tensor, ranked: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean, weighted by importance, of the tokens that go: (N, d). Sums are products, as in heads.py."""
    weights = importance * kept[:, 0]  # (N, T)
    weights = weights.scatter(1, ranked, weights.gather(1, ranked).where(~chosen, 0.0))
    pair = torch.stack([weights, weights], dim=1)  # (N, 2, T)
    total = torch.matmul(pair, kept.transpose(1, 2).expand(-1, -1, 2))[:, 0, :1]  # (N, 1)
    return torch.matmul(pair, hidden)[:, 0] / total.clamp(min=torch.finfo(hidden.dtype).tiny)


def norm_importance(hidden: Tensor) -> Tensor:
    """Return the L2 norm of every token's state over the root of d: hidden (N, T, d) to (N, T).

    The sum is a product with two equal columns, because ONNX Runtime's ReduceSum gives other bits in another batch.
    """
    width = hidden.shape[2]
    mean = torch.full((width, 2), 1.0 / width, dtype=hidden.dtype, device=hidden.device)
    return torch.matmul(hidden * hidden, mean)[:, :, 0].sqrt()
