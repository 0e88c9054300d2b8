"""The decoder against transformers' own, and its promises: chunks, padding, positions that stay."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from offramp.errors import DataError, ModelError, OptionError
from offramp.models.decoder import DecoderConfig, EarlyExitDecoder, Said
from offramp.models.llama import decoder_from_llama, load_llama
from tests import decoders

CHUNK_ATOL = 1e-4  # docs/tolerances.md: chunk against one by one, logits up to 30


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def said(model: EarlyExitDecoder, ids: torch.Tensor, lengths=None, past=None, active=None) -> Said:
    rows, chunk = ids.shape
    config = model.config
    lengths = torch.zeros(rows, dtype=torch.int64) if lengths is None else lengths
    past = past or [(torch.zeros(rows, config.kv_heads, 1, config.head_size),) * 2] * config.exits[-1]
    active = active or [torch.arange(chunk).repeat(rows, 1)] * (len(config.exits) - 1)
    return model(ids, lengths, active, past)


@pytest.mark.parametrize("tied", [True, False])
def test_the_final_exit_is_the_model_of_transformers(tied: bool) -> None:
    ids = torch.tensor([prompt * 20 for prompt in ([5, 80, 3], [200, 1, 7])])[:, :50]
    theirs = decoders.llama(tied)
    ours = decoder_from_llama(theirs, decoders.EXITS)
    assert torch.allclose(said(ours, ids).exits[-1].logits, theirs(ids).logits, atol=CHUNK_ATOL)


def test_scaled_rotary_embeddings_are_taken_over() -> None:
    """As Llama 3.1 has them."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, rope_parameters=scaling, head_dim=16,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    ids = torch.arange(60)[None] % 50
    ours = decoder_from_llama(theirs, (2,))
    assert torch.allclose(said(ours, ids).exits[-1].logits, theirs(ids).logits, atol=CHUNK_ATOL)


def test_a_chunk_is_its_positions_one_by_one() -> None:
    """Behind a past of another length in every row, in a slab with rubbish behind it."""
    model, length = decoders.decoder(), torch.tensor([7, 4])
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(decoders.VOCABULARY, (2, 12), generator=generator)
    slabs = [
        (torch.randn(2, 2, 16, 8, generator=generator), torch.randn(2, 2, 16, 8, generator=generator))
        for _ in model.layers
    ]
    whole = said(model, ids[:, :5], length, slabs)
    for step in range(5):
        one = said(model, ids[:, step : step + 1], length + step, slabs)
        for (keys, values), (key, value) in zip(slabs, one.present, strict=True):
            for row in range(2):
                keys[row, :, length[row] + step], values[row, :, length[row] + step] = key[row, :, 0], value[row, :, 0]
        for exit_one, exit_whole in zip(one.exits, whole.exits, strict=True):
            assert torch.allclose(exit_one.logits[:, 0], exit_whole.logits[:, step], atol=CHUNK_ATOL)


def test_padding_at_the_end_of_a_chunk_changes_nothing_before_it() -> None:
    model = decoders.decoder()
    ids = torch.arange(10)[None]
    other = ids.clone()
    other[:, 6:] = 99
    for mine, theirs in zip(said(model, ids).exits, said(model, other).exits, strict=True):
        assert torch.equal(mine.logits[:, :6], theirs.logits[:, :6])


def test_a_position_that_stays_keeps_its_state_and_still_has_keys() -> None:
    model = decoders.decoder()
    ids = torch.arange(6)[None]
    active = [torch.tensor([[1, 4, 5]]), torch.tensor([[4]])]
    some, everybody = said(model, ids, active=active), said(model, ids)
    stays = [0, 2, 3]
    first, second = some.exits[0].hidden, some.exits[1].hidden
    assert torch.allclose(second[:, stays], model.exits[1].norm(undo_norm(model, ids))[:, stays], atol=1e-5)
    assert torch.equal(first, everybody.exits[0].hidden)
    key = model.layers[1].key(model.layers[1].attention_norm(undo_norm(model, ids)))
    assert torch.allclose(some.present[1][0].norm(dim=-1), key.view(1, 6, 2, 8).transpose(1, 2).norm(dim=-1), atol=1e-4)


def undo_norm(model: EarlyExitDecoder, ids: torch.Tensor) -> torch.Tensor:
    """The hidden state after the first layer."""
    places = model.places(torch.zeros(1, dtype=torch.int64), (ids.shape[1], 1), None)
    hidden = model.embedding(ids)
    return model.layers[0](hidden, hidden, places, (torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)))[0]


def test_what_is_not_like_llama_is_refused(tmp_path) -> None:
    with pytest.raises(OptionError, match="exits: got"):
        DecoderConfig(10, 8, 2, 2, 2, 8, (2, 1))
    biased = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_bias=True,
    )
    with pytest.raises(ModelError, match="bias"):
        decoder_from_llama(LlamaForCausalLM(biased))
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ModelError, match="bert"):
        decoder_from_llama(bert)
    with pytest.raises(DataError, match="expected a directory"):
        load_llama(tmp_path)


def test_a_model_that_computes_with_the_same_weights_in_another_way_is_refused() -> None:
    """Granite has Llama's names and activation, and multiplies embeddings and logits by numbers of its config."""
    config = GraniteConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, embedding_multiplier=12.0, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ModelError, match="decoder from granite: logits differ"):
        decoder_from_llama(GraniteForCausalLM(config))
