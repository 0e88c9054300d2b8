"""The alternatives that the runner is compared with do what they are said to do, on a tiny encoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from offramp.commands.uncut import load_reference
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.onnxruntime_engine import open_session
from offramp.trace import Trace

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # scripts there import each other by name

import alternatives as alternatives_of_bench  # noqa: E402
import eager  # noqa: E402
import frontier  # noqa: E402
import ideal  # noqa: E402
from if_graph import if_graph  # noqa: E402
from poisson import one_at_a_time, play  # noqa: E402
from subject import Subject, batch_of, rows_of, tiny_subject  # noqa: E402

TEMPERATURES = (1.5, 0.8, 1.25)
POLICIES = {
    "both exits open": ("max_prob", (0.7, 0.6)),
    "first exit closed": ("max_prob", (None, 0.7)),
    "second exit closed": ("margin", (0.3, None)),
    "by entropy": ("entropy", (0.8, 0.9)),
    "everybody leaves first": ("max_prob", (0.0, 0.0)),
    "full depth": ("max_prob", ()),
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return tiny_subject(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runner(subject: Subject) -> Iterator[Runner]:
    with Runner.open(subject.bundle, "onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def trace(subject: Subject, runner: Runner) -> Trace:
    return runner.record(subject.test.batches, subject.test.labels)


def policy_of(name: str) -> Policy:
    score, limits = POLICIES[name]
    return Policy.thresholds(score, limits, TEMPERATURES)


def answered(answer: Any, requests: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    prediction, exit_index = zip(*[answer(inputs) for inputs in requests], strict=True)
    return np.concatenate(prediction), np.concatenate(exit_index)


@pytest.mark.parametrize("name", POLICIES)
def test_a_graph_of_ifs_answers_a_row_as_the_runner_does(subject: Subject, runner: Runner, name: str) -> None:
    runner.policy = policy = policy_of(name)
    exits = [spec.name for spec in subject.manifest.exits]
    model = if_graph(load_reference(subject.bundle, subject.manifest), exits, 2, policy)
    session = open_session(model.SerializeToString(), 1, "ifs")
    seen = set()
    for inputs in subject.requests(1):
        logits, exit_index = session.run(None, inputs)
        expected = runner.run(inputs)
        assert exit_index == expected.exit_index[0]
        np.testing.assert_array_equal(logits, expected.outputs["logits"])
        seen.add(int(exit_index))
    assert seen == {"full depth": {2}, "everybody leaves first": {0}}.get(name, seen)
    assert len(seen) > 1 or name in ("full depth", "everybody leaves first"), "rows leave at different exits"


def test_a_graph_of_ifs_holds_every_weight_once(subject: Subject) -> None:
    whole = load_reference(subject.bundle, subject.manifest)
    exits = [spec.name for spec in subject.manifest.exits]
    model = if_graph(whole, exits, 2, policy_of("both exits open"))
    assert abs(model.ByteSize() - whole.ByteSize()) < 0.1 * whole.ByteSize()
    assert sum(node.op_type == "If" for node in model.graph.node) == 1


@pytest.mark.parametrize("config", [EncoderConfig(), EncoderConfig(exits=(1, 3), pooling="cls", early_pooling="mean")])
def test_the_eager_loop_is_the_model(config: EncoderConfig) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 6}
    model = EarlyExitEncoder(BertModel(BertConfig(vocab_size=50, **sizes), add_pooling_layer=False), config).eval()
    ids, mask = torch.arange(24).reshape(2, 12), (torch.arange(12) < torch.tensor([[12], [7]])).long()
    with torch.inference_mode():
        expected = model(ids, mask)
        for said, logits in zip(eager.exits_of(model, ids, mask), expected, strict=True):
            assert torch.equal(said, logits)
        assert torch.equal(eager.Uncut(model)(ids, mask), expected[-1])


@pytest.mark.parametrize("name", POLICIES)
def test_eager_rows_leave_where_the_runner_lets_them_go(subject: Subject, trace: Trace, name: str) -> None:
    policy = policy_of(name)
    expected, near = alternatives_of_bench.expected_exits(policy, trace, [])
    requests = subject.requests(5)  # the last one is shorter
    prediction, exit_index = answered(eager.row_by_row(subject.model, policy), requests)
    np.testing.assert_array_equal(exit_index[~near], expected[~near])
    np.testing.assert_array_equal(prediction[~near], trace.predictions[np.arange(len(expected)), expected][~near])
    assert near.mean() < 0.2


@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_that_leaves_together_waits_for_its_least_sure_row(subject: Subject, runner: Runner, name: str) -> None:
    runner.policy = policy = policy_of(name)
    for inputs in subject.requests(4):
        _, exit_index = eager.leave_together(subject.model, policy)(inputs)
        assert len(set(exit_index.tolist())) == 1
        assert exit_index[0] >= runner.run(inputs).exit_index.max() or policy.score == "entropy"


def test_whoever_answers_otherwise_than_the_policy_is_refused(subject: Subject, trace: Trace) -> None:
    policy, other = policy_of("both exits open"), policy_of("full depth")
    requests = subject.requests(8)
    for rule, answer in {
        alternatives_of_bench.PER_ROW: eager.row_by_row(subject.model, other),
        alternatives_of_bench.TOGETHER: eager.row_by_row(subject.model, policy),
        alternatives_of_bench.FINAL_EXIT: lambda inputs: (
            1 - runner_like(subject, inputs),
            np.full(len(inputs["input_ids"]), 2),
        ),
    }.items():
        wrong = alternatives_of_bench.Alternative("wrong", rule, answer)
        with pytest.raises(SystemExit, match="not answered as the policy says"):
            alternatives_of_bench.check(wrong, policy, trace, requests, print)
    right = replace(
        wrong, rule=alternatives_of_bench.PER_ROW, answer=eager.row_by_row(subject.model, policy), name="right"
    )
    accuracy = alternatives_of_bench.check(right, policy, trace, requests, print)
    assert 0 < accuracy < 1


def runner_like(subject: Subject, inputs: Any) -> np.ndarray:
    return eager.uncut(eager.Uncut(subject.model), 2)(inputs)[0]


def test_rows_apart_and_together_are_the_same_rows(subject: Subject) -> None:
    batch = subject.test.batches[0]
    together = batch_of(rows_of(batch))
    longest = together["input_ids"].shape[1]
    for name, array in together.items():
        np.testing.assert_array_equal(array, batch[name][:, :longest])
    assert not batch["attention_mask"][:, longest:].any()


def test_the_ideal_runs_every_segment_on_the_rows_that_reach_it(
    subject: Subject, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.policy = policy_of("both exits open")
    sizes: list[tuple[int, int]] = []

    class Watched:
        def __init__(self, engine: Any, index: int) -> None:
            self.engine, self.index = engine, index

        def __getattr__(self, name: str) -> Any:
            return getattr(self.engine, name)

        def run(self, carry: Any, rows: np.ndarray, *more: Any) -> Any:
            sizes.append((self.index, len(rows)))
            return self.engine.run(carry, rows, *more)

    inputs = subject.requests(32)[0]
    exit_index = runner.run(inputs).exit_index
    monkeypatch.setattr(runner, "engines", tuple(Watched(e, k) for k, e in enumerate(runner.engines)))
    calls, depth = ideal.standalone_calls(runner, inputs)
    sizes.clear()
    for call in calls:
        call()
    reaching = [(k, int((exit_index >= k).sum())) for k in range(3)]
    assert sizes == [(k, max(1, count)) for k, count in reaching]
    assert depth == sum(count > 0 for _, count in reaching)


def test_every_request_of_a_stream_is_answered(runner: Runner, subject: Subject) -> None:
    requests = subject.requests(1)[:20]
    with one_at_a_time(alternatives_of_bench.runner_answer(runner)) as submit:
        latencies_ms, refused = play(submit, requests, np.linspace(0, 0.02, 20))
    assert (len(latencies_ms), refused) == (20, 0)
    assert (latencies_ms > 0).all()


POINTS = [
    frontier.Point("uncut", 9.0, 0.84),
    frontier.Point("cut after exit 0", 3.0, 0.74),
    frontier.Point("offramp", 8.0, 0.84, 0.0),
    frontier.Point("offramp", 6.0, 0.83, 0.005),
    frontier.Point("offramp", 4.0, 0.79, 0.02),
]


def test_accuracy_at_a_time_lies_on_the_curve() -> None:
    assert frontier.accuracy_at(POINTS, "offramp", 5.0) == pytest.approx(0.81)
    assert frontier.accuracy_at(POINTS, "offramp", 6.0) == 0.83
    assert frontier.accuracy_at(POINTS, "offramp", 3.0) is None
    assert frontier.accuracy_at(POINTS, "offramp INT8", 5.0) is None


def test_the_same_points_make_the_same_picture(tmp_path: Path) -> None:
    for name in ("first.svg", "second.svg"):
        frontier.draw_frontier(POINTS, tmp_path / name, "a title", 1000)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
