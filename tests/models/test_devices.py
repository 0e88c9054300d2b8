"""Where training computes: names of devices, and a run on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from offramp.errors import OptionError
from offramp.models import train
from offramp.models.checkpoint import Checkpoint, load_checkpoint
from offramp.models.devices import CPU, device_from_name, device_of, placed, precision_on
from offramp.models.plan import Plan, RunOptions, Stage
from offramp.models.rows import TrainingRows
from offramp.models.train import Output, resume_training, train_model


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_from_name("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_from_name("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_from_name("auto") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_from_name("cuda:1") == torch.device("cuda", 1)
    assert device_from_name("cuda").type == "cuda"


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", ""])
def test_a_device_that_is_none(name: str) -> None:
    with pytest.raises(OptionError, match=r"device: got .*expected auto, cpu, cuda or cuda:NUMBER"):
        device_from_name(name)


def test_a_gpu_that_is_not_here(
    checkpoint: Checkpoint, rows: TrainingRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    plan = Plan((Stage(),), RunOptions(device="cuda:1"))
    with pytest.raises(OptionError, match=r"'cuda:1', and PyTorch .* sees 1 GPUs here; train on the cpu"):
        train_model(checkpoint, rows, plan, Output(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_models_come_back_to_the_cpu_whatever_happens() -> None:
    model, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    meta = torch.device("meta")
    model.to = lambda device: moved.append((model, device))  # type: ignore[method-assign, assignment]
    teacher.to = lambda device: moved.append((teacher, device))  # type: ignore[method-assign, assignment]
    moved: list[tuple[nn.Module, torch.device]] = []
    with pytest.raises(KeyboardInterrupt), placed(meta, model, None, teacher):
        raise KeyboardInterrupt
    assert moved == [(model, meta), (teacher, meta), (model, CPU), (teacher, CPU)]


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_precision_of_a_gpu(monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert precision_on(torch.device("cuda"), "auto") == expected
    assert precision_on(torch.device("cuda"), "float32") == "float32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: not shown that training runs on one")
def test_a_run_on_a_gpu_is_interrupted_resumed_and_leaves_a_model_on_the_cpu(
    checkpoint: Checkpoint, rows: TrainingRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan((Stage("joint", epochs=2, encoder_lr=3e-3),), RunOptions(device="cuda", batch_size=8, snapshot_steps=1))
    before = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    honest: Callable[..., float] = train.take_step
    devices: list[str] = []

    def take_step(run: train.Run, *arguments: object) -> float:
        devices.append(device_of(run.model).type)
        if len(devices) == 4:
            raise KeyboardInterrupt
        return honest(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", take_step)
        with pytest.raises(KeyboardInterrupt):
            train_model(checkpoint, rows, plan, Output(tmp_path))
    assert set(devices) == {"cuda"}
    assert device_of(checkpoint.model) == CPU
    report = resume_training(tmp_path, rows)
    after = load_checkpoint(tmp_path).model.state_dict()
    assert report.steps == 2 * 6
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
