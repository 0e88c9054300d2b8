"""The spine of export: a bundle that the runtime opens and that answers as the whole graph does, or nothing at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from offramp.bundle import load_manifest
from offramp.errors import CaptureError, ModelError, OptionError, ParityError, StorageError
from offramp.export.capture import DEFAULT_OPSET
from offramp.export.chain import Arrays, open_session
from offramp.export.export_bundle import ExportOptions, export_bundle, reference_path
from offramp.export.source import ModelSource, source_from_model, source_from_onnx
from offramp.policy import Policy
from offramp.runtime.runner import Runner
from tests.export import graphs, models

FP32 = ExportOptions(precision="fp32")
FP16_ATOL = 5e-3  # docs/tolerances.md: FP16 weights of models of this size, logits around 1


@pytest.fixture(scope="module")
def text_source() -> ModelSource:
    """A `transformers` model with its own masks and attention."""
    return source_from_model("text", *models.by_keyword(), DEFAULT_OPSET)


def graph_source(graph: onnx.ModelProto, tmp_path: Path) -> ModelSource:
    path = tmp_path / "graph.onnx"
    path.write_bytes(graph.SerializeToString())
    return source_from_onnx(path, ("a", "b"), {}, {})


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def answers_row_by_row(source: ModelSource, inputs: Arrays) -> list[np.ndarray]:
    """Logits of every exit, each row having been alone."""
    whole = open_session(source.graph)
    rows = [
        whole.run(list(source.exits), {name: value[row : row + 1] for name, value in inputs.items()})
        for row in range(len(next(iter(inputs.values()))))
    ]
    return [np.concatenate([row[position] for row in rows]) for position in range(len(source.exits))]


def max_prob(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents.max(1) / exponents.sum(1)


@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-6), ("fp16", FP16_ATOL)])
def test_runner_answers_as_the_whole_graph_does(tmp_path, text_source, precision: str, atol: float) -> None:
    manifest = export_bundle(text_source, tmp_path / "bundle", ExportOptions(precision=precision))
    assert set(manifest.segments[0].graphs) == {"fp32", precision}
    inputs = dict(text_source.example)
    first, final = answers_row_by_row(text_source, inputs)
    threshold = float(np.median(max_prob(first)) + 1e-4)
    with Runner.open(
        tmp_path / "bundle", policy=Policy.thresholds("max_prob", [threshold]), precision=precision
    ) as runner:
        result = runner.run(inputs)
    assert 0 < result.exit_index.sum() < len(first), "some leave and some go on"
    if precision == "fp32":
        np.testing.assert_array_equal(result.exit_index == 0, max_prob(first) >= threshold)
    expected = np.where((result.exit_index == 0)[:, None], first, final)
    np.testing.assert_allclose(result.outputs["logits"], expected, rtol=0, atol=atol)


def test_fp16_graphs_claim_no_shape_they_do_not_know(tmp_path, text_source) -> None:
    """AutoCast calls every length it does not know by one name; ONNX Runtime then reuses buffers that do not fit."""
    export_bundle(text_source, tmp_path / "bundle")
    graph = onnx.load(tmp_path / "bundle/segments/00/model.fp16.onnx").graph
    names = {dim.dim_param for value in graph.value_info for dim in value.type.tensor_type.shape.dim}
    assert "sequence" in names
    assert not [name for name in names if name.startswith("unk")]


def test_another_process_writes_the_same_bytes(tmp_path) -> None:
    export_bundle(source_from_model("same", *models.odd_outputs(), DEFAULT_OPSET), tmp_path / "here")
    script = f"""
from pathlib import Path
from offramp.export.export_bundle import export_bundle
from offramp.export.source import source_from_model
from tests.export import models
source = source_from_model("same", *models.odd_outputs(), {DEFAULT_OPSET})
export_bundle(source, Path({str(tmp_path)!r}, "there"))
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"PYTHONHASHSEED": "77"}, cwd=Path(__file__).parents[2]
    )
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
    assert files_of(tmp_path / "here.reference") == files_of(tmp_path / "there.reference")


def test_reference_lies_beside(tmp_path) -> None:
    source = graph_source(graphs.stacked(), tmp_path)
    steps: list[str] = []
    manifest = export_bundle(source, tmp_path / "bundle", FP32, steps.append)
    reference = reference_path(tmp_path / "bundle")
    assert set(files_of(reference)) == {"whole.onnx", "inputs.npz", "calibration.npz"}
    assert files_of(reference)["whole.onnx"] == manifest.reference_sha256
    with np.load(reference / "inputs.npz") as saved:
        np.testing.assert_array_equal(saved["x"], source.example["x"])
    assert steps == ["cutting", "verifying FP32", "verifying without padding", "writing"]
    assert load_manifest(tmp_path / "bundle") == manifest
    assert json.loads((tmp_path / "bundle/manifest.json").read_text())["parity"]["chain"]["max_abs"] == 0


def test_second_export_replaces_the_first(tmp_path) -> None:
    export_bundle(graph_source(graphs.stacked(), tmp_path), tmp_path / "out/bundle", FP32)
    (tmp_path / "out/bundle/stale").write_text("of the first")
    export_bundle(graph_source(graphs.names_taken(), tmp_path), tmp_path / "out/bundle", FP32)
    assert "stale" not in files_of(tmp_path / "out/bundle")
    whole = onnx.load(tmp_path / "out/bundle.reference/whole.onnx")
    assert any(node.op_type == "Constant" for node in whole.graph.node)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bundle", "bundle.reference"]


@pytest.mark.parametrize("taken", ["bundle", "bundle.reference"])
def test_what_is_not_ours_is_not_replaced(tmp_path, taken: str) -> None:
    source = graph_source(graphs.stacked(), tmp_path)
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "thesis.txt").write_text("mine")
    before = files_of(tmp_path)
    with pytest.raises(StorageError, match=rf"{taken} exists and is not a (bundle|reference)"):
        export_bundle(source, tmp_path / "bundle", FP32)
    assert files_of(tmp_path) == before


def test_fp16_beyond_tolerance_writes_nothing(tmp_path, text_source) -> None:
    with pytest.raises(ParityError) as caught:
        export_bundle(text_source, tmp_path / "bundle", ExportOptions(atol=1e-9, rtol=1e-9))
    for part in ("FP16 segment 0: output", "FP16 segment 1: output", "x the tolerance", "--precision fp32"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_the_bundle_that_was_there(tmp_path) -> None:
    export_bundle(graph_source(graphs.stacked(), tmp_path), tmp_path / "bundle", FP32)
    before = files_of(tmp_path)
    source = graph_source(graphs.training_dropout(), tmp_path)
    (tmp_path / "graph.onnx").write_bytes(graphs.stacked().SerializeToString())
    with pytest.raises(ModelError):
        export_bundle(source, tmp_path / "bundle", FP32)
    assert files_of(tmp_path) == before


def test_disk_that_fails_half_way_leaves_the_bundle_that_was_there(tmp_path, monkeypatch) -> None:
    export_bundle(graph_source(graphs.stacked(), tmp_path), tmp_path / "bundle", FP32)
    source = graph_source(graphs.names_taken(), tmp_path)
    before = files_of(tmp_path)
    write = Path.write_bytes

    def fail(path: Path, content: bytes) -> int:
        if path.name == "policy.json":
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(StorageError, match="the disk is full"):
        export_bundle(source, tmp_path / "bundle", FP32)
    assert files_of(tmp_path) == before


def test_loops_cannot_be_lowered_and_say_so(tmp_path, capfd) -> None:
    source = graph_source(graphs.loop_that_shadows(), tmp_path)
    with pytest.raises(ModelError, match=r"may not convert Loop making 'h2'\); export with `--precision fp32`"):
        export_bundle(source, tmp_path / "bundle")
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "bundle").exists()
    export_bundle(source, tmp_path / "bundle", FP32)


def test_range_that_the_graph_does_not_take(tmp_path) -> None:
    with pytest.raises(CaptureError, match=r"does not run at the min of its declared ranges.*--dimension NAME=MIN:MAX"):
        export_bundle(graph_source(graphs.image_with_rows(), tmp_path), tmp_path / "bundle", FP32)


def test_nan_on_the_example_is_the_models_fault(tmp_path) -> None:
    graph = graphs.two_exits([onnx.helper.make_node("Log", ["h"], ["h2"])])
    with pytest.raises(ParityError, match="exit b of the whole graph is NaN or infinite on the example data"):
        export_bundle(graph_source(graph, tmp_path), tmp_path / "bundle", FP32)


@pytest.mark.parametrize("arguments", [{"precision": "int4"}, {"atol": 0.0}, {"rtol": float("nan")}])
def test_options_that_make_no_sense(arguments: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        ExportOptions(**arguments)
