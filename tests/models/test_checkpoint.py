"""What is saved is what is loaded, and damage is told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from offramp.errors import DataError, OptionError, StorageError
from offramp.models.checkpoint import (
    Checkpoint,
    checkpoint_from_encoder,
    load_checkpoint,
    save_checkpoint,
)
from offramp.models.encoder import EncoderConfig
from offramp.models.pruning import Pruning

FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """Return a saved checkpoint directory."""
    save_checkpoint(tmp_path / "runs" / "tiny", checkpoint)
    return tmp_path / "runs" / "tiny"


def test_what_is_loaded_is_what_was_saved(checkpoint: Checkpoint, saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert sorted(file.name for file in saved.iterdir()) == sorted(FILES)
    assert (loaded.config, loaded.label_names, loaded.max_length) == (
        checkpoint.config,
        checkpoint.label_names,
        checkpoint.max_length,
    )
    assert loaded.tokenizer_path == saved / "tokenizer.json"
    assert not loaded.model.training
    ids = torch.tensor([[2, 4, 6, 3], [2, 5, 3, 0]])
    for got, expected in zip(loaded.model(ids, ids.sign()), checkpoint.model.eval()(ids, ids.sign()), strict=True):
        assert torch.equal(got, expected)


def test_pruning_and_window_are_saved(encoder_path: Path, tmp_path: Path) -> None:
    pruning = Pruning(layers=(1, 2), ratio=0.4, importance="attention", min_tokens=3, merge=True)
    config = EncoderConfig(exits=(1, 3), pruning=pruning, window=8, in_blocks=True)
    save_checkpoint(tmp_path / "eat", checkpoint_from_encoder(encoder_path, config, ("a", "b"), max_length=16))
    loaded = load_checkpoint(tmp_path / "eat")
    assert loaded.config == config
    assert loaded.model.pruning_ratio == 0.4


def test_an_older_checkpoint_has_one_pooling_for_all_exits(encoder_path: Path, tmp_path: Path) -> None:
    """And neither pruning nor window."""
    config = EncoderConfig(exits=(1, 3), pooling="mean", early_pooling="mean")
    save_checkpoint(tmp_path / "old", checkpoint_from_encoder(encoder_path, config, ("a", "b"), max_length=16))
    written = json.loads((tmp_path / "old" / "config.json").read_text())
    for name in ("early_pooling", "pruning", "window", "in_blocks"):
        del written["encoder"][name]
    (tmp_path / "old" / "config.json").write_text(json.dumps(written))
    assert load_checkpoint(tmp_path / "old").config == config


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    before = torch.random.get_rng_state()
    load_checkpoint(saved)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_saving_again_replaces_the_whole(checkpoint: Checkpoint, saved: Path) -> None:
    save_checkpoint(saved, checkpoint, training_state=b"so far")
    assert (saved / "training.pt").read_bytes() == b"so far"
    save_checkpoint(saved, load_checkpoint(saved))
    assert sorted(file.name for file in saved.iterdir()) == sorted(FILES)
    assert [entry.name for entry in saved.parent.iterdir()] == ["tiny"]


def test_a_failed_save_leaves_the_old_one(checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (saved / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("offramp.models.checkpoint.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(saved, checkpoint)
    assert (saved / "model.safetensors").read_bytes() == old
    assert [entry.name for entry in saved.parent.iterdir()] == ["tiny"]


def test_safetensors_reports_a_full_disk_as_its_own_error(
    checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("offramp.models.checkpoint.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(saved, checkpoint)
    assert load_checkpoint(saved).config == checkpoint.config


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_no_checkpoint_is_not_overwritten(checkpoint: Checkpoint, tmp_path: Path, is_file: bool) -> None:
    path = tmp_path / "thesis"
    precious = path if is_file else path / "chapter"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("years of work")
    with pytest.raises(OptionError, match="something else is there"):
        save_checkpoint(path, checkpoint)
    assert precious.read_text() == "years of work"


def test_an_empty_directory_is_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    save_checkpoint(tmp_path / "new", checkpoint)
    assert load_checkpoint(tmp_path / "new").max_length == checkpoint.max_length


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(DataError, match=f"{name}.*offramp train"):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("length", [0, 7, 100])
def test_a_truncated_file_is_told(saved: Path, name: str, length: int) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:length])
    with pytest.raises(DataError, match=name):
        load_checkpoint(saved)


def test_a_foreign_directory_is_told(encoder_path: Path) -> None:
    with pytest.raises(DataError, match="not of the format offramp-checkpoint"):
        load_checkpoint(encoder_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "format version 2"),
        ({"kind": "oracle"}, "got kind 'oracle', expected one of bert"),
        ({"encoder": {"exits": [1]}}, "do not fit"),
        ({"encoder": {"exits": [3, 1]}}, "do not fit"),
        ({"encoder": {"layers": [1]}}, "do not fit"),
        ({"label_names": ["one"]}, "do not fit"),
        ({"max_length": "long"}, "do not fit"),
        ({"bert": {"hidden_size": 64}}, "do not fit"),
        ({"bert": 5}, "do not fit"),
        ({"bert": {"hidden_size": "wide"}}, "do not fit"),
        ({"bert": {"num_hidden_layers": 1}}, "do not fit"),
    ],
)
def test_an_edited_config_is_told(saved: Path, change: dict[str, object], problem: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(DataError, match=problem):
        load_checkpoint(saved)


def test_an_encoder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json; save one"):
        checkpoint_from_encoder(tmp_path, EncoderConfig(), ("a", "b"))


def test_names_and_lengths_are_checked(encoder_path: Path) -> None:
    with pytest.raises(OptionError, match="label_names"):
        checkpoint_from_encoder(encoder_path, EncoderConfig(exits=(1,)), ("a", "b", "c"), max_length=8)
    with pytest.raises(OptionError, match="expected 3 to 32"):
        checkpoint_from_encoder(encoder_path, EncoderConfig(exits=(1,)), ("a", "b"), max_length=33)
