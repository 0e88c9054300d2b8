"""`offramp place`: costs measured on the clock, and a bundle with fewer exits that answers as the old one did."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnx import helper

from offramp.bundle import load_manifest, replace_policy
from offramp.cli import main
from offramp.commands import exit_costs, placing, traces
from offramp.commands.exit_costs import cached_costs
from offramp.commands.placing import REPORT
from offramp.commands.verification import verify_bundle
from offramp.errors import DataError
from offramp.export.export_bundle import ExportOptions, export_bundle, reference_path
from offramp.export.recut import calibration_batches, source_from_bundle, with_exits
from offramp.export.source import source_from_onnx
from offramp.policy import Policy, Veto
from offramp.runtime import Runner
from offramp.trace import load_trace
from offramp.tuning.replay import replay
from tests.export import graphs

WIDTH, NUM_EXITS, NUM_ROWS = 6, 4, 90
EXITS = tuple(f"exit {k}" for k in range(NUM_EXITS))


def four_exits():
    """Four layers with an exit after each; later exits differ little, so that rows may leave."""
    nodes = []
    for k in range(NUM_EXITS):
        before = f"hidden {k - 1}" if k else "x"
        nodes += [
            helper.make_node("MatMul", [before, f"layer {k}"], [f"product {k}"]),
            helper.make_node("Tanh", [f"product {k}"], [f"bent {k}"]),
            helper.make_node("Add", [f"bent {k}", before], [f"hidden {k}"]),
            helper.make_node("MatMul", [f"hidden {k}", "head"], [EXITS[k]]),
        ]
    constants = [graphs.weight(f"layer {k}", WIDTH, WIDTH) for k in range(NUM_EXITS)] + [
        graphs.weight("head", WIDTH, 3)
    ]
    return graphs.model_of(nodes, {"x": ["rows", WIDTH]}, {name: ["rows", 3] for name in EXITS}, constants)


@pytest.fixture(autouse=True)
def _quick_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_COST_SECONDS", 0.0)
    monkeypatch.setattr(placing, "_TIMED_ROWS", 3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placing")
    (folder / "four.onnx").write_bytes(four_exits().SerializeToString())
    source = source_from_onnx(folder / "four.onnx", EXITS, {}, {})
    export_bundle(source, folder / "bundle", ExportOptions("fp16"))
    random = np.random.default_rng(0)
    x = (random.standard_normal((NUM_ROWS, WIDTH)) * random.uniform(0.1, 2, (NUM_ROWS, 1))).astype(np.float32)
    np.savez(folder / "data.npz", x=x, labels=random.integers(0, 3, NUM_ROWS))
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    for name in ("bundle", "bundle.reference"):
        shutil.copytree(exported / name, tmp_path / name)
    shutil.copy(exported / "data.npz", tmp_path)
    return tmp_path / "bundle"


def place(bundle: Path, *arguments: object) -> Result:
    fixed = ["place", bundle, "--data", bundle.with_name("data.npz"), "--max-risk", 0.2, "--max-worst-case", "inf"]
    return CliRunner().invoke(main, [str(argument) for argument in (*fixed, *arguments)])


def test_the_new_bundle_answers_as_the_kept_exits_did(bundle: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    placed = bundle.with_name("placed")
    result = place(bundle, "-o", placed, "--keep", "1", "--exit-ms", 0.001, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["kept"] == [1, 3]
    assert json.loads((placed / "reports" / REPORT).read_text()) == document
    manifest, old = load_manifest(placed), load_manifest(bundle)
    assert [spec.name for spec in manifest.exits] == [EXITS[1], EXITS[3]]
    assert set(manifest.segments[1].graphs) == {"fp32", "fp16"}
    assert (manifest.inputs, manifest.reference_sha256) == (old.inputs, old.reference_sha256)
    assert verify_bundle(placed).chain_bit_equal
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before

    with np.load(bundle.with_name("data.npz")) as data, Runner.open(placed) as runner, Runner.open(bundle) as whole:
        answers = runner.run({"x": data["x"]})
        at_exit = whole.record([{"x": data["x"]}]).logits[np.arange(NUM_ROWS), np.array([1, 3])[answers.exit_index]]
        assert runner.policy == Policy.from_json(json.dumps(document["policy"]))
        trace = runner.record([{"x": data["x"]}])
    np.testing.assert_array_equal(answers.outputs["logits"], at_exit)
    np.testing.assert_array_equal(answers.exit_index, replay(runner.policy, trace).exit_index)
    assert 0 < (answers.exit_index == 0).sum() < NUM_ROWS
    changed = int((answers.prediction != trace.predictions[:, -1]).sum())
    assert changed == document["lost"] <= document["max_lost"]


def test_costs_are_measured_kept_and_used_again(bundle: Path, monkeypatch) -> None:
    result = place(bundle, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert len(document["costs"]["segments_ms"]) == NUM_EXITS
    assert min(document["costs"]["segments_ms"]) > 0
    assert document["costs"]["uncut_ms"] > 0
    assert len(list(reference_path(bundle).glob("exit-costs/*.json"))) == 1
    monkeypatch.setattr(exit_costs, "measured_costs", None)  # would fail
    again = json.loads(place(bundle, "--dry-run", "--json").stdout)
    assert again["costs"] == document["costs"]
    assert again["residual"] == document["residual"]
    monkeypatch.undo()
    monkeypatch.setattr(placing, "_TIMED_ROWS", 3)
    bound = (
        "--max-risk",
        0.2,
        "--max-worst-case",
        "inf",
        "--dry-run",
        "--measure",
        "--json",
    )  # the trace that is there
    anew = CliRunner().invoke(main, ["place", str(bundle), *map(str, bound)])
    assert anew.exit_code == 0, anew.output
    assert json.loads(anew.stdout)["costs"] != document["costs"]
    monkeypatch.setattr(exit_costs, "measured_costs", None)
    with Runner.open(bundle) as runner, pytest.raises(TypeError):  # other threads, other costs
        cached_costs(bundle, runner, [], 1, print)


@pytest.mark.parametrize("left", [b"", b"[]", b'{"costs": {"segments_ms": [1]}}', b'{"num_rows": 3}'])
def test_kept_costs_that_cannot_be_read_are_measured_again(bundle: Path, left: bytes) -> None:
    assert place(bundle, "--dry-run").exit_code == 0
    (path,) = reference_path(bundle).glob("exit-costs/*.json")
    path.write_bytes(left)
    result = place(bundle, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["costs"] == json.loads(result.stdout)["costs"]


def test_what_is_printed_says_what_each_exit_saves_and_costs(bundle: Path) -> None:
    result = place(bundle, "--dry-run", "--exit-ms", 0)
    assert result.exit_code == 0, result.output
    assert "  no early exit" in result.stdout
    assert all(f"exit {k}: " in result.stdout for k in range(NUM_EXITS - 1))
    assert "best for every number of early exits:" in result.stdout
    assert "costs add up" not in result.stdout, "they were given"
    assert not bundle.with_name("placed").exists()
    trace = load_trace(next(reference_path(bundle).glob("traces/*.npz")))
    assert trace.files == tuple(segment.graphs["fp32"].sha256 for segment in load_manifest(bundle).segments)


def test_a_free_exit_stays_and_a_dear_one_goes(bundle: Path) -> None:
    free = json.loads(place(bundle, "--dry-run", "--exit-ms", 0, "--json").stdout)
    assert free["expected_ms"] <= free["all_exits_ms"]
    assert json.loads(place(bundle, "--dry-run", "--keep", "none", "--exit-ms", 0, "--json").stdout)["kept"] == [3]
    dear = json.loads(place(bundle, "--dry-run", "--exit-ms", 1e-9 + free["no_exits_ms"] / 4, "--json").stdout)
    assert len(dear["kept"]) <= len(free["kept"])


def test_what_cannot_be_is_refused_before_anything_is_written(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refusals = {
        "pass -o PLACED": (),
        "cannot take the place": ("-o", bundle),
        "is not a bundle": ("-o", tmp_path / "file"),
        "--keep: got 'first'": ("--dry-run", "--keep", "first"),
        "--keep: got [4]": ("--dry-run", "--keep", "4", "--exit-ms", 0),
        "--exit-ms: got -1.0": ("--dry-run", "--exit-ms", -1),
        "--exit-ms: got 1000.0 for each of 3 exits": ("--dry-run", "--exit-ms", 1000),
        "times the uncut model already": ("--dry-run", "--exit-ms", 0, "--max-worst-case", 0.1),
        "could be certified": ("--dry-run", "--exit-ms", 0, "--max-risk", 0.001),
    }
    for message, arguments in refusals.items():
        result = place(bundle, *arguments)
        assert result.exit_code in (1, 2)
        assert message in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.reference", "data.npz", "file"]
    (reference_path(bundle) / "whole.onnx").unlink()
    assert isinstance(place(bundle, "-o", tmp_path / "new", "--exit-ms", 0).exception, SystemExit)
    assert not (tmp_path / "new").exists()


def test_conditions_that_count_exits_are_named_when_they_are_left_out(bundle: Path) -> None:
    policy = Policy(patience=2, veto=Veto(margin=0.1), temperatures=(1.0, 2.0, 1.0, 1.0))
    replace_policy(bundle, policy.to_json().encode())
    document = json.loads(place(bundle, "--dry-run", "--exit-ms", 0, "--keep", "1", "--json").stdout)
    assert document["left_out"] == ["patience", "a veto"]
    assert document["policy"]["temperatures"] == [2.0, 1.0]


def test_costs_are_differences_row_by_row_and_never_negative() -> None:
    times = {
        "all": np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [1.0, 3.0, 3.0]]),
        "without 0": np.array([[2.5, 3.0], [5.0, 6.0], [3.0, 3.0]]),  # saves 0.5, 1, 1
        "without 1": np.array([[1.0, 5.5], [2.0, 11.0], [1.0, 6.5]]),  # saves -0.5, -1, -0.5
        "none": np.array([[5.0], [10.0], [6.0]]),
        "uncut": np.array([[4.0], [9.0], [5.0]]),
    }
    measured = exit_costs._costs_from_times(times, is_lowered=False)
    assert measured.costs.segments_ms == (1.0, 3.0, 3.0)
    assert measured.costs.exits_ms == (1.0, 0.0)
    assert (measured.costs.uncut_ms, measured.no_exits_ms, measured.num_rows) == (5.0, 6.0, 3)
    assert measured.residual == 0.0
    lowered = exit_costs._costs_from_times({**times, "fp32": times["all"], "all": times["all"] / 2}, is_lowered=True)
    assert lowered.costs.segments_ms == (0.5, 1.5, 1.5)
    assert lowered.costs.exits_ms == (1.0, 0.0)
    assert lowered.costs.worst_case(()) == 1.0, "nothing else to compare with in that precision"


def test_the_fastest_of_several_rounds_counts() -> None:
    taken = iter([0.5] * 8 + [3.0, 30.0, 2.0, 20.0, 4.0, 40.0])  # eight rounds go uncounted
    times = exit_costs._interleaved({"one": lambda inputs: [next(taken)], "two": lambda inputs: [1.0]}, [{}, {}])
    assert times["one"].tolist() == [[2.0], [20.0]]
    assert times["two"].tolist() == [[1.0], [1.0]]


def test_all_batches_of_an_export_are_kept_for_the_next_cut(exported: Path, bundle: Path) -> None:
    manifest = load_manifest(bundle)
    whole = four_exits()
    source = source_from_bundle(bundle, manifest, whole)
    assert source.exits == EXITS
    assert with_exits(source, (0, 3)).exits == (EXITS[0], EXITS[3])
    several = tuple({"x": np.full((k, WIDTH), k, np.float32)} for k in (2, 3, 12))
    export_bundle(replace(source, calibration=several), bundle, ExportOptions("fp32"))
    kept = calibration_batches(bundle)
    assert [batch["x"].shape for batch in kept] == [(2, WIDTH), (3, WIDTH), (12, WIDTH)]
    np.testing.assert_array_equal(kept[2]["x"], several[2]["x"])
    (reference_path(bundle) / "calibration.npz").unlink()  # as an older offramp left it
    assert len(calibration_batches(bundle)) == 1
    (reference_path(bundle) / "inputs.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="export the bundle again"):
        calibration_batches(bundle)
