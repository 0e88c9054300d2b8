"""Exits on encoders of `transformers` that are not ours, against the encoders' own hidden states, row by row."""

from pathlib import Path

import pytest
import torch
from attachable import ENCODERS, tiny_attached
from tiny_encoder import tiny_tokenizer
from torch import nn
from transformers import BertConfig, BertModel

from offramp.errors import DataError, ModelError, OptionError
from offramp.models.attached import AttachedConfig, attach_exits, attached_from_pretrained
from offramp.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from offramp.models.encoder import quiet_transformers
from offramp.models.heads import Tokens, mean_weights
from offramp.models.kinds import KINDS

# Our mask of -1e4 against theirs, in FP32: 5e-7 seen on logits of about 1.
TOLERANCE = 1e-5
IDS = torch.tensor([[5, 6, 7, 8, 9, 4], [5, 9, 3, 2, 0, 0], [7, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_exits_read_the_encoders_own_states(name: str) -> None:
    model = tiny_attached(name)
    answers = model(IDS, IDS.sign())
    assert len(answers) == 3
    for row, length in enumerate(IDS.sign().sum(dim=1).tolist()):
        ids = IDS[row : row + 1, :length]
        states = model.encoder(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        kept = torch.ones(1, 1, length)
        for head, depth, answer in zip(model.heads, model.config.exits, answers, strict=True):
            expected = head(states.hidden_states[depth], Tokens(kept, mean_weights(kept)))
            torch.testing.assert_close(answer[row : row + 1], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_checkpoint_of_any_encoder_is_loaded_again(name: str, tmp_path: Path) -> None:
    model = tiny_attached(name)
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    most = model.num_positions
    save_checkpoint(
        tmp_path / "run", Checkpoint(model, tmp_path / "tokenizer.json", ("no", "yes"), most, kind="attached")
    )
    loaded = load_checkpoint(tmp_path / "run")
    assert (loaded.kind, loaded.config, loaded.max_length) == ("attached", model.config, most)
    assert type(loaded.model.encoder) is type(model.encoder)
    for got, expected in zip(loaded.model(IDS, IDS.sign()), model(IDS, IDS.sign()), strict=True):
        assert torch.equal(got, expected)
    longest = torch.full((1, most), 5)
    assert loaded.model(longest, longest.sign())[0].shape == (1, 2), "as long a text as it says"
    with pytest.raises(OptionError, match="the model's positions"):
        Checkpoint(model, tmp_path / "tokenizer.json", ("no", "yes"), most + 1, kind="attached")


def test_what_has_no_layers_to_leave_is_refused(tmp_path: Path) -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ModelError, match=r"exits \(1, 3\): BertModel has 2 layers"):
        attach_exits(BertModel(BertConfig(**tiny)), (1, 3), 2)
    with pytest.raises(ModelError, match="got BertModel, expected an encoder"):
        attach_exits(BertModel(BertConfig(**tiny, is_decoder=True)), (1, 2), 2)
    with pytest.raises(ModelError, match="got Linear, expected an encoder"):
        attach_exits(nn.Linear(2, 2), (1, 2), 2)
    with pytest.raises(OptionError, match="num_classes: got 1"):
        AttachedConfig(num_classes=1)
    with pytest.raises(DataError, match="expected a directory that"):
        attached_from_pretrained(tmp_path, AttachedConfig())


def test_heads_come_from_the_seed_and_the_encoder_from_its_directory(tmp_path: Path) -> None:
    theirs = tiny_attached("ELECTRA").encoder
    with quiet_transformers():
        theirs.save_pretrained(tmp_path)
    one, same, other = (KINDS["attached"].fresh(tmp_path, AttachedConfig((1, 3)), seed) for seed in (1, 1, 2))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
        if name.startswith("encoder."):
            assert torch.equal(tensor, theirs.state_dict()[name.removeprefix("encoder.")])
    assert not torch.equal(one.heads[0].mix.weight, other.heads[0].mix.weight)
    assert len(one.layers) == 3
