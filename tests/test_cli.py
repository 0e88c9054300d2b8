"""The command line on a small model of the user's own: every command once for real, and every kind of mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from offramp.cli import main
from offramp.commands import traces
from offramp.errors import CertificateError
from offramp.export.export_bundle import WHOLE, reference_path
from offramp.runtime import Runner
from offramp.trace import load_trace, save_trace
from tests.export import graphs

FACTORY = "tests.export.models:shared_weights"
ROOT = Path(__file__).parent.parent


def offramp(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def answer_of(*arguments: object) -> Any:
    result = offramp(*arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle exported by the command itself, in a process of its own."""
    bundle = tmp_path_factory.mktemp("cli") / "bundle"
    command = [sys.executable, "-m", "offramp", "export", FACTORY, "-o", str(bundle), "--json"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["parity"]["chain_bit_equal"] is True
    return bundle


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported.with_name("bundle.reference"), tmp_path / "bundle.reference")
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    labels = random.integers(0, 2, 40)
    np.savez(path, allow_pickle=False, features=random.standard_normal((40, 6)).astype(np.float32), labels=labels)
    return path


def test_build_inspect_and_verify(bundle: Path) -> None:
    dry = answer_of("build-engine", bundle, "--dry-run", "--json")
    assert [found["action"] for found in dry["segments"]] == ["build"] * 3
    assert not list(bundle.rglob("*.plan"))
    for precision in ("fp16", "fp32"):
        built = answer_of("build-engine", bundle, "--precision", precision, "--json")
        assert built["backend"] == "tensorrt-rtx"
        assert all(found["bytes"] > 0 for found in built["segments"])
    again = answer_of("build-engine", bundle, "--json")
    assert [found["action"] for found in again["segments"]] == ["reuse"] * 3
    for segment in answer_of("inspect", bundle, "--json")["segments"]:
        assert {plan["precision"] for plan in segment["plans"]} == {"fp16", "fp32"}
        assert all(plan["header"]["version"] == plan["version"] for plan in segment["plans"])
    assert "header says tensorrt-rtx" in offramp("inspect", bundle).output
    assert answer_of("verify", bundle, "--json")["chain_bit_equal"] is True


def test_calibrate_run_and_bench(bundle: Path, data: Path, tmp_path: Path) -> None:
    document = answer_of("calibrate", bundle, "--data", data, "--max-drop", "0.1", "--json")
    assert len(document["policy"]["temperatures"]) == 3
    assert document["certificate"] is None
    lines = [json.loads(line) for line in offramp("run", bundle, data).stdout.splitlines()]
    assert len(lines) == 40
    assert lines[0].keys() == {"prediction", "exit_index", "score", "reason"}
    closed = [json.loads(line) for line in offramp("run", bundle, data, "--full-depth").stdout.splitlines()]
    assert {line["exit_index"] for line in closed} == {2}


def test_trace_says_what_it_recorded(bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_COST_SECONDS", 0.0)
    document = answer_of("trace", bundle, "--data", data, "--limit", "30", "--json")
    trace = traces.stored_trace(bundle)
    assert document["path"] == str(traces.trace_path(bundle, "onnxruntime", "fp32"))
    assert (document["sha256"], document["rows"], document["labelled"]) == (trace.sha256, 30, 30)
    assert (document["backend"], document["precision"], document["exits"]) == ("onnxruntime", "fp32", 3)
    assert document["files"] == list(trace.files)
    assert document["batch_costs_ms"].keys() == {"1", "2", "4", "8", "16", "32"}
    assert np.isfinite(list(document["batch_costs_ms"].values())).all()
    assert 0 < document["uncut_ms"] == trace.uncut_ms < 1000
    shown = offramp("trace", bundle, "--data", data, "-o", tmp_path / "t.npz", "--precision", "fp16")
    assert shown.exit_code == 0, shown.output
    assert "40 rows x 3 exits on onnxruntime fp16" in shown.stdout
    assert "uncut" not in shown.stdout, "there is no uncut model in FP16"
    assert load_trace(tmp_path / "t.npz").sha256 in shown.stdout


def test_diagnose_reads_the_trace(bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_COST_SECONDS", 0.0)
    assert "run `offramp trace" in offramp("diagnose", bundle).stderr
    document = answer_of("trace", bundle, "--data", data, "--json")
    found = answer_of("diagnose", bundle, "--json")
    assert (found["num_rows"], found["num_labelled"], len(found["exits"])) == (40, 40, 3)
    assert found == answer_of("diagnose", bundle, "--trace", document["path"], "--json")
    shown = offramp("diagnose", bundle).stdout
    assert "exit 2: accuracy" in shown
    assert "overthinking: wasteful" in shown
    unlabelled = tmp_path / "unlabelled.npz"
    with np.load(data) as arrays:
        np.savez(unlabelled, features=arrays["features"])
    answer_of("trace", bundle, "--data", unlabelled, "--json")
    shown = offramp("diagnose", bundle).stdout
    assert "40 rows, 0 with a label" in shown
    assert "accuracy" not in shown


def test_without_the_whole_graph_the_uncut_model_is_not_timed(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "_COST_SECONDS", 0.0)
    (reference_path(bundle) / WHOLE).unlink()
    assert answer_of("trace", bundle, "--data", data, "--json")["uncut_ms"] is None
    (reference_path(bundle) / WHOLE).write_bytes(b"another")
    assert "belongs to another export" in offramp("trace", bundle, "--data", data).stderr


def test_bench_times_every_alternative_at_every_size(bundle: Path, data: Path) -> None:
    arguments = ("bench", bundle, "--data", data, "--requests", "6", "--batch-sizes", "1,6")
    measured = answer_of(*arguments, "--precision", "fp16", "--json")
    assert measured.keys() == {"uncut", "cut at exit 0", "cut at exit 1", "full depth", "offramp"}
    for sizes in measured.values():
        assert sizes.keys() == {"1", "6"}
        assert all(0 < found["p50_ms"] <= found["p99_ms"] for found in sizes.values())
        assert sizes["1"]["accuracy"] == sizes["6"]["accuracy"]
    shown = offramp(*arguments)
    assert "6 rows a request" in shown.stdout
    assert "timing 5 alternatives on requests of 6" in shown.stderr
    accuracy = {name: sizes["1"]["accuracy"] for name, sizes in measured.items()}
    assert accuracy["uncut"] == accuracy["full depth"] == accuracy["offramp"]  # the policy of an export is full depth


def test_bench_asks_as_many_rows_at_once_as_it_was_told(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offramp.commands import benchmark

    asked: list[int] = []

    def timed(callables: Any, repetitions: int, warmup: int) -> Any:
        for call in callables.values():
            call()
        return {name: np.full(repetitions, 2.0) for name in callables}

    def watched(runner: Any) -> Any:
        return lambda inputs: asked.append(len(inputs["features"])) or runner.run(inputs).prediction

    monkeypatch.setattr(benchmark, "interleaved_ms", timed)
    monkeypatch.setattr(benchmark, "runner_answer", watched)
    options = benchmark.BenchOptions(num_rows=20, batch_sizes=(16,))
    found = benchmark.bench_bundle(bundle, str(data), options)["offramp"][16]
    assert found.rows_per_s == 8000
    assert asked == [16, 16, 16, 16, 8, 16, 16, 8]  # timed: full requests only; for accuracy: all 40 rows; two runners


def test_int8_runs_where_it_is_asked_for(tmp_path: Path, data: Path) -> None:
    bundle = tmp_path / "int8"
    exported = answer_of("export", FACTORY, "-o", bundle, "--precision", "int8", "--json")
    assert [set(segment["graphs"]) for segment in exported["segments"]] == [{"fp32", "int8"}] * 3
    assert "int8_predictions_changed" in exported["parity"]
    report = answer_of("calibrate", bundle, "--data", data, "--precision", "int8", "--json")
    assert report["precision"] == report["certificate"]["precision"] == "int8"
    assert "uncut" in answer_of("bench", bundle, "--data", data, "--requests", 2, "--precision", "int8", "--json")
    assert len(offramp("run", bundle, data, "--precision", "int8").stdout.splitlines()) == 40
    missing = offramp("run", bundle, data, "--precision", "fp16")
    assert missing.exit_code == 2
    assert "has no 'fp16' graph, expected one of fp32, int8" in missing.stderr
    refused = offramp("build-engine", bundle, "--precision", "int8")
    assert refused.exit_code == 2
    assert "INT8 graphs are for ONNX Runtime on CPUs" in refused.stderr


def test_without_labels_agreement_with_full_depth_is_bounded(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "unlabelled.npz"
    np.savez(path, allow_pickle=False, features=np.random.default_rng(1).standard_normal((30, 6)).astype(np.float32))
    refused = offramp("calibrate", bundle, "--data", path, "--max-drop", "0.01")
    assert refused.exit_code == 2
    assert "label" in refused.output
    unbound = answer_of("calibrate", bundle, "--data", path, "--max-drop", "0.01", "--consistency", "--json")
    assert unbound["drop"] <= 0.01


def unlabelled_rows(path: Path, count: int) -> Path:
    """A file of inputs alone."""
    np.savez(path, allow_pickle=False, features=np.random.default_rng(2).standard_normal((count, 6)).astype(np.float32))
    return path


def test_calibrate_certifies_unless_told_otherwise(bundle: Path, tmp_path: Path) -> None:
    data = unlabelled_rows(tmp_path / "unlabelled.npz", 600)
    document = answer_of("calibrate", bundle, "--data", data, "--max-risk", "0.1", "--patience", "1", "--json")
    certificate = document["certificate"]
    assert (certificate["risk"], certificate["max_risk"], certificate["confidence"]) == ("consistency", 0.1, 0.95)
    assert certificate["num_rows"] == document["num_rows"] == 400
    assert document["policy"]["patience"] == 1
    with Runner.open(bundle, require_certificate=True) as runner:
        assert runner.certificate is not None
        assert runner.certificate.policy_sha256 == runner.policy.sha256
    shown = offramp("inspect", bundle).stdout
    assert "answers that differ from full depth's: at most 10.00%, with 95.0% confidence" in shown
    compared = offramp("calibrate", bundle, "--max-risk", "0.1", "--compare")  # the trace is there now
    assert compared.exit_code == 0
    assert "known about other rows: nothing" in compared.stdout
    assert "using" in compared.stderr
    shown = offramp("calibrate", bundle, "--max-drop", "0.1", "--consistency")
    assert "not certified" in shown.stdout
    assert "no certificate" in offramp("inspect", bundle).stdout
    with pytest.raises(CertificateError):
        Runner.open(bundle, require_certificate=True)


def test_a_stale_certificate_is_shown_as_such(bundle: Path, tmp_path: Path) -> None:
    data = unlabelled_rows(tmp_path / "unlabelled.npz", 60)
    offramp("calibrate", bundle, "--data", data, "--max-risk", "0.1")
    path = bundle / "certificate.json"
    path.write_text(path.read_text().replace('"policy_sha256": "', '"policy_sha256": "0'))
    assert "not of this bundle as it is: it is for policy 0" in offramp("inspect", bundle).stdout
    path.unlink()


def test_a_trace_of_other_engines_is_refused(bundle: Path, tmp_path: Path) -> None:
    data = unlabelled_rows(tmp_path / "unlabelled.npz", 30)
    with Runner.open(bundle) as runner:
        trace = runner.record([dict(np.load(data))])
    save_trace(tmp_path / "trace.npz", replace(trace, files=("0" * 64,) * 3))
    refused = offramp("calibrate", bundle, "--trace", tmp_path / "trace.npz")
    assert refused.exit_code == 2
    assert "engines that" in refused.stderr
    assert "offramp trace" in refused.stderr
    save_trace(tmp_path / "trace.npz", trace)
    assert offramp("calibrate", bundle, "--trace", tmp_path / "trace.npz").exit_code == 0


def test_export_an_onnx_file_with_exits_and_calibration_data(tmp_path: Path) -> None:
    model, values = tmp_path / "odd.onnx", tmp_path / "values.npz"
    model.write_bytes(graphs.odd_names().SerializeToString())
    np.savez(
        values, allow_pickle=False, **{"x:0": np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)}
    )
    options = ("--exits", "exit one,Exit/2", "--calibration-data", values, "--precision", "fp32", "--json")
    described = answer_of("export", model, "-o", tmp_path / "bundle", *options)
    assert [spec["name"] for spec in described["exits"]] == ["exit one", "Exit/2"]
    assert described["parity"]["rows"] == 20


def test_calibration_data_as_polygraphy_saves_it(tmp_path: Path) -> None:
    from polygraphy.json import save_json

    model, inputs = tmp_path / "odd.onnx", tmp_path / "inputs.json"
    model.write_bytes(graphs.odd_names().SerializeToString())
    random = np.random.default_rng(0)
    save_json([{"x:0": random.standard_normal((3, 4)).astype(np.float32)} for _ in range(2)], str(inputs))
    options = ("--exits", "exit one,Exit/2", "--calibration-data", inputs, "--precision", "fp32", "--json")
    assert answer_of("export", model, "-o", tmp_path / "bundle", *options)["parity"]["rows"] == 6
    inputs.write_text("nonsense")
    refused = offramp("export", model, "-o", tmp_path / "other", *options)
    assert refused.exit_code == 2
    assert "polygraphy run --save-inputs" in refused.output


MISTAKES = {
    "no such model": (("export", "nothing", "-o", "{tmp}/b"), 2, "expected a checkpoint directory"),
    "no such factory": (("export", "tests.nothing:at_all", "-o", "{tmp}/b"), 2, "package.module:factory"),
    "onnx without exits": (("export", "{tmp}/odd.onnx", "-o", "{tmp}/b"), 2, "pass `--exits"),
    "unknown exit": (("export", "{tmp}/odd.onnx", "--exits", "z", "-o", "{tmp}/b"), 1, "unknown exit z"),
    "bad dimension": (("export", "x.onnx", "--dimension", "a=2:1", "-o", "{tmp}/b"), 2, "NAME=MIN:MAX"),
    "output is something else": (("export", FACTORY, "-o", "{tmp}"), 1, "is not a bundle"),
    "negative tolerance": (("export", FACTORY, "--atol", "-1", "-o", "{tmp}/b"), 2, "expected positive"),
    "not a bundle": (("run", "{tmp}"), 1, "is not a bundle"),
    "no GPU": (("build-engine", "{bundle}", "--backend", "tensorrt"), 1, "tensorrt-rtx"),
    "bad shapes": (("build-engine", "{bundle}", "--opt-shapes", "nothing:1x2"), 2, "nothing"),
    "a class for another risk": (("calibrate", "{bundle}", "--class", "0"), 2, "no other risk takes one"),
    "a risk without its class": (("calibrate", "{bundle}", "--risk", "missed_detection"), 2, "needs a --class"),
    "an unknown class": (
        ("calibrate", "{bundle}", "--risk", "missed_detection", "--class", "9"),
        2,
        "the model knows",
    ),
    "certified and not": (("calibrate", "{bundle}", "--max-drop", "0.1", "--patience", "2"), 2, "exclude each other"),
    "a flag that does nothing": (("calibrate", "{bundle}", "--consistency"), 2, "goes with --max-drop"),
    "a risk of two": (("calibrate", "{bundle}", "--max-risk", "2"), 2, "got max_risk 2.0"),
    "data of no kind": (("calibrate", "{bundle}", "--data", "data.npz"), 2, "data.npz"),
    "no tokenizer": (("run", "{bundle}"), 1, "no tokenizer"),
    "batch sizes of nothing": (("bench", "{bundle}", "--batch-sizes", "8,0"), 2, "such as 1,8,32"),
    "unknown backend": (("run", "{bundle}", "--backend", "abacus"), 2, "abacus"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_as_one_message_and_change_nothing(bundle: Path, tmp_path: Path, name: str) -> None:
    arguments, code, message = MISTAKES[name]
    (tmp_path / "odd.onnx").write_bytes(graphs.odd_names().SerializeToString())
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    result = offramp(*(argument.format(tmp=tmp_path, bundle=bundle) for argument in arguments), stdin="text\n")
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("harm", ["missing", "truncated", "altered"])
def test_a_damaged_file_is_named_and_never_parsed(bundle: Path, data: Path, harm: str) -> None:
    path = bundle / "segments" / "01" / "model.onnx"
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if harm == "truncated" else content[:-1] + b"\0")
    for command in (("run", bundle, data), ("verify", bundle), ("inspect", bundle)):
        result = offramp(*command)
        assert result.exit_code == 1
        assert str(path) in result.output


def test_a_newer_schema_is_refused(bundle: Path, data: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    result = offramp("run", bundle, data)
    assert result.exit_code == 1
    assert "pip install -U offramp" in result.output


def test_a_reader_that_goes_away_is_no_crash(bundle: Path, data: Path) -> None:
    command = f"{sys.executable} -m offramp run {bundle} {data} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_every_command_teaches_itself() -> None:
    for name, command in main.commands.items():
        shown = offramp(name, "--help")
        assert shown.exit_code == 0
        assert len(shown.output.splitlines()) > 6
        assert command.help


def test_doctor_names_what_is_missing_and_the_cure() -> None:
    findings = {found["subject"]: found for found in answer_of("doctor", "--json")}
    assert findings["run on onnxruntime"]["works"]
    assert findings["build tensorrt-rtx"]["works"]
    assert findings["build tensorrt"]["works"] or "offramp[tensorrt]" in findings["build tensorrt"]["detail"]
    assert findings["run on tensorrt-rtx"]["works"] == findings["gpu"]["works"]
    assert findings["gpu"]["works"] or "run on an NVIDIA GPU" in findings["run on tensorrt-rtx"]["detail"]
