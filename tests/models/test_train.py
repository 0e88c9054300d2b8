"""Training: it learns, whatever the strategy, and it says what it did."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.errors import DataError, OptionError
from offramp.models import train
from offramp.models.checkpoint import Checkpoint, checkpoint_from_encoder, load_checkpoint
from offramp.models.encoder import EncoderConfig
from offramp.models.evaluate import quality_per_exit
from offramp.models.plan import WEIGHT_DECAY, Plan, RunOptions, Stage
from offramp.models.rows import TextRows, TrainingRows
from offramp.models.strategies import STRATEGIES, LossOptions
from offramp.models.train import Output, optimizer_from_model, train_model

RUN = RunOptions(batch_size=8, precision="float32")
JOINT = Stage("joint", 4, encoder_lr=3e-3, head_lr=1e-2)
PLAN = Plan((JOINT,), RUN)
EXITS = ("heads.0.", "heads.1.")


def weights_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Copy the weights."""
    return {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Name the parts that are others now: heads.0., heads.1., layers., embeddings."""
    names = {name for name in after if not torch.equal(before[name], after[name])}
    return {next((part for part in EXITS if name.startswith(part)), name.split(".")[0] + ".") for name in names}


def test_it_learns_every_exit(checkpoint: Checkpoint, rows: TrainingRows, tmp_path: Path) -> None:
    report = train_model(checkpoint, rows, PLAN, Output(tmp_path / "run"))
    assert report.validation == (1.0, 1.0)
    assert (report.steps, len(report.epochs), report.precision) == (24, 4, "float32")
    assert report.epochs[0].loss > report.epochs[-1].loss
    assert report.seconds == sum(epoch.seconds for epoch in report.epochs) > 0
    assert not checkpoint.model.training
    for name, tensor in load_checkpoint(tmp_path / "run").model.state_dict().items():
        assert torch.equal(tensor, checkpoint.model.state_dict()[name])
    assert quality_per_exit(checkpoint.model, rows.train) == (1.0, 1.0)


# those that ponder want gates: tests/models/test_language_model.py
@pytest.mark.parametrize("strategy", [name for name, found in STRATEGIES.items() if not found.ponders])
def test_every_strategy_teaches_whom_it_should(
    checkpoint: Checkpoint, rows_and_unlabelled: TrainingRows, strategy: str
) -> None:
    """After joint training, so that there is a final exit to learn from."""
    everything = {"heads.0.", "heads.1.", "layers.", "embeddings."}
    early, late = {"heads.0."}, everything - {"heads.0."}
    expected = {"final": late, "early_heads": early, "self_distillation": early, "labels_or_answers": early}
    train_model(checkpoint, rows_and_unlabelled, PLAN)
    before = weights_of(checkpoint)
    report = train_model(checkpoint, rows_and_unlabelled, Plan((replace(JOINT, strategy=strategy, epochs=1),), RUN))
    assert changed(before, weights_of(checkpoint)) == expected.get(strategy, everything)
    assert torch.equal(
        before["embeddings.word_embeddings.weight"], checkpoint.model.state_dict()["embeddings.word_embeddings.weight"]
    ), "frozen"
    assert report.validation[1] == 1.0
    assert report.steps == (8 if STRATEGIES[strategy].takes_unlabelled else 6)


def test_alternating_takes_turns(checkpoint: Checkpoint, rows: TrainingRows, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, seen = train.take_step, []

    def take_step(*arguments: object) -> float:
        before = weights_of(checkpoint)
        loss = honest(*arguments)  # type: ignore[arg-type]
        seen.append(changed(before, weights_of(checkpoint)))
        return loss

    monkeypatch.setattr(train, "take_step", take_step)
    train_model(
        checkpoint, rows, Plan((replace(JOINT, strategy="alternating", epochs=1),), replace(RUN, batch_size=16))
    )
    assert seen == [{"heads.0."}, {"heads.1.", "layers.", "embeddings."}, {"heads.0."}]


def test_two_stages_are_a_frozen_backbone_and_then_its_heads(checkpoint: Checkpoint, rows: TrainingRows) -> None:
    plan = Plan((replace(JOINT, strategy="final"), replace(JOINT, strategy="early_heads", epochs=12)), RUN)
    assert min(train_model(checkpoint, rows, plan).validation) > 0.9


def test_the_demo_is_joint_and_then_labels_or_answers(
    checkpoint: Checkpoint, rows_and_unlabelled: TrainingRows
) -> None:
    plan = Plan((Stage(epochs=1), Stage("labels_or_answers", 2)), RunOptions(batch_size=8))
    assert [epoch.steps for epoch in train_model(checkpoint, rows_and_unlabelled, plan).epochs] == [6, 8, 8]


def test_a_teacher_is_learned_from(checkpoint: Checkpoint, rows: TrainingRows, encoder_path: Path) -> None:
    teacher = checkpoint_from_encoder(encoder_path, EncoderConfig(exits=(2,)), checkpoint.label_names, 16, seed=3)
    train_model(teacher, rows, PLAN)
    assert isinstance(rows.train, TextRows)
    wrong = replace(rows, train=TextRows(rows.train.ids, 1 - rows.train.targets))
    taught = replace(JOINT, strategy="final", epochs=6, loss=LossOptions(weights=(0.0, 0.0), teacher_weight=1.0))
    train_model(checkpoint, wrong, Plan((taught,), RUN), teacher=teacher.model)
    assert quality_per_exit(checkpoint.model, rows.validation)[1] > 0.75, "labels had no weight, the teacher is right"
    with pytest.raises(OptionError, match="no teacher"):
        train_model(checkpoint, rows, Plan((taught,), RUN))


def test_the_schedule_is_followed(checkpoint: Checkpoint, rows: TrainingRows, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    checkpoint.model.ratio = 0.0  # type: ignore[assignment]
    checkpoint.model.register_forward_pre_hook(lambda model, _: seen.append(model.ratio))
    stage = replace(JOINT, epochs=2, anneal={"ratio": (0.0, 0.0, 0.3)})
    train_model(checkpoint, rows, Plan((stage,), replace(RUN, batch_size=24)))
    assert seen == pytest.approx([0.0, 0.0, 0.0, 0.0, 0.15, 0.3])  # two steps, one of validation, twice
    with pytest.raises(OptionError, match="'rate', which EarlyExitEncoder has not"):
        train_model(checkpoint, rows, Plan((replace(stage, anneal={"rate": (0.0,)}),), RUN))


def test_layers_can_be_dropped(checkpoint: Checkpoint, rows: TrainingRows) -> None:
    report = train_model(checkpoint, rows, Plan((replace(JOINT, epochs=6, layer_dropout=0.3),), RUN))
    assert report.validation == (1.0, 1.0)
    hooks = [layer._forward_hooks for layer in checkpoint.model.layers]  # type: ignore[union-attr]
    assert not any(hooks)


def test_training_leaves_the_random_state_alone(checkpoint: Checkpoint, rows: TrainingRows) -> None:
    before = torch.random.get_rng_state()
    train_model(checkpoint, rows, Plan((Stage(epochs=1),)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bfloat16_runs_everywhere(checkpoint: Checkpoint, rows: TrainingRows) -> None:
    report = train_model(checkpoint, rows, Plan((Stage(epochs=1),), RunOptions(precision="bfloat16")))
    assert report.precision == "bfloat16"
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.model.state_dict().values())


def test_two_rates_and_no_decay_on_vectors(checkpoint: Checkpoint) -> None:
    optimizer = optimizer_from_model(checkpoint.model, PLAN)
    train.set_learning_rates(optimizer, JOINT, step=0, num_steps=1)
    names = {id(parameter): name for name, parameter in checkpoint.model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            is_vector = name.endswith(".bias") or "LayerNorm" in name
            assert group["weight_decay"] == (0.0 if is_vector else WEIGHT_DECAY)
            assert group["part"] == ("head" if name.startswith("heads.") else "encoder")
            assert group["lr"] == 0.5 * (1e-2 if name.startswith("heads.") else 3e-3), "warming up"
    assert set(names.values()) - seen == {"embeddings.word_embeddings.weight"}
    thawed = optimizer_from_model(checkpoint.model, replace(PLAN, run=replace(RUN, frozen=())))
    assert sum(len(group["params"]) for group in thawed.param_groups) == len(names)


def test_the_bar_goes_to_stderr(checkpoint: Checkpoint, rows: TrainingRows, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan((Stage(epochs=1),))
    train_model(checkpoint, rows, plan)
    assert capsys.readouterr() == ("", "")
    train_model(checkpoint, rows, plan, Output(progress=True))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "epoch 1/1" in captured.err
    assert "loss" in captured.err


def test_divergence_is_told(checkpoint: Checkpoint, rows: TrainingRows) -> None:
    with pytest.raises(OptionError, match="lower encoder_lr"):
        train_model(checkpoint, rows, Plan((Stage(encoder_lr=1e30, head_lr=1e30, warmup_ratio=0.0),)))


def test_rows_that_do_not_fit_are_refused(checkpoint: Checkpoint, rows: TrainingRows) -> None:
    assert isinstance(rows.train, TextRows)
    ids = rows.train.ids
    with pytest.raises(DataError, match="got targets of int64 up to 2, the model answers with 2 numbers"):
        train_model(checkpoint, replace(rows, train=TextRows(ids, np.full(48, 2))), PLAN)
    with pytest.raises(DataError, match="got targets of float32"):
        train_model(checkpoint, replace(rows, train=TextRows(ids, np.zeros(48, np.float32))), PLAN)
    with pytest.raises(DataError, match="got 0 rows to train on"):
        train_model(checkpoint, replace(rows, train=TextRows([], np.zeros(0, np.int64))), PLAN)
    with pytest.raises(OptionError, match="no rows"):
        quality_per_exit(checkpoint.model, TextRows([], np.zeros(0, np.int64)))
