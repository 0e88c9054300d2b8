"""Token retention from the model to the trace, alone and beside learned confidences; see test_learned.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper
from torch import Tensor, nn

from offramp.bundle import LEARNED, RETENTION, ROW_OUTPUTS, load_manifest
from offramp.cli import main
from offramp.commands.verification import verify_bundle
from offramp.errors import CaptureError, CutError
from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import source_from_model
from offramp.runtime import Runner
from offramp.trace import load_trace, save_trace
from tests.export import graphs, models

TELLS = ((LEARNED,), (RETENTION,), (LEARNED, RETENTION))  # at each exit
FP16_ATOL = 5e-3  # as in test_export_bundle


class Said(NamedTuple):
    logits: Tensor  # (N, C)
    retention: Tensor | None = None  # (N,) or (N, 1) in (0, 1]
    learned: Tensor | None = None  # (N,) in [0, 1]


class Forgetful(nn.Module):
    """Three exits on the mean of the tokens that are left; every layer after the first leaves out some."""

    def __init__(self, tells: tuple[tuple[str, ...], ...]) -> None:
        super().__init__()
        self.tells = tells
        self.table = nn.Embedding(30, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in tells)
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in tells)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Said, ...]:
        x, mask = self.table(input_ids), attention_mask.float()
        kept, total, exits = mask, mask.sum(1), []
        for k, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True)):
            x = torch.tanh(layer(x)) + x
            if k:  # the first token stays
                first = torch.arange(mask.shape[1], device=mask.device)[None, :] == 0
                kept = kept * ((torch.sin(x[:, :, 0] * 50) > -0.3) | first).float()
            left = torch.matmul(kept[:, None, :], torch.ones_like(kept)[:, :, None])[:, 0, 0]
            logits = head(torch.matmul(kept[:, None, :], x)[:, 0] / left[:, None])
            share = left / total
            retention = (share[:, None] if k == 1 else share) if RETENTION in self.tells[k] else None
            learned = torch.softmax(logits, 1)[:, 0] if LEARNED in self.tells[k] else None
            exits.append(Said(logits, retention, learned))
        return tuple(exits)


def forgetful() -> tuple[nn.Module, Example]:
    random = np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(0, 30, (24, 9)))
    mask = (torch.arange(9)[None, :] < torch.from_numpy(random.integers(1, 10, 24))[:, None]).long()
    dynamic = {1: "sequence"}
    example = Example(
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": dynamic, "attention_mask": dynamic},
        {"sequence": (1, 16)},
    )
    return models.with_fixed_weights(Forgetful(TELLS)), example


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retention") / "bundle"
    export_bundle(source_from_model("forgetful", *forgetful(), DEFAULT_OPSET), path)
    return path


def expected(name: str) -> np.ndarray:
    """What torch says, (N, E), NaN for exits without."""
    model, example = forgetful()
    with torch.no_grad():
        exits = model(**example.inputs)
    missing = torch.full((24,), torch.nan)
    told = [getattr(said, name) for said in exits]
    return torch.stack([missing if values is None else values.reshape(-1) for values in told], 1).numpy()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_from_the_model_to_the_trace(bundle: Path, tmp_path: Path, precision: str) -> None:
    inputs = forgetful()[1].arrays()
    assert [tuple(spec.row_outputs) for spec in load_manifest(bundle).exits] == list(TELLS)
    wanted = {name: expected(name) for name in ROW_OUTPUTS}
    assert np.nanmin(wanted[RETENTION]) < 0.5 < np.nanmax(wanted[RETENTION])
    with Runner.open(bundle, precision=precision) as runner:
        trace = runner.record(
            [{name: array[:11] for name, array in inputs.items()}, {k: v[11:] for k, v in inputs.items()}]
        )
        out = runner.engines[0].run(inputs, np.arange(24), np.float32(1))
        out = runner.engines[1].run(out.carry, np.arange(24), np.float32(1))
    assert out.learned is None
    if precision == "fp32":
        np.testing.assert_array_equal(out.retention, trace.retention[:, 1])
    for name in ROW_OUTPUTS:
        found = getattr(trace, name)
        assert found.dtype == np.float32
        near = np.isclose(found, wanted[name], atol=FP16_ATOL if precision == "fp16" else 1e-6, equal_nan=True)
        assert near.mean() > (0.95 if precision == "fp16" else 0.9999), "a token near 0 is kept or not"
    save_trace(tmp_path / "t.npz", trace)
    loaded = load_trace(tmp_path / "t.npz")
    np.testing.assert_array_equal(loaded.retention, trace.retention)
    assert loaded.sha256 == trace.sha256
    assert (trace.lengths == inputs["attention_mask"].sum(1)).all()


def test_the_chain_is_the_whole_graph(bundle: Path) -> None:
    assert verify_bundle(bundle).chain_bit_equal
    for k, told in enumerate(TELLS):
        graph = onnx.load(bundle / f"segments/{k:02d}/model.onnx").graph
        names = [value.name for value in graph.output]
        assert names[-len(told) - 1 :] == ["scores", *told]


class Returns(nn.Module):
    """One layer; the first exit's retention is what `share` is."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.layer, self.share = nn.Linear(6, 4), share

    def forward(self, x: Tensor) -> tuple[Said, Tensor]:
        said = self.layer(x)
        return Said(said[:, :3], torch.sigmoid(said[:, 3]) * self.share), said[:, :3].tanh()


@pytest.mark.parametrize("share", [0.0, 3.0])
def test_shares_that_are_none(tmp_path: Path, share: float) -> None:
    model = models.with_fixed_weights(Returns(share))
    source = source_from_model("wrong", model, Example({"x": models.waves(5, 6)}), DEFAULT_OPSET)
    with pytest.raises(CaptureError, match=r"token retention retention_1 of exit logits_1 is .* a share in \(0, 1\]"):
        export_bundle(source, tmp_path / "bundle", ExportOptions(precision="fp32"))


def test_the_command_line_names_the_shares_of_an_onnx_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["a"]),
        helper.make_node("MatMul", ["h", "w3"], ["doubt"]),
        helper.make_node("Sigmoid", ["doubt"], [RETENTION]),  # named in the contract's way
        helper.make_node("Tanh", ["h"], ["h2"]),
        helper.make_node("MatMul", ["h2", "w2"], ["b"]),
    ]
    weights = [graphs.weight("w1", 4, 4), graphs.weight("w2", 4, 3), graphs.weight("w3", 4, 1)]
    model = graphs.model_of(nodes, {"x": ["batch", 4]}, {"a": ["batch", 3], "b": ["batch", 3]}, weights)
    model.graph.output.append(helper.make_tensor_value_info(RETENTION, TensorProto.FLOAT, ["batch", 1]))
    path, bundle = str(tmp_path / "graph.onnx"), str(tmp_path / "bundle")
    Path(path).write_bytes(model.SerializeToString())
    options = ["--exits", "a,b", "--precision", "fp32", "--json"]
    done = CliRunner().invoke(main, ["export", path, "-o", bundle, *options, "--retention", RETENTION])
    assert done.exit_code == 0, done.output
    assert [spec["retention"] for spec in json.loads(done.stdout)["exits"]] == [RETENTION, ""]
    assert "token retention retention" in CliRunner().invoke(main, ["inspect", bundle]).output
    inputs = {"x": models.waves(8, 4).numpy()}
    with Runner.open(bundle) as runner:
        trace = runner.record([inputs])
    assert trace.retention.shape == (8, 2)
    assert (trace.retention[:, 0] > 0).all()
    for wrong, message in (("h,h2,b", "got 3 outputs for --retention"), ("b", "expected each output once")):
        done = CliRunner().invoke(main, ["export", path, "-o", bundle + "2", *options, "--retention", wrong])
        assert done.exit_code != 0
        assert message in done.output


def test_values_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    class Mixed(Returns):
        def forward(self, x: Tensor) -> tuple[Said, Tensor]:
            said, final = super().forward(x)
            return Said(said.logits, torch.sigmoid(said.logits[:, 0] - said.logits.mean())), final

    model = models.with_fixed_weights(Mixed(1.0))
    source = source_from_model("mixed", model, Example({"x": models.waves(5, 6)}), DEFAULT_OPSET)
    with pytest.raises(CutError, match=r"token retention 'retention_1'.*each of its row alone"):
        export_bundle(source, tmp_path / "bundle", ExportOptions(precision="fp32"))
