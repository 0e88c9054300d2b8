"""Training: it learns, it resumes to the same weights, and it says what it did."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offramp.errors import DataError, OptionError
from offramp.models import train
from offramp.models.checkpoint import (
    Checkpoint,
    checkpoint_from_encoder,
    load_checkpoint,
    load_training_state,
    save_checkpoint,
)
from offramp.models.data import TextSplits
from offramp.models.encoder import EncoderConfig
from offramp.models.train import (
    TrainOptions,
    accuracy_per_exit,
    learning_rate_scale,
    optimizer_from_model,
    resume_training,
    train_classifier,
)

OPTIONS = TrainOptions(epochs=4, distil_epochs=2, batch_size=8, encoder_lr=3e-3, head_lr=1e-2, precision="float32")


@pytest.fixture
def with_unlabelled(splits: TextSplits) -> TextSplits:
    """The same texts, and those of the test split without their labels."""
    return replace(splits, unlabelled=tuple(example.text for example in splits.test))


def weights_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Copy the weights."""
    return {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}


def same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Compare bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def interrupt_in_epoch(monkeypatch: pytest.MonkeyPatch, interrupted: int) -> None:
    """Make training stop, like Ctrl-C, when epoch `interrupted` begins."""
    honest = train.train_epoch

    def train_epoch(run: train.Run, stage: train.Stage, epoch: int, bar: object) -> tuple[float, int]:
        if epoch == interrupted:
            raise KeyboardInterrupt
        return honest(run, stage, epoch, bar)

    monkeypatch.setattr(train, "train_epoch", train_epoch)


def test_it_learns_every_exit(checkpoint: Checkpoint, splits: TextSplits, tmp_path: Path) -> None:
    report = train_classifier(checkpoint, splits, OPTIONS, tmp_path / "run")
    assert report.validation_accuracy == (1.0, 1.0)
    assert (report.steps, len(report.epochs), report.precision) == (24, 4, "float32")
    assert report.epochs[0].loss > report.epochs[-1].loss
    assert report.seconds == sum(epoch.seconds for epoch in report.epochs) > 0
    assert not checkpoint.model.training
    assert same_weights(weights_of(load_checkpoint(tmp_path / "run")), weights_of(checkpoint))
    assert accuracy_per_exit(checkpoint, splits.test) == (1.0, 1.0)
    with pytest.raises(DataError, match="finished"):
        resume_training(tmp_path / "run", splits)


@pytest.mark.parametrize("interrupted", [1, 3, 4, 5])
def test_a_resumed_run_ends_with_the_same_weights(
    checkpoint: Checkpoint,
    with_unlabelled: TextSplits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: int,
) -> None:
    save_checkpoint(tmp_path / "fresh", checkpoint)
    whole = train_classifier(checkpoint, with_unlabelled, OPTIONS)
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_classifier(load_checkpoint(tmp_path / "fresh"), with_unlabelled, OPTIONS, tmp_path / "run")
    torch.rand(3)  # the state of the process is another one after a restart
    resumed = resume_training(tmp_path / "run", with_unlabelled)
    assert same_weights(weights_of(load_checkpoint(tmp_path / "run")), weights_of(checkpoint))
    assert [epoch.loss for epoch in resumed.epochs] == [epoch.loss for epoch in whole.epochs]
    assert resumed.validation_accuracy == whole.validation_accuracy


def test_the_last_stage_trains_the_early_heads_alone(
    checkpoint: Checkpoint, with_unlabelled: TextSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, torch.Tensor] = {}
    honest = train.train_epoch

    def train_epoch(run: train.Run, stage: train.Stage, epoch: int, bar: object) -> tuple[float, int]:
        if epoch == OPTIONS.epochs:
            before.update(weights_of(checkpoint))
        return honest(run, stage, epoch, bar)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    report = train_classifier(checkpoint, with_unlabelled, OPTIONS)
    assert [epoch.steps for epoch in report.epochs] == [6, 6, 6, 6, 8, 8]
    after = weights_of(checkpoint)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.startswith("heads.0.")}


def test_without_early_exits_there_is_no_last_stage(encoder_path: Path, with_unlabelled: TextSplits) -> None:
    static = checkpoint_from_encoder(encoder_path, EncoderConfig(exits=(2,)), with_unlabelled.label_names, 16)
    assert len(train_classifier(static, with_unlabelled, OPTIONS).epochs) == OPTIONS.epochs


def test_an_interrupted_run_refuses_other_data(
    checkpoint: Checkpoint, splits: TextSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_in_epoch(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(checkpoint, splits, OPTIONS, tmp_path / "run")
    fewer = TextSplits(splits.train[1:], splits.validation, splits.test, splits.label_names)
    with pytest.raises(DataError, match=r"\[47, 0\], before: \[48, 0\]"):
        resume_training(tmp_path / "run", fewer)
    state = load_training_state(tmp_path / "run")
    del state["optimizer"]
    save_checkpoint(tmp_path / "run", checkpoint, state)
    with pytest.raises(DataError, match="does not fit"):
        resume_training(tmp_path / "run", splits)


def test_training_leaves_the_random_state_alone(checkpoint: Checkpoint, splits: TextSplits) -> None:
    before = torch.random.get_rng_state()
    train_classifier(checkpoint, splits, TrainOptions(epochs=1, batch_size=32))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bfloat16_runs_everywhere(checkpoint: Checkpoint, splits: TextSplits) -> None:
    report = train_classifier(checkpoint, splits, TrainOptions(epochs=1, precision="bfloat16"))
    assert report.precision == "bfloat16"
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.model.state_dict().values())


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx2": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_precision(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert train.precision_of_cpu("auto") == expected
    assert train.precision_of_cpu("float32") == "float32"


def test_two_rates_and_no_decay_on_vectors(checkpoint: Checkpoint) -> None:
    optimizer = optimizer_from_model(checkpoint.model, OPTIONS)
    train.set_learning_rates(optimizer, OPTIONS, step=0, num_steps=1)
    names = {id(parameter): name for name, parameter in checkpoint.model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            is_vector = name.endswith(".bias") or "LayerNorm" in name
            assert group["weight_decay"] == (0.0 if is_vector else train.WEIGHT_DECAY)
            assert group["part"] == ("head" if name.startswith("heads.") else "encoder")
    assert set(names.values()) - seen == {"embeddings.word_embeddings.weight"}


def test_learning_rate_goes_up_and_down_in_lines() -> None:
    scales = [learning_rate_scale(step, 10, 0.2) for step in range(10)]
    assert scales == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert learning_rate_scale(0, 5, 0.0) == 1.0
    assert 0 < learning_rate_scale(4, 5, 1.0) <= 1.0


def test_the_bar_goes_to_stderr(checkpoint: Checkpoint, splits: TextSplits, capsys: pytest.CaptureFixture[str]) -> None:
    options = TrainOptions(epochs=1, batch_size=32)
    train_classifier(checkpoint, splits, options)
    assert capsys.readouterr() == ("", "")
    train_classifier(checkpoint, splits, options, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "epoch 1/1" in captured.err
    assert "loss" in captured.err


def test_divergence_is_told(checkpoint: Checkpoint, splits: TextSplits) -> None:
    with pytest.raises(OptionError, match="lower encoder_lr"):
        train_classifier(checkpoint, splits, TrainOptions(encoder_lr=1e30, head_lr=1e30, warmup_ratio=0.0))


def test_texts_that_do_not_fit_are_refused(checkpoint: Checkpoint, splits: TextSplits) -> None:
    other = TextSplits(splits.train, splits.validation, splits.test, ("no", "yes"))
    with pytest.raises(DataError, match="the model has"):
        train_classifier(checkpoint, other, OPTIONS)
    with pytest.raises(DataError, match="got 0 texts to train on"):
        train_classifier(checkpoint, TextSplits((), splits.validation, (), splits.label_names), OPTIONS)
    with pytest.raises(OptionError, match="no texts"):
        accuracy_per_exit(checkpoint, ())


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"distil_epochs": -1},
        {"batch_size": 0},
        {"encoder_lr": -1.0},
        {"head_lr": float("nan")},
        {"early_weight": float("inf")},
        {"warmup_ratio": 1.5},
        {"seed": -1},
        {"precision": "float8"},
    ],
)
def test_options_refuse(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(wrong))}: got .*expected"):
        TrainOptions(**wrong)
