"""Verify, inspect and build-engine for a decoder: its separate heads are parts like its segments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from offramp.bundle import load_manifest, read_file
from offramp.cli import main
from offramp.commands.verification import verify_bundle
from offramp.errors import ParityError, VersionError
from offramp.plan import check_plan_header
from tests import decoders


@pytest.fixture
def bundle(decoder_bundle: Path, tmp_path: Path) -> Path:
    for name in (decoder_bundle.name, f"{decoder_bundle.name}.reference"):
        shutil.copytree(decoder_bundle.parent / name, tmp_path / name)
    return tmp_path / decoder_bundle.name


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_segments_and_heads_get_plans_that_are_found_again_and_shown(bundle: Path) -> None:
    shapes = ["--max-shapes", f"input_ids:4x{decoders.CHUNK}"]
    done = run("build-engine", bundle, "--precision", "fp32", *shapes, "--json")
    assert done.exit_code == 0, done.output
    builds = json.loads(done.stdout)["segments"]
    assert [build["name"] for build in builds] == ["segment 0", "segment 1", "segment 2", "head_0"]
    assert builds[3]["profile"]["hidden"] == [[1, 48], [1, 48], [4 * decoders.CHUNK, 48]]
    manifest = load_manifest(bundle)
    for part, build in zip(manifest.parts, builds, strict=True):
        (plan,) = part.plans
        check_plan_header(read_file(bundle, plan.file), plan)
        assert plan.file.path == build["path"]
    assert builds[3]["path"].startswith("heads/00/plans/")
    again = run("build-engine", bundle, "--precision", "fp32", *shapes, "--json")
    assert {build["action"] for build in json.loads(again.stdout)["segments"]} == {"reuse"}
    shown = run("inspect", bundle).output
    assert shown.count("plan fp32: ") == 4
    assert "head_0: of hidden states (rows, 48)\n  graph fp32: heads/00/model.onnx" in shown
    assert "keeps 2 states, key_0 float32 (rows, 2, chunk, 8)" in shown
    (bundle / manifest.heads[0].graphs["fp32"].path).write_bytes(b"other")
    for command in ("inspect", "verify"):
        assert "heads/00/model.onnx is not the file that was exported" in run(command, bundle).output


def test_a_decoder_is_verified_against_its_whole_graph(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parity = verify_bundle(bundle)
    assert (parity.rows, parity.chain_bit_equal) == (4, True)
    import offramp.export.verify_decoder as module

    run_head = module.run_head

    def wrong(session, hidden):
        return run_head(session, hidden) + 1

    monkeypatch.setattr(module, "run_head", wrong)
    with pytest.raises(ParityError, match="logits of exit logits_"):
        verify_bundle(bundle)


def test_a_decoder_of_schema_3_whose_heads_had_scores_is_refused(bundle: Path) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(document | {"schema": 3}))
    with pytest.raises(VersionError, match="schema 3, whose heads were other graphs; export the bundle again"):
        load_manifest(bundle)


def test_a_head_that_is_a_product_is_nothing_else(bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(bundle / load_manifest(bundle).heads[0].graphs["fp32"].path).graph
    assert {node.op_type for node in graph.node} <= {"Transpose", "MatMul"}
    assert [value.name for value in (*graph.input, *graph.output)] == ["hidden", "logits"]
