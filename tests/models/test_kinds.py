"""Every kind of model: it learns in the one loop, it is brought back as it was, and a row's answer is its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offramp.errors import DataError, OptionError
from offramp.models.attached import AttachedConfig
from offramp.models.branchynet import BranchyNet, BranchyNetConfig
from offramp.models.cascade import CascadeConfig, CascadeTransformer, sinusoids
from offramp.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from offramp.models.decoder import DecoderConfig
from offramp.models.efficientnet import EfficientNet, EfficientNetConfig, efficientnet_from_pretrained
from offramp.models.evaluate import area_under, frontier, outcome_of, quality_per_exit
from offramp.models.kinds import KINDS
from offramp.models.plan import Plan, RunOptions, Stage
from offramp.models.regression import RegressionConfig
from offramp.models.rows import ArrayRows, TextRows, TrainingRows
from offramp.models.strategies import LossOptions
from offramp.models.train import train_model

CASCADE = CascadeConfig((1, 2), hidden_size=32, num_heads=2, inner_size=32, vocab_size=12)
BRANCHYNET = BranchyNetConfig((4, 8), depth=1, num_classes=2, image_size=8)
EFFICIENTNET = EfficientNetConfig((1, 2), num_classes=2, image_channels=1, image_size=8, upscale=2)
FAST = Stage("joint", 6, encoder_lr=1e-2, head_lr=1e-2, loss=LossOptions(rule="equal"))
RUN = RunOptions(batch_size=8, precision="float32")


def images(num_rows: int, shape: tuple[int, int, int]) -> ArrayRows:
    """Noise that is brighter on the left or on the right."""
    random = np.random.default_rng(1)
    labels = np.arange(num_rows) % 2
    pixels = random.integers(0, 120, (num_rows, *shape), np.uint8)
    half = shape[2] // 2
    for row, label in enumerate(labels):
        pixels[row, :, :, label * half : (label + 1) * half] += 130
    return ArrayRows({"pixels": pixels}, labels)


def fresh(kind: str, config: Any, weights: Path = Path(), seed: int = 0) -> nn.Module:
    return KINDS[kind].fresh(weights, config, seed)


def test_a_cascade_learns_and_answers_each_row_alone(checkpoint: Checkpoint, rows: TrainingRows) -> None:
    made = Checkpoint(fresh("cascade", CASCADE), checkpoint.tokenizer_path, checkpoint.label_names, 16, "cascade")
    assert train_model(made, rows, Plan((FAST,), RUN)).validation == (1.0, 1.0)
    assert isinstance(made.model, CascadeTransformer)
    ids = torch.tensor([[2, 4, 6, 3, 0, 0], [2, 5, 7, 8, 9, 3]])
    both = made.model(ids, ids.sign())
    alone = made.model(ids[:1, :4], ids[:1, :4].sign())
    for got, expected in zip(both, alone, strict=True):
        torch.testing.assert_close(got[:1], expected, atol=1e-5, rtol=1e-5)


def test_positions_are_sines_and_cosines() -> None:
    got = sinusoids(7, 6)
    for position in range(7):
        for pair in range(3):
            angle = torch.tensor(position / 10_000 ** (2 * pair / 6), dtype=torch.float64)
            assert float(got[position, 2 * pair]) == pytest.approx(float(angle.sin()), abs=1e-6)
            assert float(got[position, 2 * pair + 1]) == pytest.approx(float(angle.cos()), abs=1e-6)


@pytest.mark.parametrize(("kind", "config"), [("branchynet", BRANCHYNET), ("efficientnet", EFFICIENTNET)])
def test_convolutional_networks_learn(kind: str, config: Any) -> None:
    torch.manual_seed(0)
    model = BranchyNet(config) if kind == "branchynet" else EfficientNet(config)
    made = Checkpoint(model, None, ("left", "right"), kind=kind)
    rows = TrainingRows(images(64, config.image_shape), images(32, config.image_shape))
    report = train_model(
        made, rows, Plan((replace(FAST, epochs=12), replace(FAST, strategy="early_heads", epochs=1)), RUN)
    )
    assert max(report.validation) > 0.9
    assert min(report.validation) > 0.6, "batch norm's averages are slow in an EfficientNet"
    batch = next(rows.validation.batches(4, seed=0))
    pixels = torch.from_numpy(batch.inputs["pixels"])
    for both, alone in zip(model(pixels), model(pixels[:1]), strict=True):
        torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-5)


def test_a_regression_learns_values_and_where_it_errs(encoder_path: Path, checkpoint: Checkpoint) -> None:
    """Texts with the word 'very' have a random value, the others a fixed one."""
    random = np.random.default_rng(0)
    ids = [[2, word, 10 if noisy else 6, 3] for word in (4, 5) for noisy in (0, 1) for _ in range(40)]
    noise = np.array([row[2] == 10 for row in ids]) * random.choice([-1.5, 1.5], len(ids))
    targets = (np.array([1.0 if row[1] == 4 else -1.0 for row in ids]) + noise).astype(np.float32)
    data = TextRows(ids, targets)
    model = fresh("regression", RegressionConfig((1, 3), offset=float(targets.mean()), scale=1.5), encoder_path)
    made = Checkpoint(model, checkpoint.tokenizer_path, (), 16, "regression")
    stage = replace(FAST, epochs=8, encoder_lr=3e-3, loss=LossOptions(rule="equal", confidence_weight=1.0))
    report = train_model(made, TrainingRows(data, data), Plan((stage,), replace(RUN, frozen=())))
    assert report.measure == "error"
    outcome = outcome_of(model, data)
    assert np.isnan(outcome.learned[:, 1]).all(), "at the final exit nobody asks"
    errors = np.abs(outcome.logits[:, :, 0] - outcome.targets[:, None])
    noisy = np.abs(outcome.targets) != 1.0
    assert errors[~noisy].mean() < 0.5
    assert outcome.learned[~noisy, 0].mean() > 0.2 + outcome.learned[noisy, 0].mean()
    assert report.validation == pytest.approx(errors.mean(axis=0), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(
    kind: str, checkpoint: Checkpoint, encoder_path: Path, tmp_path: Path
) -> None:
    regression = RegressionConfig((1, 3), offset=0.5, scale=2.0)
    made = {
        "bert": checkpoint.model,
        "regression": fresh("regression", regression, encoder_path) if kind == "regression" else None,
        "attached": fresh("attached", AttachedConfig((1, 3)), encoder_path) if kind == "attached" else None,
        "cascade": CascadeTransformer(CASCADE),
        "branchynet": BranchyNet(BRANCHYNET),
        "efficientnet": EfficientNet(EFFICIENTNET),
        "language-model": fresh("language-model", DecoderConfig(12, 8, 1, 2, 1, 8, (1,), 16)),
    }[kind]
    assert made is not None
    names = () if kind in ("regression", "language-model") else ("no", "yes")
    tokenizer = checkpoint.tokenizer_path if KINDS[kind].is_text else None
    save_checkpoint(tmp_path / "run", Checkpoint(made, tokenizer, names, 16, kind))
    loaded = load_checkpoint(tmp_path / "run")
    assert (loaded.kind, loaded.config, loaded.label_names) == (kind, made.config, names)
    assert (loaded.tokenizer_path is None) == (not KINDS[kind].is_text)
    ids = torch.tensor([[2, 4, 6, 3], [2, 5, 3, 0]])
    inputs = (ids, ids.sign()) if KINDS[kind].is_text else (torch.rand(2, *made.config.image_shape),)  # type: ignore[union-attr]
    inputs = inputs[:1] if KINDS[kind].is_language_model else inputs
    for got, expected in zip(loaded.model(*inputs), made.eval()(*inputs), strict=True):
        for one, other in zip(*([said] if isinstance(said, Tensor) else said for said in (got, expected)), strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("exits", [(3, 5, 11, 16), (3, 5)])
def test_pretrained_weights_are_taken_over_in_their_order(exits: tuple[int, ...], tmp_path: Path) -> None:
    """A made-up state dict: the same tensors in the order in which layers run, under other names."""
    config = EfficientNetConfig((1, 16), num_classes=3, image_size=32)
    torch.manual_seed(1)
    theirs = EfficientNet(config)
    parts = ("stem.", "layers.", "heads.1.")
    kept = [name for name in theirs.state_dict() if name.startswith(parts) and not name.startswith("heads.1.6.")]
    state = {f"_part{place}": theirs.state_dict()[name] for place, name in enumerate(kept)}
    torch.save({**state, "_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}, tmp_path / "lite0.pth")
    got = efficientnet_from_pretrained(tmp_path / "lite0.pth", replace(config, exits=exits)).state_dict()
    for name, tensor in theirs.state_dict().items():
        name = name.replace("heads.1.", f"heads.{len(exits) - 1}.")
        if name.startswith(("stem.", "layers.")) and name in got:
            assert torch.equal(got[name], tensor), name
    if exits[-1] == 16:
        assert torch.equal(got[f"heads.{len(exits) - 1}.0.weight"], theirs.state_dict()["heads.1.0.weight"])
    torch.save(dict(list(state.items())[:-1]), tmp_path / "less.pth")
    with pytest.raises(DataError, match="expected its state dict"):
        efficientnet_from_pretrained(tmp_path / "less.pth", config)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (CascadeConfig, {"exits": (2, 1)}),
        (CascadeConfig, {"hidden_size": 100, "num_heads": 3}),
        (CascadeConfig, {"pooling": "max"}),
        (CascadeConfig, {"dropout": 1.0}),
        (RegressionConfig, {"scale": 0.0}),
        (RegressionConfig, {"early_pooling": "max"}),
        (BranchyNetConfig, {"channels": ()}),
        (BranchyNetConfig, {"image_size": 2}),
        (BranchyNetConfig, {"num_classes": 1}),
        (EfficientNetConfig, {"exits": (3, 17)}),
        (EfficientNetConfig, {"image_channels": 2}),
    ],
)
def test_configurations_refuse(config: type, wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=r"got .*expected"):
        config(**wrong)


def test_the_frontier_row_by_row() -> None:
    random = np.random.default_rng(0)
    quality, sureness = random.random((40, 3)), random.random((40, 2))
    points = frontier(quality, sureness, (1.0, 2.0, 4.0))
    assert points[0] == pytest.approx([1.0, quality[:, 0].mean()])
    assert points[-1] == pytest.approx([4.0, quality[:, 2].mean()])
    threshold = np.unique(np.quantile(sureness, np.linspace(0, 1, 101)))[60]
    at = [next((k for k in range(2) if sureness[row, k] >= threshold), 2) for row in range(40)]
    by_hand = [np.mean([(1.0, 2.0, 4.0)[k] for k in at]), np.mean([quality[row, k] for row, k in enumerate(at)])]
    assert np.isclose(points, by_hand).all(axis=1).any()
    assert frontier(quality[:, :1], sureness[:, :0], (1.0,)).tolist() == [[1.0, pytest.approx(quality[:, 0].mean())]]


def test_the_area_is_that_of_a_staircase() -> None:
    assert area_under(np.array([[1.0, 0.5], [2.0, 0.4], [3.0, 0.9], [5.0, 0.8]])) == pytest.approx(
        (2 * 0.5 + 2 * 0.9) / 4
    )
    assert area_under(np.array([[1.0, 0.5]])) == 0.5
    assert quality_per_exit(BranchyNet(BRANCHYNET), images(8, (1, 8, 8)))[0] in {k / 8 for k in range(9)}
