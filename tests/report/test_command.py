"""`offramp report` on a bundle with a trace beside it: the page, the JSON, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from offramp.bundle import CERTIFICATE, FileRecord, PolicyRecord, SegmentSpec, save_manifest
from offramp.cli import main
from offramp.commands.traces import trace_path
from offramp.policy import Policy
from offramp.storage import write_file
from offramp.trace import load_trace, save_trace
from tests.report.evidence import certificate, manifest, small_trace


def offramp(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of three exits with a trace beside it. No graph: the report opens none."""
    policy = Policy.thresholds("max_prob", [0.7, 0.7])
    graphs = [FileRecord(f"segments/{k:02d}/model.onnx", 1, str(k) * 64) for k in range(3)]
    made = replace(
        manifest(3, 2, ("negative", "positive"), "reviews"),
        segments=tuple(SegmentSpec(k, (), (), (), {"fp32": graph}) for k, graph in enumerate(graphs)),
        policy=PolicyRecord(policy.sha256),
    )
    path = tmp_path / "bundle"
    write_file(path / "policy.json", policy.to_json().encode())
    save_manifest(path, made)
    trace = small_trace(30, 3, 2, files=tuple(graph.sha256 for graph in graphs), backend="onnxruntime")
    save_trace(trace_path(path, "onnxruntime", "fp32"), replace(trace, fingerprint=made.fingerprint))
    return path


@pytest.fixture
def data(bundle: Path, tmp_path: Path) -> Path:
    """The texts that the trace would have been recorded from."""
    labels = load_trace(trace_path(bundle, "onnxruntime", "fp32")).labels.tolist()
    rows = [
        {"text": f"row {row}: <b>fine & dull</b>", "label": ("negative", "positive")[label]}
        for row, label in enumerate(labels)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_page_and_json(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    result = offramp("report", bundle, "-o", output)
    assert result.exit_code == 0, result.output
    assert "There is no certificate" in result.stdout
    text = output.read_text()
    assert text.startswith("<!doctype html>")
    assert "row 3" not in text
    result = offramp("report", bundle, "--json")
    document = json.loads(result.stdout)
    assert document["subject"]["num_labelled"] == 30
    assert document["certificate"]["status"] == "none"
    assert offramp("report", bundle, "-o", output).exit_code == 0
    assert output.read_text() == text


def test_examples_let_texts_in(bundle: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert offramp("report", bundle, "-o", output, "--examples", data).exit_code == 0
    text = output.read_text()
    assert "&lt;b&gt;fine &amp; dull&lt;/b&gt;" in text
    assert "<b>fine" not in text


def test_examples_of_other_rows_are_refused(bundle: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    result = offramp("report", bundle, "-o", tmp_path / "report.html", "--examples", other)
    assert result.exit_code == 2
    assert "in the trace it is" in result.stderr
    assert not (tmp_path / "report.html").exists()
    result = offramp("report", bundle, "--json", "--examples", "elsewhere")
    assert "expected rotten-tomatoes, or a .csv or .jsonl file" in result.stderr


def test_mistakes(bundle: Path, tmp_path: Path) -> None:
    result = offramp("report", bundle)
    assert result.exit_code == 2
    assert "`-o PAGE.html` nor `--json`" in result.stderr
    (tmp_path / "bench.json").write_text("{")
    result = offramp("report", bundle, "--json", "--bench", tmp_path / "bench.json")
    assert result.exit_code == 2
    result = offramp("report", bundle, "--json", "--trace", tmp_path / "none.npz")
    assert result.exit_code == 2
    assert "offramp trace" in result.stderr


def test_another_trace_may_be_named(bundle: Path, tmp_path: Path) -> None:
    trace = load_trace(trace_path(bundle, "onnxruntime", "fp32"))
    save_trace(tmp_path / "some.npz", trace.rows(np.arange(7)))
    result = offramp("report", bundle, "--json", "--trace", tmp_path / "some.npz")
    assert json.loads(result.stdout)["subject"]["num_rows"] == 7


def test_the_certificate_and_the_placement_in_the_bundle_are_read(bundle: Path) -> None:
    trace = load_trace(trace_path(bundle, "onnxruntime", "fp32"))
    held = certificate(trace, Policy.thresholds("max_prob", [0.7, 0.7]))
    write_file(bundle / CERTIFICATE, held.to_json().encode())
    assert json.loads(offramp("report", bundle, "--json").stdout)["certificate"]["status"] == "in force"
    write_file(bundle / "reports" / "placement.json", b"{}")
    assert "offramp place" in offramp("report", bundle, "--json").stderr
