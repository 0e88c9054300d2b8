"""The encoder: its exits, its independence of padding and neighbours, and what it refuses."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_encoder import WORDS, tiny_bert
from transformers import BertConfig, BertModel

from offramp.errors import DataError, ModelError, OptionError
from offramp.models.checkpoint import Checkpoint
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig, encoder_from_pretrained
from offramp.models.heads import Tokens

# torch and transformers order the same FP32 sums differently: 3e-7 seen, on logits of about 0.3.
LOGIT_TOLERANCE = 1e-5


def make_inputs(lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make token ids and a mask, (N, width) each, rows padded to the width."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, len(WORDS), (len(lengths), width), generator=generator) * mask
    return ids, mask


@pytest.fixture(scope="module", params=["window", "mean", "cls"])
def encoder(request: pytest.FixtureRequest) -> EarlyExitEncoder:
    """Return an encoder with exits after the embeddings and layers 2 and 4."""
    config = EncoderConfig(exits=(0, 2, 4), num_classes=3, pooling=request.param, early_pooling=request.param)
    torch.manual_seed(0)
    return EarlyExitEncoder(tiny_bert(), config).eval()


def reference_logits(encoder: EarlyExitEncoder, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Run transformers' own forward pass and pool its hidden states row by row."""
    hidden = tiny_bert().eval()(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    logits = []
    for layer, head in zip(encoder.config.exits, encoder.heads, strict=True):
        rows = [state[row.bool()][None] for state, row in zip(hidden[layer], mask, strict=True)]  # (1, T of the row, d)
        logits.append(torch.cat([head(row, tokens_of_length(row.shape[1])) for row in rows]))
    return logits


def tokens_of_length(length: int) -> Tokens:
    """One row without padding."""
    return Tokens(torch.ones(1, 1, length), torch.full((1, 2, length), 1 / length))


@torch.no_grad()
def test_logits_are_those_of_transformers(encoder: EarlyExitEncoder) -> None:
    ids, mask = make_inputs([7, 3, 1], 7)
    got = encoder(ids, mask)
    assert [tuple(logits.shape) for logits in got] == [(3, 3)] * 3
    for logits, expected in zip(got, reference_logits(encoder, ids, mask), strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=LOGIT_TOLERANCE)


@torch.no_grad()
def test_padding_and_neighbours_change_nothing(encoder: EarlyExitEncoder) -> None:
    ids, mask = make_inputs([5, 9], 9)
    together = encoder(ids, mask)
    alone = encoder(ids[:1, :5], mask[:1, :5])
    for logits, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(logits[:1], expected, rtol=0, atol=LOGIT_TOLERANCE)


@torch.no_grad()
def test_a_row_of_padding_only_stays_finite(encoder: EarlyExitEncoder) -> None:
    ids, mask = make_inputs([0, 4], 4)
    assert all(torch.isfinite(logits).all() for logits in encoder(ids, mask))


@torch.no_grad()
def test_half_precision_stays_finite(encoder: EarlyExitEncoder) -> None:
    ids, mask = make_inputs([2, 6], 6)
    half = EarlyExitEncoder(tiny_bert(), encoder.config).eval().half()
    assert all(torch.isfinite(logits).all() for logits in half(ids, mask))


def test_layers_above_the_last_exit_are_dropped() -> None:
    static = EarlyExitEncoder(tiny_bert(), EncoderConfig(exits=(2,))).eval()
    assert len(static.layers) == 2
    assert len(static(*make_inputs([3, 2], 3))) == 1


def test_heads_come_from_the_seed_and_leave_the_random_state_alone(encoder_path: Path) -> None:
    config = EncoderConfig(exits=(1, 2))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (encoder_from_pretrained(encoder_path, config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.heads[0].classes.weight, same.heads[0].classes.weight)
    assert not torch.equal(one.heads[0].classes.weight, other.heads[0].classes.weight)
    assert torch.equal(one.embeddings.word_embeddings.weight, tiny_bert().embeddings.word_embeddings.weight)


# torch 2.13's exporter warns about itself and about a dimension name used twice, which is meant.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:# The axis name.* will not be used:UserWarning")
def test_exported_graph_says_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = checkpoint.model.eval()
    program = torch.onnx.export(
        model,
        make_inputs([6, 4], 6),
        dynamo=True,
        opset_version=20,
        verbose=False,
        dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")},
    )
    assert program is not None
    operators = {node.op_type for node in program.model.graph}
    assert not operators & {"IsNaN", "Where", "Expand", "If"}
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for lengths in ([5], [9, 2, 4], [1]):
        ids, mask = make_inputs(lengths, max(lengths))
        got = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(ids, mask)
        for got_logits, expected_logits in zip(got, expected, strict=True):
            np.testing.assert_allclose(got_logits, expected_logits.numpy(), rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"exits": ()},
        {"exits": (-1, 2)},
        {"exits": (2, 2)},
        {"exits": (4, 2)},
        {"num_classes": 1},
        {"pooling": "max"},
        {"early_pooling": "max"},
        {"dropout": 1.0},
    ],
)
def test_config_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(wrong))}: got .*expected"):
        EncoderConfig(**wrong)


def test_exit_above_the_last_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="4 layers"):
        EarlyExitEncoder(tiny_bert(), EncoderConfig(exits=(2, 6)))


def test_decoder_is_refused() -> None:
    bert_config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, is_decoder=True)
    with pytest.raises(ModelError, match="decoder"):
        EarlyExitEncoder(BertModel(bert_config), EncoderConfig(exits=(1,)))


def test_loading_what_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.safetensors"):
        encoder_from_pretrained(tmp_path / "absent", EncoderConfig())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError, match="gpt2"):
        encoder_from_pretrained(tmp_path, EncoderConfig())


def test_weights_that_lack_a_layer_are_refused(encoder_path: Path, tmp_path: Path) -> None:
    config = (encoder_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    (tmp_path / "model.safetensors").write_bytes((encoder_path / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="weights missing"):
        encoder_from_pretrained(tmp_path, EncoderConfig(exits=(5,)))
