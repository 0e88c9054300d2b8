"""ResNet-BK blocks: chunks, positions that have left, causality, and experts against one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from offramp.models.decoder import DecoderConfig, EarlyExitDecoder
from offramp.models.language_model import fresh_language_model
from offramp.models.resolvent_block import Experts, ResolventLayer, Sites, balance_loss, largest
from tests.decoders import resolvent_decoder

WIDTH, EXPERTS = 12, 3
ATOL = 1e-5  # float32 sums in another order


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def layer(two_sided: bool = False, top_k: int = 1) -> ResolventLayer:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = ResolventLayer(WIDTH, Experts(WIDTH, 8, EXPERTS, top_k), two_sided=two_sided).eval()
        nn.init.normal_(made.potential.weight, std=2.0)
    return made


def states(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def at_start(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 1, 1, 2)


def one_by_one(block: ResolventLayer, hidden: torch.Tensor) -> tuple[torch.Tensor, list[complex]]:
    """A text (T, d) position by position, in Python's complex numbers: what comes out, and every L."""
    value, found, values = 0j, [], []
    for state in hidden:
        said = block.experts(block.norm(state)[None, None])[0, 0]
        value = 1 / (block.potential(said).item() - 2 - 1j - value)
        values.append(value)
        found.append(state + said + block.out(torch.tensor([value.real, value.imag])))
    return torch.stack(found), values


@settings(max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any), st.integers(0, 2))
def test_a_chunk_is_its_active_positions_one_by_one(active: list[bool], repeated: int) -> None:
    """Whoever has left is no site of the chain and hands on the L before it; the last may be there several times."""
    block, hidden = layer(), states(1, len(active))
    places = [at for at, here in enumerate(active) if here]
    index = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([places + places[-1:] * repeated])
    after, (made,) = block(hidden[index], hidden, Sites(index, at_start(1)[0]), (at_start(1)[1],))
    wanted, values = one_by_one(block, hidden[0, places])
    assert torch.allclose(after[0, : len(places)], wanted, atol=ATOL)
    seen = 0
    for at, here in enumerate(active):
        seen += here
        value = values[seen - 1] if seen else 0j
        assert made[0, 0, at].tolist() == pytest.approx([value.real, value.imag], abs=ATOL)


def test_only_the_last_value_before_a_chunk_is_read() -> None:
    """Rows with pasts of other lengths, none among them, in a slab with rubbish in all other places."""
    block, hidden = layer(), states(3, 9)
    lengths = torch.tensor([4, 0, 7])
    whole = [one_by_one(block, hidden[row])[0] for row in range(3)]
    slab = torch.full((3, 1, 10, 2), torch.nan)
    for row, length in enumerate(lengths.tolist()):
        if length:
            value = one_by_one(block, hidden[row, :length])[1][-1]
            slab[row, 0, length - 1] = torch.tensor([value.real, value.imag])
    chunk = torch.stack([hidden[row, length : length + 2] for row, length in enumerate(lengths.tolist())])
    after, (made,) = block(chunk, chunk, Sites(None, lengths), (slab,))
    assert made.shape == (3, 1, 2, 2)
    for row, length in enumerate(lengths.tolist()):
        assert torch.allclose(after[row], whole[row][length : length + 2], atol=ATOL)


def test_only_a_two_sided_block_sees_the_future() -> None:
    hidden = states(1, 12)
    later = torch.cat([hidden[:, :8], states(1, 4, seed=1)], 1)
    causal, both = layer(), layer(two_sided=True)
    for block, sees in ((causal, False), (both, True)):
        here, there = (block(text, text, Sites(None, at_start(1)[0]), (at_start(1)[1],))[0] for text in (hidden, later))
        assert torch.equal(here[:, :8], there[:, :8]) != sees


def test_a_language_model_of_such_blocks_does_not_see_the_future() -> None:
    model = resolvent_decoder()
    ids = torch.arange(20)[None]
    other = ids.clone()
    other[:, 12:] = 99
    for mine, theirs in zip(model(ids).exits, model(other).exits, strict=True):
        assert torch.equal(mine.logits[:, :12], theirs.logits[:, :12])
        assert not torch.equal(mine.logits[:, 12:], theirs.logits[:, 12:])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_are_those_that_the_router_thinks_most_of(top_k: int) -> None:
    """Against a loop over positions that runs the chosen experts alone."""
    experts, hidden = layer(top_k=top_k).experts, states(2, 5)
    said = experts(hidden)
    up = experts.up.weight.view(EXPERTS, 8, WIDTH), experts.up.bias.view(EXPERTS, 8)
    down = experts.down.weight.view(WIDTH, EXPERTS, 8)
    for row in range(2):
        for at in range(5):
            state = hidden[row, at]
            chances = experts.router(state).softmax(-1)
            chosen = sorted(range(EXPERTS), key=lambda e: -chances[e].item())[:top_k]
            wanted = sum(chances[e] * down[:, e] @ nn.functional.gelu(up[0][e] @ state + up[1][e]) for e in chosen)
            assert torch.allclose(said[row, at], wanted, atol=ATOL)


def test_an_even_load_costs_one_and_a_single_expert_as_many_as_there_are() -> None:
    even = torch.eye(4).repeat(1, 3, 1)
    assert balance_loss(even, even).item() == pytest.approx(1.0)
    single = torch.eye(4)[:1].repeat(1, 8, 1)
    assert balance_loss(single, single).item() == pytest.approx(4.0)
    chances = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]])
    assert largest(chances, 1).tolist() == [[[0.5, 0, 0], [0, pytest.approx(0.6), 0]]]


def test_the_balance_is_a_penalty_of_training_alone() -> None:
    config = DecoderConfig(50, 8, 2, 1, 1, 8, (1, 2), 64, block="resnet-bk")
    model = fresh_language_model(config)
    ids = torch.arange(12)[None]
    assert [said.penalty for said in model(ids)] == [None, None]
    penalties = [said.penalty for said in model.train()(ids)]
    assert penalties[0] is None
    assert 0.9 < penalties[1].item() < 4.0
    assert isinstance(model.decoder, EarlyExitDecoder)
