"""Language models in the one training loop: they learn, whatever the strategy, resume bit for bit, and ponder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from offramp.errors import OptionError
from offramp.models import train
from offramp.models.checkpoint import Checkpoint, load_checkpoint
from offramp.models.corpora import corpus_rows, load_folder, train_tokenizer
from offramp.models.decoder import DecoderConfig
from offramp.models.evaluate import quality_per_exit
from offramp.models.language_model import LanguageModel, fresh_language_model
from offramp.models.losses import HALTING_EPSILON, halting_weights
from offramp.models.plan import Plan, RunOptions, Stage
from offramp.models.rows import TrainingRows
from offramp.models.strategies import LossOptions
from offramp.models.train import Output, resume_training, train_model
from tests.texts import write_texts

WINDOW = 16
RUN = RunOptions(batch_size=8, precision="float32")
JOINT = Stage("joint", 1, encoder_lr=1e-2, head_lr=1e-2, loss=LossOptions(weights=(0.5, 0.5)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("language")
    corpus = load_folder(write_texts(path / "texts", 3, sentences=120))
    train_tokenizer(corpus.train, 300).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> TrainingRows:
    return corpus_rows(folder / "tokenizer.json", load_folder(folder / "texts"), WINDOW)


def fresh(folder: Path, block: str = "transformer", *, gated: bool = False) -> Checkpoint:
    config = DecoderConfig(300, 16, 2, 2, 1, 24, (1, 2), 32, gated=gated, block=block, num_experts=2, dropout=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Checkpoint(fresh_language_model(config), folder / "tokenizer.json", (), WINDOW, "language-model")


@pytest.mark.parametrize("block", ["transformer", "resnet-bk"])
def test_it_learns_at_every_exit(folder: Path, rows: TrainingRows, block: str) -> None:
    checkpoint = fresh(folder, block)
    before = quality_per_exit(checkpoint.model, rows.validation)
    report = train_model(checkpoint, rows, Plan((JOINT,), RUN))
    assert report.measure == "perplexity"
    assert 250 < min(before) < 350, "as good as guessing among 300 tokens"
    assert max(report.validation) < 60
    model = checkpoint.model
    assert isinstance(model, LanguageModel)
    losses = [
        functional.cross_entropy(model.decoder(torch.from_numpy(window[None, :-1])).exits[-1].logits[0], after)
        for window in rows.validation.tokens  # type: ignore[attr-defined]
        for after in [torch.from_numpy(window[1:])]
    ]
    assert report.validation[1] == pytest.approx(math.exp(torch.stack(losses).mean().item()), rel=1e-5)


@pytest.mark.parametrize("block", ["transformer", "resnet-bk"])
def test_a_killed_run_ends_with_the_same_weights(
    folder: Path, rows: TrainingRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str
) -> None:
    plan = Plan((JOINT,), replace(RUN, snapshot_steps=3))
    train_model(fresh(folder, block), rows, plan, Output(tmp_path / "peaceful"))
    honest, taken = train.take_step, []

    def take_step(*arguments: object) -> float:
        taken.append(1)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return honest(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", take_step)
        with pytest.raises(KeyboardInterrupt):
            train_model(fresh(folder, block), rows, plan, Output(tmp_path / "killed"))
    resume_training(tmp_path / "killed", rows)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("peaceful", "killed")]
    assert files[0] == files[1]
    assert load_checkpoint(tmp_path / "killed").config == fresh(folder, block).config


def test_pondering_costs_depth(folder: Path, rows: TrainingRows) -> None:
    """Adaptive computation time: where it is dear to go on, gates halt at once, and those are the learned scores."""
    means = []
    for weight in (0.0, 5.0):
        checkpoint = fresh(folder, gated=True)
        stage = replace(JOINT, strategy="act", loss=LossOptions(penalty_weight=weight))
        train_model(checkpoint, rows, Plan((stage,), RUN))
        ids = torch.from_numpy(rows.validation.tokens[:, :-1])  # type: ignore[attr-defined]
        with torch.no_grad():
            early, last = checkpoint.model(ids)
        assert last.learned is None
        means.append(early.learned.mean().item())
    assert means[1] > 0.9 > means[0]
    with pytest.raises(OptionError, match=r"set model\.gated = true"):
        train_model(fresh(folder), rows, Plan((stage,), RUN))


@given(st.lists(st.lists(st.floats(0.0, 1.0, width=32), min_size=3, max_size=3), min_size=1, max_size=8))
def test_halting_weights_are_those_of_a_loop(chances: list[list[float]]) -> None:
    columns = torch.tensor(chances).unbind(1)
    weights, ponder = halting_weights(columns)
    for row, chance in enumerate(chances):
        total, wanted = torch.zeros(()), [0.0] * 4
        for at in range(4):
            if at == 3 or (total + torch.tensor(chance[at])).item() >= torch.tensor(1 - HALTING_EPSILON).item():
                wanted[at] = (1 - total).item()
                break
            wanted[at] = chance[at]
            total = total + torch.tensor(chance[at])
        assert weights[row].tolist() == pytest.approx(wanted, abs=1e-6)
        assert ponder[row].item() == pytest.approx(at + 1 + wanted[at], abs=1e-5)
        assert weights[row].sum().item() == pytest.approx(1.0, abs=1e-5)


def test_a_fresh_model_is_as_unsure_as_can_be() -> None:
    model = fresh_language_model(DecoderConfig(100, 16, 3, 4, 2, 24, (1, 3), 32))
    with torch.no_grad():
        said = model(torch.arange(20).view(2, 10))
    for answer in said:
        assert answer.logits.shape == (20, 100)
        entropy = -(answer.logits.softmax(-1) * answer.logits.log_softmax(-1)).sum(-1)
        assert entropy.min().item() > 0.98 * math.log(100)
    assert [type(head) for head in model.heads] == [type(model.decoder.exits[0])] * 2
    assert isinstance(model.heads, nn.ModuleList)
