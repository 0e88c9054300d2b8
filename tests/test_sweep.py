"""Sweeps: the runs of a file; each is done once, goes on after a kill, and is never mixed up with others."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from offramp.cli import main
from offramp.commands import sweep_bench, sweep_run
from offramp.commands.recipes import load_recipe
from offramp.commands.sweep import SweepRequest, over_seeds, run_sweep
from offramp.commands.sweep_bench import on_test_rows
from offramp.commands.sweep_run import Place, held
from offramp.commands.sweeps import Variant, grid_from_text, load_sweep, runs_of, sweep_names
from offramp.errors import OptionError
from offramp.models import train
from offramp.models.kinds import KINDS
from offramp.models.options import options_from_dict
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.trace import Trace
from tests.models.tiny_encoder import save_encoder_and_texts

TRAIN = ("train",)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["sweep", *(str(argument) for argument in arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A sweep of a tiny encoder on a small file: dense, and with an exit and the dense one for a teacher."""
    encoder = save_encoder_and_texts(tmp_path)
    (tmp_path / "recipe.toml").write_text(
        f'[data]\nname = "{tmp_path}/texts.jsonl"\nmax_length = 16\n'
        f'[model]\nkind = "bert"\nexits = [1, 2]\nwindow = 2\nweights = "{encoder}"\n'
        "[[stage]]\nepochs = 1\nanneal = { pruning_ratio = [0.0, 0.3] }\n"
    )
    (tmp_path / "tiny.toml").write_text(
        'summary = "tiny"\nrecipe = "recipe.toml"\nseeds = 2\n'
        '[variant.eat]\nteacher = "dense"\nset = { "stage.loss.teacher_weight" = 0.5 }\n'
        '[variant.dense]\nwithout = ["model.window", "stage.anneal"]\n'
        'set = { "model.exits" = [2], "stage.strategy" = "final" }\n'
    )
    return tmp_path / "tiny.toml"


@pytest.mark.parametrize("name", sweep_names())
def test_each_sweep_of_the_package_makes_sense(name: str) -> None:
    sweep = load_sweep(name)
    assert sweep.summary
    for each in runs_of(sweep):
        model = {key: value for key, value in each.recipe.model.items() if key not in ("kind", "weights")}
        config = options_from_dict(KINDS[each.recipe.model["kind"]].config, model, name)
        assert each.recipe.run.seed == each.seed
        if each.variant in ("dense", "static"):
            assert config.exits == ((6,) if each.variant == "dense" else (3,))  # type: ignore[attr-defined]
            assert (config.pruning, config.window) == (None, 0)  # type: ignore[attr-defined]
            assert not any(stage.anneal for stage in each.recipe.stages)


def test_the_list_shows_the_sweeps() -> None:
    code, output, _ = run("--list")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == list(sweep_names())


def test_variants_grid_and_seeds_make_the_runs_teachers_first(tiny: Path) -> None:
    sweep = load_sweep(str(tiny))
    assert [each.name for each in runs_of(sweep)] == ["dense/seed-0", "dense/seed-1", "eat/seed-0", "eat/seed-1"]
    eat = runs_of(sweep)[2]
    assert (eat.teacher, eat.recipe.model["window"], eat.recipe.stages[0].loss.teacher_weight) == (
        "dense/seed-0",
        2,
        0.5,
    )
    dense = runs_of(sweep)[0].recipe
    assert ("window" in dense.model, dense.model["exits"], dense.stages[0].anneal) == (False, (2,), {})
    grid = dict([grid_from_text("stage.encoder_lr=1e-5,2e-5"), grid_from_text("run.batch_size=8")])
    names = [each.name for each in runs_of(replace(sweep, grid=grid, seeds=(3,)))]
    point = "run.batch_size=8"
    assert names == [
        f"{variant}/stage.encoder_lr={rate},{point}/seed-3"
        for rate in ("1e-05", "2e-05")
        for variant in ("dense", "eat")
    ]
    assert runs_of(replace(sweep, grid=grid))[-1].recipe.stages[0].encoder_lr == 2e-5


def test_a_recipe_is_a_sweep_of_one_variant() -> None:
    sweep = load_sweep("cascade-rotten-tomatoes")
    assert sweep.variants == {"cascade-rotten-tomatoes": Variant()}
    recipe = load_recipe("cascade-rotten-tomatoes", {"run.seed": 1})
    assert runs_of(sweep)[1].recipe == recipe


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("model.exits=[2, 4],[6]", ([2, 4], [6])),
        ("stage.strategy=joint,berxit", ("joint", "berxit")),
        ("stage.epochs=2", (2,)),
    ],
)
def test_values_of_a_grid_are_toml_or_texts(text: str, values: tuple[object, ...]) -> None:
    assert grid_from_text(text) == (text.partition("=")[0], values)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[variant.a]\nteacher = 'b'\n[variant.b]\nteacher = 'a'", "each other's teachers"),
        ("[variant.a]\nteacher = 'c'", "variant a: got teacher 'c'"),
        ("[variant.a]\nsett = {}", "did you mean 'set'"),
        ("[variant.a]\nwithout = ['model.windw']", "without model.windw: the recipe has no 'windw'"),
        ("[variant.a]\nset = { 'model.exits' = 1, 'rn.seed' = 2 }", "got 'rn', did you mean 'run'"),
        ("[variant.'a b']", "expected a name of letters"),
        ("seeds = 0", "expected how many"),
        ("seeds = [1, 1]", "expected different numbers"),
        ("[grid]\n'run.seed' = 3", "expected lists of values"),
        ("[grid]\n'run.batch_size' = [3, 3]", "is there twice"),
        ("variants = 3", "did you mean 'variant'"),
    ],
)
def test_what_makes_no_sense_is_told(tiny: Path, text: str, problem: str) -> None:
    mine = tiny.parent / "mine.toml"
    mine.write_text(f'recipe = "recipe.toml"\n{text}\n')
    code, _, errors = run(mine, "-o", tiny.parent / "out")
    assert code == 2
    assert problem in errors
    assert not (tiny.parent / "out").exists()


def test_what_is_done_is_not_done_again_and_a_table_is_left(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tiny.parent / "out"
    code, output, errors = run(tiny, "-o", out, "--steps", "train", "--json")
    assert code == 0, errors
    found = json.loads(output)
    assert [row["run"] for row in found["runs"]] == ["dense/seed-0", "dense/seed-1", "eat/seed-0", "eat/seed-1"]
    with (out / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        record = json.loads((out / row["run"] / "train.json").read_text())
        assert float(row["validation_2"]) == record["result"]["validation"][-1]
    monkeypatch.setattr(sweep_run, "train_recipe", None)  # calling it would raise
    code, again, errors = run(tiny, "-o", out, "--steps", "train", "--json")
    assert (code, json.loads(again)) == (0, found)
    assert errors.count("done before") == 4


def test_means_and_deviations_are_over_the_runs_that_have_the_figure() -> None:
    found = over_seeds([{"a": 1.0, "b": 5.0}, {"a": 2.0, "run": "x"}, {"a": 6.0}])
    assert found["a"] == {"mean": 3.0, "sd": pytest.approx(7**0.5), "runs": 3}  # (4 + 1 + 9) / 2
    assert found["b"] == {"mean": 5.0, "sd": 0.0, "runs": 1}
    assert "run" not in found


def _killed(tiny: Path, out: Path) -> None:
    """In a process of its own: dies in the middle of the first run's training."""

    def dies(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    train.set_annealed = dies  # type: ignore[assignment]
    run_sweep(out, SweepRequest(str(tiny), seeds=1, steps=TRAIN))


def test_kill_and_resume(tiny: Path) -> None:
    out, peaceful = tiny.parent / "out", tiny.parent / "peaceful"
    child = multiprocessing.get_context("spawn").Process(target=_killed, args=(tiny, out))
    child.start()
    child.join()
    assert child.exitcode == -9
    assert (out / "dense/seed-0/checkpoint/training.pt").is_file()
    said: list[str] = []
    run_sweep(out, SweepRequest(str(tiny), seeds=1, steps=TRAIN), said.append)
    assert "dense/seed-0: going on where it stopped" in said
    run_sweep(peaceful, SweepRequest(str(tiny), seeds=1, steps=TRAIN))
    for name in ("dense", "eat"):
        weights = [(folder / name / "seed-0/checkpoint/model.safetensors").read_bytes() for folder in (out, peaceful)]
        assert weights[0] == weights[1]


def test_killed_before_its_record_was_written(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tiny.parent / "out"
    request = SweepRequest(str(tiny), seeds=1, only=["dense/*"], steps=TRAIN)
    found = run_sweep(out, request)["runs"][0]["validation_2"]
    record = out / "dense/seed-0/train.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "result": None}))
    monkeypatch.setattr(sweep_run, "train_recipe", None)
    assert run_sweep(out, request)["runs"][0]["validation_2"] == found


def test_other_values_are_refused_before_anything_is_trained_and_trained_again_when_asked(tiny: Path) -> None:
    out = tiny.parent / "out"
    only = SweepRequest(str(tiny), seeds=1, steps=TRAIN)
    run_sweep(out, only)
    before = (out / "eat/seed-0/checkpoint/model.safetensors").read_bytes()
    tiny.write_text(tiny.read_text().replace("= 0.5", "= 0.9"))
    with pytest.raises(OptionError, match=r"eat/seed-0: .*teacher_weight = 0.5, not 0.9; .*--retrain"):
        run_sweep(out, SweepRequest(str(tiny), seeds=2, steps=TRAIN))
    assert not (out / "dense/seed-1").exists()
    assert (out / "eat/seed-0/checkpoint/model.safetensors").read_bytes() == before
    said: list[str] = []
    run_sweep(out, SweepRequest(str(tiny), seeds=1, steps=TRAIN, retrain=True), said.append)
    assert "train 1/2, dense/seed-0: done before" in said
    assert "train 2/2, eat/seed-0: made" in said
    assert (out / "eat/seed-0/checkpoint/model.safetensors").read_bytes() != before


def test_another_teacher_or_file_is_another_training(tiny: Path) -> None:
    out = tiny.parent / "out"
    run_sweep(out, SweepRequest(str(tiny), seeds=1, steps=TRAIN))
    only_eat = SweepRequest(str(tiny), seeds=1, only=["eat/*"], steps=TRAIN)
    weights = out / "dense/seed-0/checkpoint/model.safetensors"
    honest = weights.read_bytes()
    weights.write_bytes(honest[:-1] + bytes([honest[-1] ^ 1]))
    with pytest.raises(OptionError, match="with another teacher"):
        run_sweep(out, only_eat)
    weights.write_bytes(honest)
    with (tiny.parent / "texts.jsonl").open("a") as stream:
        stream.write('\n{"text": "a good one more", "label": "good"}')
    with pytest.raises(OptionError, match="with another file of data"):
        run_sweep(out, only_eat)


def test_export_trace_calibrate_and_bench_follow_the_weights(tiny: Path) -> None:
    out = tiny.parent / "out"
    request = SweepRequest(str(tiny), seeds=1)
    tiny.write_text(tiny.read_text() + "[measure.calibrate]\nmax_risk = 0.5\n[measure.bench]\nnum_rows = 8\n")
    said: list[str] = []
    rows = {row["variant"]: row for row in run_sweep(out, request, said.append)["runs"]}
    assert sum(line.endswith("made") for line in said) == 2 + 2 + 2 + 2 + 1
    test = [json.loads(line) for line in (out / "eat/seed-0/test.jsonl").read_text().splitlines()]
    with Runner.open(out / "eat/seed-0/bundle") as runner:
        result = runner.run(runner.encode([row["text"] for row in test]))
        right = result.prediction == [runner.manifest.labels.index(row["label"]) for row in test]
    assert rows["eat"]["accuracy"] == right.mean()
    assert rows["eat"]["mean_depth"] == result.exit_index.mean() + 1
    assert rows["dense"]["mean_depth"] == 1
    assert rows["eat"]["p50_ms_1"] > 0 < rows["dense"]["rows_per_s_32"]

    again: list[str] = []
    run_sweep(out, request, again.append)
    assert all(line.endswith("done before") for line in again)
    tiny.write_text(tiny.read_text().replace("max_risk = 0.5", "max_risk = 0.4"))
    changed: list[str] = []
    run_sweep(out, request, changed.append)
    assert [line for line in changed if line.endswith("made")] == [
        "calibrate 1/2, dense/seed-0: made",
        "calibrate 2/2, eat/seed-0: made",
        *(["bench 1/1, seed 0: made"] if "bench 1/1, seed 0: made" in changed else []),
    ]

    weights = out / "eat/seed-0/checkpoint/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    after: list[str] = []
    run_sweep(out, SweepRequest(str(tiny), seeds=1, steps=["trace", "calibrate", "bench"]), after.append)
    assert "trace 2/2, eat/seed-0: waits" in after
    assert "bench 1/1, seed 0: waits" in after


def test_a_regression_is_judged_by_the_error_of_the_exits_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(
        logits=np.array([[[1.0], [3.0]], [[2.0], [5.0]], [[0.0], [0.0]]], np.float32),
        scores=np.zeros((3, 2, 3), np.float32),
        predictions=np.zeros((3, 2), np.int64),
        temperatures=np.ones(2),
        labels=np.full(3, -1),
        costs_ms=np.ones(2),
        fingerprint="f" * 64,
        backend="fake",
        precision="fp32",
        learned=np.array([[0.9, np.nan], [0.1, np.nan], [0.9, np.nan]], np.float32),
        targets=np.array([1.5, 4.0, np.nan], np.float32),
    )
    monkeypatch.setattr(sweep_bench, "load_trace", lambda path: trace)
    monkeypatch.setattr(sweep_bench, "policy_of", lambda place: Policy.thresholds("learned", [0.5]))
    place = Place(tmp_path, runs_of(load_sweep("regression-ratings"))[0])
    # the first row leaves with 1.0 for 1.5, the second goes on to 5.0 for 4.0, the third has no target
    assert on_test_rows(place) == {"mean_depth": pytest.approx(4 / 3), "segments": 2, "error": 0.75}


def test_who_has_no_teacher_yet_waits_and_what_others_train_is_left_to_them(tiny: Path) -> None:
    out = tiny.parent / "out"
    said: list[str] = []
    found = run_sweep(out, SweepRequest(str(tiny), seeds=1, only=["eat/*"], steps=TRAIN), said.append)
    assert said == ["train 1/1, eat/seed-0: waits for its teacher"]
    assert found["groups"] == {"dense": {}, "eat": {}}
    with held(out / "dense/seed-0") as is_ours:
        assert is_ours
        run_sweep(out, SweepRequest(str(tiny), seeds=1, only=["dense/*"], steps=TRAIN), said.append)
    assert said[-1] == "train 1/1, dense/seed-0: elsewhere"
