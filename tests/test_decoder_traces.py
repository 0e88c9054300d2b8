"""From a decoder's trace to thresholds per token, as a user does it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from offramp.cli import main
from offramp.errors import DataError
from offramp.policy import Policy
from offramp.runtime.record_texts import TokenCosts
from offramp.runtime.scorer import Scorer
from offramp.trace import load_trace
from offramp.tuning.diagnostics import diagnose
from offramp.tuning.replay import replay
from tests import decoders

TEXTS = np.array([[(5 * n + 3 * at * at + 11) % decoders.VOCABULARY for at in range(30)] for n in range(8)])


@pytest.fixture(scope="module")
def traced(decoder_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a trace beside it, and the texts in a file."""
    folder = tmp_path_factory.mktemp("traced")
    shutil.copytree(decoder_bundle, folder / "bundle")
    np.savez(folder / "texts.npz", input_ids=TEXTS)
    done = run("trace", folder / "bundle", "--data", folder / "texts.npz", "--threads", 1)
    assert done["rows"] == done["labelled"] == TEXTS[:, 1:].size
    return folder


def run(*arguments: object) -> dict:
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_its_rows_are_tokens_and_what_came_is_their_label(traced: Path) -> None:
    trace = load_trace(traced / "bundle.reference" / "traces" / "onnxruntime-fp32.npz")
    np.testing.assert_array_equal(trace.labels, TEXTS[:, 1:].ravel())
    assert (trace.has_logits, trace.has_learned) == (False, (True, True, False))
    assert (trace.costs_ms > 0).all()
    with pytest.raises(DataError, match="a trace without logits"):
        diagnose(trace)


def test_replay_is_what_scoring_does_where_nothing_was_skipped_before(traced: Path) -> None:
    """Below the first exit nothing is skipped, so a policy that opens it alone decides on what the trace saw."""
    trace = load_trace(traced / "bundle.reference" / "traces" / "onnxruntime-fp32.npz")
    for policy in (Policy.thresholds("learned", [0.5, None]), Policy.thresholds("max_prob", [0.15, None])):
        with Scorer.open(traced / "bundle", policy, threads=1) as scorer:
            live = np.concatenate([text.exit_index for text in scorer.score(TEXTS.tolist())])
        np.testing.assert_array_equal(replay(policy, trace).exit_index, live)
        assert {0, 2} == set(live.tolist())


@pytest.mark.parametrize("score", ["learned", "max_prob"])
def test_calibrate_meets_a_speedup_with_one_threshold(traced: Path, score: str) -> None:
    found = run("calibrate", traced / "bundle", "--target-speedup", "1.3", "--score", score)
    assert found["expected_speedup"] >= 1.3
    first, second = found["policy"]["thresholds"]
    assert first == second
    trace = load_trace(traced / "bundle.reference" / "traces" / "onnxruntime-fp32.npz")
    stricter = Policy.thresholds(score, [first + 0.02] * 2)
    costs = np.cumsum(trace.costs_ms)
    assert costs[-1] / costs[replay(stricter, trace).exit_index].mean() < found["expected_speedup"]
    scored = run("score", traced / "bundle", "--data", traced / "texts.npz", "--threads", 1)
    assert scored["mean_depth"] < 3  # the bundle's policy now


def test_tokens_of_a_text_are_no_independent_rows(traced: Path) -> None:
    done = CliRunner().invoke(main, ["calibrate", str(traced / "bundle")])
    assert done.exit_code == 2
    assert "use --max-drop" in done.output
    assert "--backend tensorrt: a decoder runs on onnxruntime" in (
        CliRunner().invoke(main, ["trace", str(traced / "bundle"), "--backend", "tensorrt"]).output
    )


def test_with_gates_a_token_pays_for_one_head_and_without_for_one_at_every_exit() -> None:
    costs = TokenCosts(np.array([5.0, 4.0, 9.0]), np.array([3.0, 3.0, 3.0]))
    assert costs.by_exit(True).tolist() == [8, 4, 9]
    assert costs.by_exit(False).tolist() == [8, 7, 12]
