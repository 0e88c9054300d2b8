"""`offramp train` of a hierarchical language model: its phases, what a kill leaves, a bundle that generates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from offramp.bundle import load_manifest
from offramp.cli import main
from offramp.commands import hierarchical
from offramp.commands.hierarchical import load_trained
from offramp.errors import DataError
from tests import decoders

WORDS = 200


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained decoder, a file of texts, and how it is trained."""
    folder = tmp_path_factory.mktemp("recipe")
    decoders.llama().save_pretrained(folder / "llama")
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder / "llama")
    numbers = torch.randint(WORDS, (60, 24), generator=torch.Generator().manual_seed(3)).tolist()
    lines = [
        json.dumps({"text": " ".join(f"w{n}" for n in row), "label": "ab"[at % 2]}) for at, row in enumerate(numbers)
    ]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    (folder / "tiny.toml").write_text(
        f'[data]\nname = "{folder}/texts.jsonl"\nmax_length = 24\n'
        f'[model]\nkind = "hierarchical-lm"\nweights = "{folder}/llama"\nexits = [1, 3]\ncapacities = [0.8, 0.5]\n'
        "own_layers = 1\ndraft_vocabulary = 80\n"
        "[model.routers]\nfitted = 8\ncalibrated = 8\nlearn = { steps = 2, batch = 4 }\n"
        "[model.early]\ntexts = 32\nprompt = 4\nlearn = { steps = 12, batch = 8, learning_rate = 1e-2 }\n"
        "[model.gates]\nlearn = { steps = 6, batch = 64 }\n"
    )
    return folder / "tiny.toml"


def test_phase_after_phase_and_on_to_a_bundle(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the gates, it goes on there, and neither texts nor states are computed again."""

    def killed(*_: object) -> None:
        raise DataError("killed")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(hierarchical, "train_gates", killed)
        assert "killed" in run("train", recipe, "-o", out)[1]
    before = load_trained(out)
    assert before.phases == ("routers", "early")
    monkeypatch.setattr(hierarchical, "continuations", killed)
    monkeypatch.setattr("offramp.models.states.hidden_states", killed)
    code, output = run("train", recipe, "-o", out, "--resume", "--json")
    assert code == 0, output
    assert [report["steps"] for report in json.loads(output)["epochs"]] == [6]
    after = load_trained(out)
    assert after.phases == ("routers", "early", "gates")
    changed = {
        name
        for name, tensor in after.decoder.state_dict().items()
        if not torch.equal(tensor, before.decoder.state_dict()[name])
    }
    assert changed == {"exits.0.gate.weight", "exits.0.gate.bias"}
    frozen = decoders.llama().model.layers[1].mlp.up_proj.weight
    assert torch.equal(after.decoder.layers[1].up.weight, frozen)
    assert "its phases are done" in run("train", recipe, "-o", out, "--resume")[1]
    texts = next((tmp_path / "out.states" / "texts").iterdir())
    np.save(texts, np.load(texts)[::-1])
    monkeypatch.setattr(hierarchical, "load_trained", lambda _: before)
    assert "begin otherwise than the data" in run("train", recipe, "-o", out, "--resume")[1]
    monkeypatch.undo()

    bundle = tmp_path / "bundle"
    code, output = run("export", out, "-o", bundle, "--precision", "fp32")
    assert code == 0, output
    assert list(load_manifest(bundle).decoder.capacities) == ["0.5", "0.8"]
    assert load_manifest(bundle).decoder.stop_tokens == (1, 2)
    texts = [
        json.loads(run("generate", bundle, "--prompt", "w5 w9 w7", "--json", *more)[1])[0]["tokens"]
        for more in ((), ("--mode", "lossless"), ("--capacity", "0.5"))
    ]
    assert texts[0] == texts[1]
    assert "has the exits that it was trained with" in run("export", out, "-o", tmp_path / "b", "--layers", "2")[1]


def test_exits_learn_what_the_final_exit_says(recipe: Path, tmp_path: Path) -> None:
    losses = []
    for steps in (1, 60):
        changes = [
            "--set",
            f"model.early.learn.steps={steps}",
            "--set",
            "model.gated=false",
            "--set",
            "model.capacities=[]",
        ]
        code, output = run("train", recipe, "-o", tmp_path / str(steps), "--json", *changes)
        assert code == 0, output
        losses.append(json.loads(output)["epochs"][0]["validation"][0])
    assert losses[1] > losses[0]


@pytest.mark.parametrize(
    ("option", "value"), [("--batch-size", 4), ("--epochs", 3), ("--teacher", "x"), ("--set", "run.from_teacher=true")]
)
def test_what_its_phases_do_not_read_is_refused(recipe: Path, tmp_path: Path, option: str, value: object) -> None:
    code, output = run("train", recipe, "-o", tmp_path / "out", option, value)
    assert code != 0
    assert "means nothing here; its phases have values of their own, in model.routers" in output
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_lost(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, output = run("train", recipe, "-o", tmp_path)
    assert code != 0
    assert "something else is there" in output
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"format": "offramp-decoder"}')
    with pytest.raises(DataError, match="train it again"):
        load_trained(tmp_path / "half")
