"""Window attention, in blocks and under a mask, against a loop over queries that looks at the right keys."""

import pytest
import torch
from tiny_encoder import tiny_bert
from torch.nn import functional

from offramp.models import window_attention
from offramp.models.window_attention import attention, block_masks, received, run_layer, score_mask

WINDOW = 32
# FP32 sums of at most 130 products in another order: 1.7e-6 seen, in contexts up to 0.4 (docs/tolerances.md).
CONTEXT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def layer() -> torch.nn.Module:
    """Return a layer of the tiny encoder whose attention is far from even."""
    bert = tiny_bert().eval()
    bert.set_attn_implementation("eager")
    layer = bert.encoder.layer[0]
    with torch.no_grad():
        layer.attention.self.query.weight *= 40
        layer.attention.self.key.weight *= 40
    return layer


def looked_at(query: int, kept: torch.Tensor, window: int) -> torch.Tensor:
    """Return which keys a query looks at: kept (T,) to (T,) bool."""
    near = [query == 0 or key == 0 or abs(key - query) <= window // 2 for key in range(len(kept))]
    return torch.tensor(near) & kept.bool()


def reference(module: torch.nn.Module, hidden: torch.Tensor, kept: torch.Tensor, window: int) -> torch.Tensor:
    """One row: hidden (T, d), kept (T,) to the context (T, d), query by query and head by head."""
    heads = [part.view(len(hidden), 4, 8) for part in (module.query(hidden), module.key(hidden), module.value(hidden))]
    query, key, value = heads
    context = torch.zeros(len(hidden), 4, 8)
    for place in range(len(hidden)):
        keys = looked_at(place, kept, window)
        scores = torch.einsum("hw,khw->hk", query[place], key[keys]) / 8**0.5
        context[place] = torch.einsum("hk,khw->hw", functional.softmax(scores, dim=1), value[keys])
    return context.reshape(len(hidden), 32)


def states(length: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(rows, length, 32, generator=generator)


@pytest.mark.parametrize("in_blocks", [False, True])
@torch.no_grad()
def test_every_length_is_the_reference(layer: torch.nn.Module, in_blocks: bool) -> None:
    """1 to 130 tokens; the last rows are ragged: every second length has padding, in one token of 7 a gap."""
    module = layer.attention.self
    for length in range(1, 131):
        hidden, kept = states(length), torch.ones(1, 1, length)
        if length % 2 == 0:
            kept[:, :, length - length // 3 :] = 0
            kept[:, :, 3::7] = 0
        mask = score_mask(kept, WINDOW, in_blocks=in_blocks)
        if in_blocks:
            context = window_attention.block_attention(module, hidden, mask)
        else:
            context, _ = attention(module, module.query(hidden), module.key(hidden), module.value(hidden), mask)
        expected = reference(module, hidden[0], kept[0, 0], WINDOW)
        torch.testing.assert_close(context[0], expected, rtol=0, atol=CONTEXT_TOLERANCE)


@pytest.mark.parametrize("window", [2, 10, 32, 64])
@torch.no_grad()
def test_ragged_batches_in_blocks_are_those_under_a_mask(layer: torch.nn.Module, window: int) -> None:
    for length in (1, 2, 31, 32, 33, 64, 65, 100, 129):
        hidden = states(length, rows=3)
        lengths = torch.tensor([length, max(1, length // 2), 1])
        kept = (torch.arange(length) < lengths[:, None]).float()[:, None]
        dense, blocks = (run_layer(layer, hidden, score_mask(kept, window, in_blocks=flag)) for flag in (False, True))
        for row, tokens in enumerate(lengths.tolist()):
            torch.testing.assert_close(blocks[row, :tokens], dense[row, :tokens], rtol=0, atol=CONTEXT_TOLERANCE)


def test_blocks_cost_what_the_window_costs() -> None:
    """Scores are computed for T (1 + B + window) pairs at most, and B more queries."""
    blocks = block_masks(torch.ones(2, 1, 512), WINDOW, window_attention.BLOCK_SIZE)
    assert blocks.others.shape == (2 * 16, 1, 32, 1 + 32 + WINDOW)


@torch.no_grad()
def test_a_row_of_padding_only_stays_finite(layer: torch.nn.Module) -> None:
    kept = torch.zeros(1, 1, 40)
    assert torch.isfinite(run_layer(layer, states(40), score_mask(kept, WINDOW, in_blocks=True))).all()


@torch.no_grad()
def test_received_attention_is_the_sum_over_real_queries(layer: torch.nn.Module) -> None:
    hidden, kept = states(9, rows=2), torch.ones(2, 1, 9)
    kept[1, :, 5:] = 0
    hidden_out, heard = window_attention.run_layer_and_listen(layer, hidden, kept, score_mask(kept, 0, in_blocks=False))
    _, weights = layer.attention(hidden, score_mask(kept, 0, in_blocks=False))
    for row, tokens in enumerate((9, 5)):
        torch.testing.assert_close(heard[row], weights[row].mean(0)[:tokens].sum(0), rtol=0, atol=CONTEXT_TOLERANCE)
        assert heard[row].sum() == pytest.approx(tokens, abs=1e-4)
    expected = layer(hidden, score_mask(kept, 0, in_blocks=False))
    torch.testing.assert_close(hidden_out, expected, rtol=0, atol=CONTEXT_TOLERANCE)
    assert received(weights, kept[:, 0]).shape == (2, 9)
