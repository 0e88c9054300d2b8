"""Recipes: those that ship make sense, options override, and what is not known is told with the nearest name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from offramp.cli import main
from offramp.commands import hierarchical, training
from offramp.commands.recipes import DEMO, differences, load_recipe, recipe_from_dict, recipe_names, value_from_text
from offramp.commands.sources import CALIBRATION_TEXTS, source_from_argument
from offramp.commands.training import TrainRequest, requested_recipe
from offramp.errors import DataError, OptionError
from offramp.models.branchynet import BranchyNetConfig
from offramp.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from offramp.models.corpora import CORPORA
from offramp.models.datasets import TEXTS
from offramp.models.images import IMAGES
from offramp.models.kinds import KINDS
from offramp.models.options import options_from_dict
from offramp.models.plan import Plan, Stage
from tests.models.tiny_encoder import save_encoder_and_texts

FAMILIES = (
    "branchynet-",
    "cascade-",
    "confidence-routed-lm-",
    "early-exit-lm-",
    "eat-",
    "efficientnet-",
    "hierarchical-lm-",
    "patience-",
    "regression-",
)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_names_what_there_is(name: str) -> None:
    recipe = load_recipe(name, {})
    assert recipe.summary
    assert recipe.data.name in {*TEXTS, *IMAGES, *CORPORA}
    if recipe.model["kind"] == hierarchical.KIND:
        assert hierarchical.options_of(recipe).exits
        return
    kind = KINDS[recipe.model["kind"]]
    options = {key: value for key, value in recipe.model.items() if key not in ("kind", "weights")}
    config = options_from_dict(kind.config, options, name)
    for stage in recipe.stages:
        assert len(stage.loss.exit_weights(len(config.exits))) == len(config.exits)  # type: ignore[attr-defined]
        assert all(len(values) == stage.epochs + 1 for values in stage.anneal.values())
    assert recipe_from_dict(recipe.to_dict(), name) == recipe


def test_every_family_has_a_recipe_and_the_list_shows_it() -> None:
    code, output = run("train", "--list")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == list(recipe_names())
    assert all(any(name.startswith(family) for name in recipe_names()) for family in FAMILIES)


def test_the_demo_is_the_recipe_of_the_package() -> None:
    assert load_recipe(DEMO, {}).plan == Plan((Stage(epochs=2), Stage("labels_or_answers", 1)))


def test_the_command_line_changes_single_values(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[model]\nkind = "cascade"\n[[stage]]\nepochs = 3\n[[stage]]\nstrategy = "early_heads"\n')
    changes = {
        "stage.head_lr": 0.5,
        "stage.1.epochs": 7,
        "run.seed": 4,
        "model.exits": [1, 2],
        "stage.loss.rule": "equal",
    }
    recipe = load_recipe(str(mine), changes)
    assert [(stage.head_lr, stage.epochs, stage.loss.rule) for stage in recipe.stages] == [
        (0.5, 3, "equal"),
        (0.5, 7, "equal"),
    ]
    assert (recipe.run.seed, recipe.model["exits"]) == (4, (1, 2))
    assert differences(recipe, load_recipe(str(mine), {**changes, "run.seed": 5})) == ["run.seed = 4, not 5"]


def test_values_are_toml_or_text() -> None:
    assert value_from_text("run.seed=3") == ("run.seed", 3)
    assert value_from_text("model.exits=[1, 2]") == ("model.exits", [1, 2])
    assert value_from_text("data.path=rows/x=y") == ("data.path", "rows/x=y")
    with pytest.raises(OptionError, match="expected NAME=VALUE"):
        value_from_text("seed")


def test_other_data_has_other_unlabelled_texts() -> None:
    assert requested_recipe(TrainRequest("", {})).data.unlabelled == "imdb"
    assert requested_recipe(TrainRequest("", {"data.name": "mine.csv"})).data.unlabelled == ""
    given = requested_recipe(TrainRequest("", {"data.name": "mine.csv", "data.unlabelled": "more.csv"}))
    assert given.data.unlabelled == "more.csv"
    assert [stage.strategy for stage in requested_recipe(TrainRequest("", {"distil_epochs": 0})).stages] == ["joint"]
    assert requested_recipe(TrainRequest("", {"distil_epochs": 4})).stages[1].epochs == 4


@pytest.mark.parametrize(
    ("recipe", "changes", "problem"),
    [
        ("eat-imbd", {}, "did you mean 'eat-imdb'"),
        ("nowhere.toml", {}, "no such file"),
        (DEMO, {"run.sed": 1}, r"\[run\]: got 'sed', did you mean 'seed'"),
        (DEMO, {"stage.stategy": "joint"}, r"\[\[stage\]\] 0: got 'stategy', did you mean 'strategy'"),
        (DEMO, {"dta.name": "x"}, "got 'dta', did you mean 'data'"),
        (DEMO, {"stage.2.epochs": 1}, "expected 0 to 1"),
        (DEMO, {"run.seed": "one"}, "seed: got 'one', expected int"),
        (DEMO, {"run.seed": True}, "seed: got True, expected int"),
        (DEMO, {"stage.loss": 3}, "loss: got 3, expected a table"),
        (DEMO, {"stage.strategy": "jiont"}, "strategy: got 'jiont', expected one of"),
        (DEMO, {"run.frozen": "all"}, "frozen: got 'all', expected a list"),
    ],
)
def test_what_is_not_known_is_told(recipe: str, changes: dict[str, object], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        load_recipe(recipe, changes)


@pytest.mark.parametrize("changes", [{}, {"stage.epochs": 1, "data.limit": 1}])
@pytest.mark.parametrize("text", ["stage = 3", "stage = [3]", "[stage]\nepochs = 1", "data = 3", "run = 3"])
def test_what_is_no_table_is_told(text: str, changes: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(OptionError, match=r"expected (a|\[\[stage\]\]) table"):
        load_recipe(str(tmp_path / "mine.toml"), changes)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[data\n")
    with pytest.raises(OptionError, match="expected a TOML file"):
        load_recipe(str(tmp_path / "a.toml"), {})


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe of a tiny encoder on a small file."""
    encoder = save_encoder_and_texts(tmp_path)
    (tmp_path / "tiny.toml").write_text(
        f'[data]\nname = "{tmp_path}/texts.jsonl"\nmax_length = 16\n'
        f'[model]\nkind = "bert"\nexits = [1, 2]\nweights = "{encoder}"\n'
        '[[stage]]\nstrategy = "alternating"\nepochs = 2\n'
        '[[stage]]\nstrategy = "self_distillation"\nepochs = 1\n'
    )
    return tmp_path / "tiny.toml"


def test_train_kill_and_resume(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tiny.parent / "out"
    code, output = run("train", tiny, "-o", out, "--json")
    assert code == 0, output
    assert [epoch["steps"] for epoch in json.loads(output)["epochs"]] == [2, 2, 2]

    honest = training.train_model

    def interrupted(*arguments: object, **options: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr("offramp.models.train.train_epoch", lambda *_: (_ for _ in ()).throw(OptionError("stop")))
            return honest(*arguments, **options)  # type: ignore[arg-type]

    killed = tiny.parent / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_model", interrupted)
        assert run("train", tiny, "-o", killed)[0] == 2
    code, output = run("train", "-o", killed, "--resume", "--seed", "3")
    assert code == 2
    assert "run.seed = 3, not 0" in output
    assert run("train", tiny, "-o", killed, "--resume", "--json")[0] == 0
    assert (killed / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--set", "model.kind=brt"), "did you mean 'bert'"),
        (("--set", "model.exit=[1]"), "got 'exit', did you mean 'exits'"),
        (("--data", "imbd"), "did you mean 'imdb'"),
        (("--exits", "one"), "expected numbers of layers"),
        (("--exits", "2", "--set", "stage.strategy=early_heads"), "none of the recipe's stages"),
        (("--set", "model.kind=branchynet"), "a branchynet model does not read"),
        (("--set", "model.kind=cascade"), "a cascade model begins with no weights"),
        (("--teacher", "nowhere"), "no stage gives it a weight; set stage.loss.teacher_weight"),
        (("--set", "stage.loss.teacher_weight=0.5"), "got no teacher"),
        (("--teacher", "nowhere", "--set", "stage.loss.teacher_weight=0.5"), "loading the checkpoint nowhere"),
    ],
)
def test_mistakes_end_as_one_message(tiny: Path, options: tuple[str, ...], problem: str) -> None:
    code, output = run("train", tiny, "-o", tiny.parent / "out", *options)
    assert code == 2
    assert problem in output
    assert not (tiny.parent / "out").exists()


def test_an_export_calibrates_on_texts_of_one_class(tiny: Path) -> None:
    """Labels are not looked at: what is rare may not be among the rows that training leaves behind."""
    out = tiny.parent / "out"
    assert run("train", tiny, "-o", out)[0] == 0
    texts = [json.dumps({"text": f"good film {n}", "label": "good"}) for n in range(4)]
    (out / CALIBRATION_TEXTS).write_text("\n".join(texts))
    assert len(source_from_argument(str(out), (), 20, "", {}).calibration) == 1
    unlabelled = tiny.parent / "unlabelled.txt"
    unlabelled.write_text("good film\nbad film\n")
    assert len(source_from_argument(str(out), (), 20, str(unlabelled), {}).calibration) == 1


def test_images_to_calibrate_on_are_numbers_from_0_to_1(tmp_path: Path) -> None:
    """Bytes would be taken for pixels up to 255."""
    model = KINDS["branchynet"].fresh(Path(), BranchyNetConfig((4, 4), depth=1, num_classes=2, image_size=4), 0)
    save_checkpoint(tmp_path / "out", Checkpoint(model, None, ("a", "b"), kind="branchynet"))
    for dtype in ("float32", "uint8"):
        np.savez(tmp_path / f"{dtype}.npz", pixels=np.ones((3, 1, 4, 4), dtype))
    source = source_from_argument(str(tmp_path / "out"), (), 20, str(tmp_path / "float32.npz"), {})
    assert source.calibration[0]["pixels"].shape == (3, 1, 4, 4)
    with pytest.raises(DataError, match="pixels is uint8"):
        source_from_argument(str(tmp_path / "out"), (), 20, str(tmp_path / "uint8.npz"), {})


def test_a_teacher_must_read_and_know_the_same(tiny: Path) -> None:
    assert run("train", tiny, "-o", tiny.parent / "teacher")[0] == 0
    taught = ("--set", f"teacher={tiny.parent / 'teacher'}", "--set", "stage.loss.teacher_weight=0.5")
    assert (
        run("train", tiny, "-o", tiny.parent / "student", "--exits", "1", "--set", "stage.0.strategy=joint", *taught)[0]
        == 0
    )
    begun = ("--set", "run.from_teacher=true", "--set", "stage.encoder_lr=1e-9", "--set", "stage.head_lr=1e-9")
    assert run("train", tiny, "-o", tiny.parent / "same", *taught[:2], *begun)[0] == 0
    models = [load_checkpoint(tiny.parent / name).model.state_dict() for name in ("teacher", "same")]
    assert all(torch.allclose(value, models[1][name], atol=1e-5) for name, value in models[0].items())
    code, output = run("train", tiny, "-o", tiny.parent / "out", *begun)
    assert code == 2
    assert "got no teacher" in output
    other = tiny.parent / "other.jsonl"
    other.write_text((tiny.parent / "texts.jsonl").read_text().replace('"label": "good"', '"label": "fine"'))
    code, output = run("train", tiny, "-o", tiny.parent / "out", "--data", other, *taught)
    assert code == 2
    assert "knows other classes" in output
