"""A run that is killed and resumed ends with the weights of one that was not, bit for bit; damage is told."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.errors import DataError
from offramp.models import train
from offramp.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from offramp.models.kinds import KINDS
from offramp.models.plan import Plan, RunOptions, Stage
from offramp.models.randomness import random_state, seed_all, set_random_state
from offramp.models.regression import RegressionConfig
from offramp.models.rows import Rows, TextRows, TrainingRows
from offramp.models.snapshot import load_snapshot
from offramp.models.strategies import LossOptions
from offramp.models.train import Output, resume_training, train_model

KILLED_RUN = Path(__file__).parent / "killed_run.py"
STAGES = (Stage("berxit", epochs=2, encoder_lr=3e-3), Stage("labels_or_answers", epochs=1, head_lr=1e-2))
PLAN = Plan(STAGES, RunOptions(batch_size=8, precision="float32", snapshot_steps=1))
NUM_STEPS = 6 + 6 + 8  # 48 texts, and 16 more without labels in the last epoch


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_9_at_any_moment_changes_no_bit(tmp_path: Path, seed: int) -> None:
    command = [sys.executable, str(KILLED_RUN), str(tmp_path), str(seed)]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=120)
    found = json.loads(done.stdout)
    assert found["killed"] == found["peaceful"]
    assert found["unfinished"] > 0, "some kill came before the end"


@pytest.mark.parametrize("interrupted", [0, 1, 5, 6, 11, 12, 13, 19])  # beginnings and ends of epochs and stages
def test_the_last_step_may_be_any(
    checkpoint: Checkpoint,
    rows_and_unlabelled: TrainingRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: int,
) -> None:
    save_checkpoint(tmp_path / "fresh", checkpoint)
    whole = train_model(checkpoint, rows_and_unlabelled, PLAN)
    assert whole.steps == NUM_STEPS
    honest, taken = train.take_step, []

    def take_step(*arguments: object) -> float:
        if len(taken) == interrupted:
            raise KeyboardInterrupt
        taken.append(1)
        return honest(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", take_step)
        with pytest.raises(KeyboardInterrupt):
            train_model(load_checkpoint(tmp_path / "fresh"), rows_and_unlabelled, PLAN, Output(tmp_path / "run"))
    position = load_snapshot(tmp_path / "run").position
    assert sum(epoch.steps for epoch in position.epochs) + position.step == interrupted
    torch.rand(3)  # the state of the process is another one after a restart
    resumed = resume_training(tmp_path / "run", rows_and_unlabelled)
    expected = checkpoint.model.state_dict()
    for name, tensor in load_checkpoint(tmp_path / "run").model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert [epoch.loss for epoch in resumed.epochs] == [epoch.loss for epoch in whole.epochs]
    assert resumed.validation == whole.validation
    assert not (tmp_path / "run" / "training.pt").exists()
    with pytest.raises(DataError, match="finished"):
        resume_training(tmp_path / "run", rows_and_unlabelled)


def test_a_regression_resumes_to_the_same_bits(
    encoder_path: Path, rows: TrainingRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heads are products with one column, which round by where in memory the weights lie."""

    def values_of(texts: Rows) -> TextRows:
        assert isinstance(texts, TextRows)
        return TextRows(texts.ids, texts.targets.astype(np.float32))

    rows = TrainingRows(values_of(rows.train), values_of(rows.validation))
    plan = replace(PLAN, stages=(replace(STAGES[0], loss=LossOptions(confidence_weight=0.3)),))
    fresh = [KINDS["regression"].fresh(encoder_path, RegressionConfig((1, 3)), 0) for _ in range(2)]
    whole, killed = (Checkpoint(model, encoder_path / "tokenizer.json", (), 16, "regression") for model in fresh)
    train_model(whole, rows, plan)
    honest, taken = train.take_step, []

    def take_step(*arguments: object) -> float:
        taken.append(1)
        if len(taken) == 5:
            raise KeyboardInterrupt
        return honest(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "take_step", take_step)
    with pytest.raises(KeyboardInterrupt):
        train_model(killed, rows, plan, Output(tmp_path / "run"))
    resume_training(tmp_path / "run", rows)
    for name, tensor in load_checkpoint(tmp_path / "run").model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def test_how_often_it_is_written_changes_nothing(
    checkpoint: Checkpoint, rows_and_unlabelled: TrainingRows, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "fresh", checkpoint)
    train_model(checkpoint, rows_and_unlabelled, PLAN, Output(tmp_path / "often"))
    seldom = replace(PLAN, run=replace(PLAN.run, snapshot_steps=0))
    train_model(load_checkpoint(tmp_path / "fresh"), rows_and_unlabelled, seldom, Output(tmp_path / "seldom"))
    assert (tmp_path / "often/model.safetensors").read_bytes() == (tmp_path / "seldom/model.safetensors").read_bytes()


@pytest.fixture
def interrupted_run(
    checkpoint: Checkpoint, rows: TrainingRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return the checkpoint directory of a run that stopped before its first step."""

    def take_step(*_: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", take_step)
        with pytest.raises(KeyboardInterrupt):
            train_model(checkpoint, rows, PLAN, Output(tmp_path / "run", {"recipe": {"name": "mine"}}))
    return tmp_path / "run"


def test_a_snapshot_holds_plan_and_extra(interrupted_run: Path) -> None:
    snapshot = load_snapshot(interrupted_run)
    assert snapshot.plan == PLAN
    assert snapshot.extra == {"recipe": {"name": "mine"}}
    assert (snapshot.position.epoch, snapshot.position.step, snapshot.sizes) == (0, 0, [48, 0])


def test_other_data_is_refused(interrupted_run: Path, rows: TrainingRows, rows_and_unlabelled: TrainingRows) -> None:
    with pytest.raises(DataError, match=r"\[48, 16\], before: \[48, 0\]"):
        resume_training(interrupted_run, rows_and_unlabelled)
    with pytest.raises(DataError, match=r"\[16, 0\], before: \[48, 0\]"):
        resume_training(interrupted_run, replace(rows, train=rows.validation))


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04"])
def test_damage_is_told(interrupted_run: Path, content: bytes) -> None:
    (interrupted_run / "training.pt").write_bytes(content)
    with pytest.raises(DataError, match="train again"):
        load_snapshot(interrupted_run)


def test_a_state_of_another_model_is_told(interrupted_run: Path, rows: TrainingRows) -> None:
    state = torch.load(interrupted_run / "training.pt", weights_only=True)
    del state["optimizer"]["param_groups"][0]
    torch.save(state, interrupted_run / "training.pt")
    with pytest.raises(DataError, match="does not fit"):
        resume_training(interrupted_run, rows)
    torch.save({**state, "version": 1}, interrupted_run / "training.pt")
    with pytest.raises(DataError, match="format version 1"):
        load_snapshot(interrupted_run)


def test_no_state(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "done", checkpoint)
    with pytest.raises(DataError, match="finished or was never begun"):
        load_snapshot(tmp_path / "done")


def test_the_state_of_all_generators_comes_back() -> None:
    seed_all(3)
    state = random_state()
    drawn = [(torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) for _ in range(2)]  # noqa: NPY002
    set_random_state(state)
    again = [(torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) for _ in range(2)]  # noqa: NPY002
    assert drawn == again
    assert drawn[0] != drawn[1]
