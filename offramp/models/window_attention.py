"""Attention of a BERT layer: dense, or within a window of neighbours and with [CLS] (Longformer's pattern).

A token looks at the `window` / 2 tokens on either side, at itself and at the first token; the first token looks at
all (arXiv 2510.12856, section 3.2; arXiv 2004.05150). Written twice: under a dense mask, and in blocks, where it costs
O(T x window). Blocks are rows of their own, so the compiler sees ordinary attention with more rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Layers and their attention are those of transformers, which has no types for their parts: here they are Any.

# Added to the attention scores of what must not be looked at. Finite, because -inf keeps the mask, the addition and
# the softmax out of FP16 (executed, ModelOpt AutoCast 0.47) and makes NaN of a row that is all padding; exp(-1e4) is
# exactly 0 in FP32 and FP16, so padding changes no bit.
MASKED_SCORE = -1e4

# Queries in a block. 16 and 64 were slower or as fast at every length (docs/log.md, 2026-11-22).
BLOCK_SIZE = 32
# From this length on, blocks are faster than all pairs under a mask (docs/log.md, 2026-11-22).
BLOCKS_FROM = 256


def blocks_pay(length: int) -> bool:
    """Tell whether texts of `length` tokens are faster in blocks, on ONNX Runtime's CPU, for a window of 32.

    A model is exported for all lengths, and blocks round differently: so it is chosen once, by the usual length.
    """
    return length >= BLOCKS_FROM


def additive(allowed: Tensor) -> Tensor:
    """Return what to add to scores: allowed in {0, 1}, of any shape, to {MASKED_SCORE, 0}."""
    return (1.0 - allowed) * MASKED_SCORE


def window_mask(kept: Tensor, window: int) -> Tensor:
    """Return the mask of the window pattern over all tokens: kept (N, 1, T) to (N, 1, T, T) in {MASKED_SCORE, 0}."""
    places = torch.arange(kept.shape[2], device=kept.device)
    rows, columns = places[:, None], places[None, :]
    near = (rows - columns).abs() <= window // 2
    return additive((near | (rows == 0) | (columns == 0)).to(kept.dtype) * kept[:, None])


@dataclass(frozen=True)
class Blocks:
    """The window pattern over T tokens as M blocks of B queries; places are counted along T.

    queries (M, B): which token each query is, the last one where there are no more. near (M, 1 + B + window): which
    tokens a block looks at, [CLS] first. first (N, 1, 1, T) and others (N M, 1, B, 1 + B + window): what to add to
    the scores of [CLS] and of a block. behind (T - 1,): the places behind [CLS].
    """

    queries: Tensor
    near: Tensor
    first: Tensor
    others: Tensor
    behind: Tensor


def block_masks(kept: Tensor, window: int, size: int) -> Blocks:
    """Return the blocks of `size` queries for kept (N, 1, T) in {0, 1}."""
    length = kept.shape[2]
    starts = torch.arange((length + size - 1) // size, device=kept.device)[:, None] * size  # (M, 1)
    queries = starts + torch.arange(size, device=kept.device)  # (M, B)
    near = starts - window // 2 + torch.arange(size + window, device=kept.device)  # (M, B + window)
    is_other = ((near > 0) & (near < length)).to(kept.dtype)  # a token, and not [CLS], which has its own column
    near = near.clamp(0, length - 1)
    tokens = kept[:, 0].index_select(1, near.reshape(-1)).reshape(-1, 1, *near.shape)  # (N, 1, M, B + window)
    offsets = torch.arange(size + window, device=kept.device) - torch.arange(size, device=kept.device)[:, None]
    is_near = ((offsets >= 0) & (offsets <= window)).to(kept.dtype)  # (B, B + window)
    allowed = (tokens * is_other).transpose(1, 2) * is_near  # (N, M, B, B + window)
    allowed = functional.pad(allowed, (1, 0), value=1.0).reshape(-1, 1, size, 1 + size + window)
    return Blocks(
        queries=queries.clamp(max=length - 1),
        near=functional.pad(near, (1, 0)),
        first=additive(kept)[:, None],
        others=additive(allowed),
        behind=torch.arange(1, length, device=kept.device),
    )


def taken(states: Tensor, places: Tensor) -> Tensor:
    """Take places (M, K) of every row as rows of their own: states (N, T, d) to (N M, K, d)."""
    return states.index_select(1, places.reshape(-1)).reshape(-1, places.shape[1], states.shape[2])


Mask = Tensor | Blocks


def score_mask(kept: Tensor, window: int, *, in_blocks: bool) -> Mask:
    """Return what the layers need to know of kept (N, 1, T) in {0, 1}; a window of 0 is dense attention."""
    if in_blocks:
        return block_masks(kept, window, BLOCK_SIZE)
    return window_mask(kept, window) if window else additive(kept)[:, None]


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the context (R, Tq, d) and the weights (R, H, Tq, Tk) of rows that each attend to themselves.

    query (R, Tq, d), key and value (R, Tk, d), mask broadcasts to (R, H, Tq, Tk) and is added.
    """
    width = module.attention_head_size
    queries, keys, values = (
        states.view(states.shape[0], states.shape[1], -1, width).transpose(1, 2) for states in (query, key, value)
    )
    scores = torch.matmul(queries, keys.transpose(2, 3)) * width**-0.5 + mask
    weights = module.dropout(functional.softmax(scores, dim=-1))
    context = torch.matmul(weights, values).transpose(1, 2)
    return context.reshape(query.shape[0], query.shape[1], -1), weights


def block_attention(module: Any, hidden: Tensor, blocks: Blocks) -> Tensor:
    """Attend in blocks: hidden (N, T, d) to the context (N, T, d)."""
    query, key, value = module.query(hidden), module.key(hidden), module.value(hidden)
    # Twice, because ONNX Runtime's kernel for products with a single row rounds by the length (docs/tolerances.md).
    twice = torch.cat([query[:, :1], query[:, :1]], dim=1)  # (N, 2, d)
    first, _ = attention(module, twice, key, value, blocks.first)
    near_keys, near_values = taken(key, blocks.near), taken(value, blocks.near)
    others, _ = attention(module, taken(query, blocks.queries), near_keys, near_values, blocks.others)  # (N M, B, d)
    others = others.reshape(hidden.shape[0], -1, hidden.shape[2]).index_select(1, blocks.behind)
    return torch.cat([first[:, :1], others], dim=1)


def received(weights: Tensor, queries: Tensor) -> Tensor:
    """Return the attention that each key received: the sum over queries, the mean over heads.

    weights (R, H, Tq, Tk), queries (R, Tq) in {0, 1}: those that count; to (R, Tk). Sums are products, as in heads.py.
    """
    heads = weights.shape[1]
    twice = torch.stack([queries, queries], dim=1)[:, None]  # (R, 1, 2, Tq)
    by_head = torch.matmul(twice, weights)[:, :, 0]  # (R, H, Tk)
    mean = torch.full((2, heads), 1.0 / heads, dtype=weights.dtype, device=weights.device)
    return torch.matmul(mean, by_head)[:, 0]


def run_layer(layer: Any, hidden: Tensor, mask: Mask) -> Tensor:
    """Run a layer of a BERT-like encoder: hidden (N, T, d) to (N, T, d)."""
    if isinstance(mask, Tensor):
        output: Tensor = layer(hidden, mask)
        return output
    return after_attention(layer, hidden, block_attention(layer.attention.self, hidden, mask))


def run_layer_and_listen(layer: Any, hidden: Tensor, kept: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Run a layer and return the attention that each token received, too: (N, T, d) and (N, T); kept (N, 1, T)."""
    module = layer.attention.self
    query, key, value = module.query(hidden), module.key(hidden), module.value(hidden)
    context, weights = attention(module, query, key, value, mask)
    return after_attention(layer, hidden, context), received(weights, kept[:, 0])


def after_attention(layer: Any, hidden: Tensor, context: Tensor) -> Tensor:
    """Run what a layer does with the context of its attention: both (N, T, d), as the result."""
    attended = layer.attention.output(context, hidden)
    output: Tensor = layer.output(layer.intermediate(attended), attended)
    return output
