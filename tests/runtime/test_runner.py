"""The runner: compaction against a slow row-by-row reference, and the properties that must always hold."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from policies import Said, lets_go, random_policies

from offramp.bundle import SCORES, ExitSpec
from offramp.errors import BundleError, OptionError
from offramp.policy import FINAL, Policy, Veto
from offramp.runtime import FakeEngine, Result, Runner, SegmentOutput, fake_runner
from offramp.runtime.fake import MAX_ROWS, X, fake_manifest
from offramp.tuning.replay import replay

NUM_EARLY = tiny.NUM_SEGMENTS - 1

token_lists = st.lists(
    st.lists(st.integers(0, tiny.NUM_TOKENS - 1), min_size=1, max_size=tiny.MAX_LENGTH),
    max_size=2 * tiny.MAX_ROWS + 3,
)
policies = random_policies(tiny.NUM_SEGMENTS)
property_test = settings(max_examples=60, deadline=None)


def answer_row_by_row(runner: Runner, inputs: tiny.Inputs, policy: Policy) -> Result:
    """Slow and obvious: every row alone, one segment after the other until it may leave."""
    num_rows, column = len(inputs["ids"]), SCORES.index(policy.score)
    inverse = policy.inverse_temperatures(tiny.NUM_SEGMENTS)
    logits = np.empty((num_rows, tiny.NUM_CLASSES), np.float32)
    result = Result({"logits": logits}, *np.zeros((2, num_rows), np.int64), np.zeros(num_rows, np.float32), [])
    for row in range(num_rows):
        carry: object = {name: array[row : row + 1] for name, array in inputs.items()}
        heard: list[Said] = []
        state = None
        for k, engine in enumerate(runner.engines):
            out = engine.run(carry, np.array([0]), inverse[k])
            carry = out.carry
            heard.append(Said(out.logits, out.prediction, out.scores))
            may_leave = k < NUM_EARLY and lets_go(policy, heard, tiny.NUM_SEGMENTS)
            _, reason, state = policy.decide(k, out, state) if k < NUM_EARLY else (None, FINAL, None)
            if may_leave or k == NUM_EARLY:
                break
        logits[row], result.prediction[row], result.exit_index[row] = out.logits[0], out.prediction[0], k
        result.score[row] = out.scores[0, column]
        result.reason.append(reason if may_leave else FINAL)
    return result


@given(tokens=token_lists, policy=policies)
@property_test
def test_compaction_answers_as_row_by_row(shared_runner: Runner, tokens: list[list[int]], policy: Policy) -> None:
    shared_runner.policy = policy
    inputs = tiny.request(tokens)
    tiny.assert_same(shared_runner.run(inputs), answer_row_by_row(shared_runner, inputs, policy))


@given(tokens=token_lists, policy=policies, data=st.data())
@property_test
def test_a_row_depends_on_itself_alone(
    shared_runner: Runner, tokens: list[list[int]], policy: Policy, data: st.DataObject
) -> None:
    """Another order, another split into batches, more padding: the same bits."""
    shared_runner.policy = policy
    whole = shared_runner.run(tiny.request(tokens))
    order = data.draw(st.permutations(range(len(tokens))))
    split = data.draw(st.integers(0, len(tokens)))
    for part in (order[:split], order[split:]):
        result = shared_runner.run(tiny.request([tokens[row] for row in part], width=tiny.MAX_LENGTH))
        np.testing.assert_array_equal(result.outputs["logits"], whole.outputs["logits"][part])
        np.testing.assert_array_equal(result.prediction, whole.prediction[part])
        np.testing.assert_array_equal(result.exit_index, whole.exit_index[part])
        np.testing.assert_array_equal(result.score, whole.score[part])
        assert result.reason == [whole.reason[row] for row in part]


@given(tokens=token_lists, policy=policies, exit_index=st.integers(0, NUM_EARLY - 1), by=st.floats(0, 1))
@property_test
def test_a_stricter_threshold_never_makes_a_row_leave_earlier(
    shared_runner: Runner, tokens: list[list[int]], policy: Policy, exit_index: int, by: float
) -> None:
    assume(policy.limits)
    old = policy.limits[exit_index]
    stricter = None if old is None else max(old - by, 0) if policy.score == "entropy" else min(old + by, 1)
    inputs = tiny.request(tokens)
    shared_runner.policy = policy
    before = shared_runner.run(inputs).exit_index
    raised = (*policy.limits[:exit_index], stricter, *policy.limits[exit_index + 1 :])
    shared_runner.policy = replace(policy, limits=raised)
    assert (shared_runner.run(inputs).exit_index >= before).all()


@given(tokens=token_lists.filter(len), policy=policies)
@property_test
def test_replay_on_a_trace_decides_as_live(shared_runner: Runner, tokens: list[list[int]], policy: Policy) -> None:
    inputs = tiny.request(tokens)
    trace = shared_runner.record([inputs], temperatures=policy.temperatures)
    shared_runner.policy = policy
    live = shared_runner.run(inputs)
    replayed = replay(policy, trace)
    rows = np.arange(len(tokens))
    np.testing.assert_array_equal(live.exit_index, replayed.exit_index)
    np.testing.assert_array_equal(live.prediction, replayed.prediction)
    assert live.reason == replayed.reason.tolist()
    np.testing.assert_array_equal(live.outputs["logits"], trace.logits[rows, live.exit_index])
    np.testing.assert_array_equal(live.score, trace.scores[rows, live.exit_index, SCORES.index(policy.score)])


@pytest.mark.parametrize("policy", [Policy.full_depth(), Policy.thresholds("margin", [None, None])])
@pytest.mark.parametrize("num_rows", [1, tiny.MAX_ROWS, 3 * tiny.MAX_ROWS + 1])
def test_all_exits_closed_is_the_whole_model(shared_runner: Runner, policy: Policy, num_rows: int) -> None:
    shared_runner.policy = policy
    inputs = tiny.request(tiny.sentences(num_rows))
    result = shared_runner.run(inputs)
    np.testing.assert_array_equal(result.outputs["logits"], tiny.reference_logits(inputs, NUM_EARLY))
    assert result.exit_index.tolist() == [NUM_EARLY] * num_rows
    assert result.reason == [FINAL] * num_rows


def test_a_request_is_answered_under_the_policy_of_its_source(shared_runner: Runner) -> None:
    inputs = tiny.request(tiny.sentences(5))
    first = Policy.thresholds("max_prob", [0.0] * NUM_EARLY)
    shared_runner.policy = replace(first, sources={"bank": Policy.full_depth()})
    assert shared_runner.run(inputs).exit_index.tolist() == [0] * 5
    assert shared_runner.run(inputs, source="shop").exit_index.tolist() == [0] * 5
    assert shared_runner.run(inputs, source="bank").exit_index.tolist() == [NUM_EARLY] * 5


def test_many_threads_on_one_runner_get_their_own_answers(shared_runner: Runner) -> None:
    shared_runner.policy = Policy("margin", (0.1,) * NUM_EARLY, veto=Veto(mean=True))
    requests = [tiny.request(tiny.sentences(120)[n : n + 1 + n % 7]) for n in range(96)]
    expected = [shared_runner.run(request) for request in requests]
    with ThreadPoolExecutor(32) as threads:
        for got, alone in zip(threads.map(shared_runner.run, requests), expected, strict=True):
            tiny.assert_same(got, alone)


def test_no_rows_is_an_empty_answer(shared_runner: Runner) -> None:
    result = shared_runner.run(tiny.request([]))
    assert result.outputs["logits"].shape == (0, tiny.NUM_CLASSES)
    assert [a.dtype for a in (result.outputs["logits"], result.score)] == [np.float32] * 2
    assert [a.dtype for a in (result.prediction, result.exit_index)] == [np.int64] * 2
    assert [a.shape for a in (result.prediction, result.exit_index, result.score)] == [(0,)] * 3
    assert result.reason == []


def test_the_test_policies_do_use_every_exit(shared_runner: Runner) -> None:
    """Guards the tests above: on these sentences no exit is idle."""
    shared_runner.policy = Policy.thresholds("max_prob", [0.95, 0.95])
    exits = shared_runner.run(tiny.request(tiny.sentences(60))).exit_index
    assert set(exits.tolist()) == {0, 1, 2}


def test_only_survivors_reach_the_next_engine() -> None:
    def sure_of_positive(inputs: dict[str, np.ndarray]) -> np.ndarray:
        return np.stack([np.zeros_like(inputs["x"]), 10 * inputs["x"]], axis=1)

    runner = fake_runner([sure_of_positive, 0.6, 0.9], Policy.thresholds("max_prob", [0.9, 0.9]))
    result = runner.run({"x": np.array([1, 0, 0.5, 0, 1], np.float32)})
    assert result.exit_index.tolist() == [0, 2, 0, 2, 0]
    assert result.reason == ["max_prob", "final", "max_prob", "final", "max_prob"]
    assert result.prediction.tolist() == [1, 0, 1, 0, 1]
    rows = [[call.rows.tolist() for call in engine.calls] for engine in runner.engines]
    assert rows == [[[0, 1, 2, 3, 4]], [[1, 3]], [[0, 1]]]


def test_segments_without_rows_are_skipped() -> None:
    runner = fake_runner([0.95, 0.6, 0.6], Policy.thresholds("max_prob", [0.9, 0.9]))
    assert runner.run({"x": np.zeros(4, np.float32)}).exit_index.tolist() == [0, 0, 0, 0]
    assert [len(engine.calls) for engine in runner.engines] == [1, 0, 0]


def test_more_rows_than_the_maximum_are_split() -> None:
    runner = fake_runner([0.6, 0.6])
    runner.run({"x": np.zeros(2 * MAX_ROWS + 6, np.float32)})
    assert [[len(call.rows) for call in engine.calls] for engine in runner.engines] == [[MAX_ROWS, MAX_ROWS, 6]] * 2


def test_temperatures_reach_their_segments() -> None:
    runner = fake_runner([0.6, 0.6], Policy(temperatures=(2.0, 0.5)))
    runner.run({"x": np.zeros(1, np.float32)})
    assert [engine.calls[0].inverse_temperature for engine in runner.engines] == [0.5, 2.0]


def test_the_policy_of_a_live_runner_can_be_swapped(shared_runner: Runner) -> None:
    inputs = tiny.request(tiny.sentences(9))
    shared_runner.policy = Policy.full_depth()
    assert set(shared_runner.run(inputs).exit_index.tolist()) == {NUM_EARLY}
    shared_runner.policy = Policy.thresholds("entropy", [1.0, 1.0])
    result = shared_runner.run(inputs)
    assert set(result.exit_index.tolist()) == {0}
    assert set(result.reason) == {"entropy"}
    with pytest.raises(OptionError, match="expected 2, one per exit before the final one"):
        shared_runner.policy = Policy.thresholds("entropy", [1.0])
    assert shared_runner.policy == Policy.thresholds("entropy", [1.0, 1.0])  # the refused one left no trace


def test_a_request_finishes_under_the_policy_it_began_with() -> None:
    runner = fake_runner([0.6, 0.6], Policy.full_depth())

    class Swapping(FakeEngine):
        def run(self, carry: object, rows: np.ndarray, inverse_temperature: np.float32) -> SegmentOutput:
            runner.policy = Policy.thresholds("max_prob", [0.0])
            return super().run(carry, rows, inverse_temperature)

    first = Swapping(lambda inputs: np.zeros((len(inputs["x"]), 2)))
    runner.engines = (first, *runner.engines[1:])
    inputs = {"x": np.zeros(40, np.float32)}  # two chunks
    assert set(runner.run(inputs).exit_index.tolist()) == {1}
    assert set(runner.run(inputs).exit_index.tolist()) == {0}


def test_closing_closes_the_engines_once() -> None:
    with fake_runner([0.6, 0.6]) as runner:
        assert runner.run({"x": np.zeros(1, np.float32)}).exit_index.tolist() == [1]
    runner.close()
    assert all(engine.is_closed for engine in runner.engines)
    with pytest.raises(OptionError, match="closed"):
        runner.run({"x": np.zeros(1, np.float32)})
    with pytest.raises(OptionError, match="closed"):
        runner.record([])


def test_engines_that_do_not_fit_the_manifest_are_refused() -> None:
    manifest = fake_manifest(2, 2, (X,))
    engine = FakeEngine(lambda inputs: np.zeros((len(inputs["x"]), 2)))
    with pytest.raises(OptionError, match="got 1 engines, the manifest has 2 segments"):
        Runner([engine], manifest, Policy())
    unequal = replace(manifest, exits=(ExitSpec("a", 2), ExitSpec("b", 3)))
    with pytest.raises(BundleError, match=r"\[2, 3\] classes"):
        Runner([engine, engine], unequal, Policy())


def test_the_bundle_s_own_policy_is_the_default(tmp_path: Path) -> None:
    own = Policy.thresholds("margin", [0.5, None], [1.0, 2.0, 1.0])
    tiny.make_bundle(tmp_path, own)
    with Runner.open(tmp_path) as runner:
        assert runner.policy == own
        assert (runner.backend, runner.precision) == ("onnxruntime", "fp32")
    with Runner.open(str(tmp_path), policy=Policy.full_depth(), backend="onnxruntime") as runner:
        assert runner.policy == Policy.full_depth()
