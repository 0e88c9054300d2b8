"""Every kind of model through the same cut: the chain equals the whole graph, row by row, and a plan per segment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from offramp import Policy
from offramp.bundle import load_manifest
from offramp.cli import main
from offramp.commands import traces
from offramp.commands.verification import verify_bundle
from offramp.errors import CutError, DataError, OptionError
from offramp.export.build_engine import BuildOptions, build_engines
from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import source_from_model
from offramp.models.branchynet import BranchyNet, BranchyNetConfig
from offramp.models.cascade import CascadeConfig, CascadeTransformer
from offramp.models.efficientnet import EfficientNet, EfficientNetConfig
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig
from offramp.models.regression import LearnedRegressor, RegressionConfig
from offramp.runtime import Runner
from offramp.tuning.thresholds import right_rows
from tests.models.attachable import tiny_attached

ATOL = 1e-5  # torch against ONNX Runtime in FP32, as in docs/tolerances.md for MiniLM
# Exits on encoders of transformers (ALBERT and ELECTRA were run, too); with pruning: test_pruned_encoder.py
ATTACHED = ("DistilBERT", "RoBERTa")
KINDS = ("bert", "cascade", "regression", "branchynet", "efficientnet", *ATTACHED)
PIXELS = {"branchynet": 12, "efficientnet": 14}  # and all others read texts
VOCABULARY = 20


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind in ATTACHED:
        return tiny_attached(kind)
    if kind == "bert":
        bert = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=16,
            initializer_range=0.2,
        )
        return EarlyExitEncoder(BertModel(bert), EncoderConfig((1, 2, 3), early_pooling="mean"))
    cascade = CascadeConfig((1, 2, 3), hidden_size=32, num_heads=2, inner_size=48, vocab_size=VOCABULARY)
    if kind == "cascade":
        return CascadeTransformer(cascade)
    if kind == "regression":
        encoder = CascadeTransformer(cascade)
        encoder.heads = nn.ModuleList()
        return LearnedRegressor(encoder, 32, RegressionConfig((1, 2, 3), offset=0.5, scale=2.0))
    if kind == "branchynet":
        return BranchyNet(BranchyNetConfig((4, 8, 8), num_classes=3, image_size=12))
    return EfficientNet(EfficientNetConfig((1, 3, 4), num_classes=3, image_channels=1, image_size=14, upscale=2))


def inputs_of(kind: str, rows: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    if kind not in PIXELS:
        ids = torch.randint(1, VOCABULARY, (rows, 9), generator=draw)
        mask = (torch.arange(9) < torch.randint(2, 10, (rows, 1), generator=draw)).long()
        return {"input_ids": ids * mask, "attention_mask": mask}
    return {"pixels": torch.rand(rows, 1, PIXELS[kind], PIXELS[kind], generator=draw)}


class Bundles(dict[str, Path]):
    """A bundle for each kind, exported when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, kind: str) -> Path:
        inputs = inputs_of(kind, 12)
        axes: dict[str, Any] = {name: {1: "sequence"} for name in inputs} if "input_ids" in inputs else {}
        example = Example(inputs, axes, {"sequence": (1, 16)} if axes else {})
        source = source_from_model(kind, model_of(kind), example, DEFAULT_OPSET)
        export_bundle(source, self.folder / kind, ExportOptions("fp16"))
        self[kind] = self.folder / kind
        return self[kind]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Bundles(tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_says_what_torch_says(bundles: dict[str, Path], kind: str) -> None:
    assert verify_bundle(bundles[kind]).chain_bit_equal
    inputs = inputs_of(kind, 30)
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    with torch.no_grad():
        exits = model_of(kind).eval()(**inputs)
    expected = np.stack([(said if isinstance(said, Tensor) else said.logits).numpy() for said in exits], 1)
    with Runner.open(bundles[kind], policy=Policy.full_depth()) as runner:
        trace = runner.record([feed])
        np.testing.assert_allclose(trace.logits, expected, atol=ATOL, rtol=ATOL)
        if kind == "regression":
            sure = np.stack([said.learned.numpy() for said in exits[:-1]], 1)
            np.testing.assert_allclose(trace.learned[:, :-1], sure, atol=ATOL)
        score = "learned" if kind == "regression" else "max_prob"
        column = trace.learned if kind == "regression" else trace.scores[:, :, 0]
        runner.policy = Policy.thresholds(score, [float(np.median(column[:, 0])), float(np.median(column[:, 1]))])
        result = runner.run(feed)
        assert len(set(result.exit_index.tolist())) > 1, "some leave and some go on"
        for row in range(30):
            np.testing.assert_array_equal(result.outputs["logits"][row], trace.logits[row, result.exit_index[row]])
            alone = runner.run({name: array[row : row + 1] for name, array in feed.items()})
            np.testing.assert_array_equal(alone.outputs["logits"][0], result.outputs["logits"][row])


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_is_within_the_usual_tolerance(bundles: dict[str, Path], kind: str) -> None:
    """Export has refused what is not; here, that it is FP16 at all."""
    parity = load_manifest(bundles[kind]).parity
    assert [found["allowed_ratio"] <= 1 for found in parity["fp16_segments"]] == [True] * 3
    assert min(parity["fp16_weight_share"]) > 0.5


def test_patience_leaves_where_exits_agree(bundles: dict[str, Path]) -> None:
    feed = {name: tensor.numpy() for name, tensor in inputs_of("bert", 40).items()}
    with Runner.open(bundles["bert"], policy=Policy(patience=2)) as runner:
        said = runner.record([feed]).predictions
        result = runner.run(feed)
    agreed = [1 if first == second else 2 for first, second, _ in said.tolist()]
    assert result.exit_index.tolist() == agreed
    assert len(set(agreed)) == 2
    np.testing.assert_array_equal(result.prediction, said[np.arange(40), agreed])


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_for_each_segment(bundles: dict[str, Path], kind: str) -> None:
    report = build_engines(bundles[kind], BuildOptions())
    assert [plan.segment for plan in report.segments] == [0, 1, 2]
    assert all(plan.bytes > 0 and plan.fp16_share > 0 for plan in report.segments)


def test_a_regression_is_decided_by_its_confidence_alone(bundles: dict[str, Path]) -> None:
    feed = {name: tensor.numpy() for name, tensor in inputs_of("regression", 6).items()}
    with Runner.open(bundles["regression"]) as runner:
        trace = runner.record([feed])
        np.testing.assert_array_equal(trace.scores, np.broadcast_to(np.float32([0, 0, 1]), (6, 3, 3)))
        assert (trace.predictions == 0).all()
        for policy in (
            Policy.thresholds("max_prob", [0.5, 0.5]),
            Policy(patience=2),
            Policy(sources={"mail": Policy.thresholds("margin", [0.1, None])}),
        ):
            with pytest.raises(
                OptionError, match="a regression, which has no classes; expected thresholds on 'learned'"
            ):
                runner.policy = policy
        runner.policy = Policy.thresholds("max_prob", [None, None])
    with pytest.raises(DataError, match="a trace of a regression"):
        right_rows(trace, "full_depth")


def test_a_regression_from_the_command_line(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded with its targets, calibrated, diagnosed and timed by its error; what is about classes says so."""
    monkeypatch.setattr(traces, "_COST_SECONDS", 0.0)
    bundle, data = str(bundles["regression"]), str(tmp_path / "rows.npz")
    feed = {name: tensor.numpy() for name, tensor in inputs_of("regression", 400).items()}
    with Runner.open(bundle, policy=Policy.full_depth()) as runner:
        values = runner.run(feed).outputs["logits"][:, 0]
    targets = values + np.random.default_rng(0).normal(size=400).astype(np.float32)
    np.savez(data, **feed, labels=targets)
    np.savez(tmp_path / "asked.npz", **{name: array[:3] for name, array in feed.items()})

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(main, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert run("trace", bundle, "--data", data)["labelled"] == 400
    error = float(np.abs(values - targets).mean())
    certified = run("calibrate", bundle, "--max-risk", "0.2", "--value-range", "2")
    assert (certified["policy"]["score"], certified["certificate"]["risk"]) == ("learned", "deviation")
    assert certified["certificate"]["value_range"] == 2
    assert certified["error_full_depth"] == pytest.approx(error, abs=0.2), "of the tested rows"
    empirical = run("calibrate", bundle, "--max-drop", "0.05")
    assert empirical["error_full_depth"] == pytest.approx(error, rel=1e-5)
    assert empirical["error_policy"] <= error + 0.05
    said = CliRunner().invoke(main, ["run", bundle, str(tmp_path / "asked.npz"), "--full-depth"]).stdout
    assert [json.loads(line)["value"] for line in said.splitlines()] == values[:3].tolist()
    assert run("diagnose", bundle)["values"][2]["error"] == pytest.approx(error, rel=1e-5)
    measured = run("bench", bundle, "--data", data, "--requests", "2", "--batch-sizes", "1")
    assert measured["offramp"]["1"]["error"] == pytest.approx(empirical["error_policy"], abs=1e-4)
    assert measured["uncut"]["1"]["error"] == pytest.approx(error, abs=1e-4)
    assert measured["uncut"]["1"]["accuracy"] is None
    for arguments, said in (
        (("report", bundle, "-o", str(tmp_path / "page.html")), "the page is about classes"),
        (("place", bundle, "-o", str(tmp_path / "placed")), "exits are placed by rows that are right or wrong"),
        (("calibrate", bundle, "--risk", "consistency"), "for a trace of a regression"),
        (("calibrate", bundle, "--score", "margin"), "on 'learned' alone"),
    ):
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code != 0
        assert said in " ".join(result.output.split()), result.output


class Values(nn.Module):
    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return features[:, :1], features[:, :1] * 2


def test_a_single_number_without_a_confidence_is_no_exit(tmp_path: Path) -> None:
    source = source_from_model("values", Values(), Example({"features": torch.rand(4, 3)}), DEFAULT_OPSET)
    with pytest.raises(CutError, match=r"a binary exit needs two logits, such as .*a regression learned confidences"):
        export_bundle(source, tmp_path / "bundle", ExportOptions("fp32"))
