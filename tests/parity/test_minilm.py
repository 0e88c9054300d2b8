"""Parity on the real MiniLM-L6 and real sentences: what must always hold (DESIGN), shown on ONNX Runtime's CPU.

"The same" means the same bits. Tolerances: docs/tolerances.md.
"""

from __future__ import annotations

import numpy as np
import pytest
from minilm import (
    TEMPERATURES,
    MiniLM,
    answer_row_by_row,
    batches_of,
    choose,
    everyone_leaves_at,
    inputs_from_ids,
    thresholds_near,
)

from offramp.policy import Policy
from offramp.runtime import Result, Runner
from offramp.trace import Trace
from offramp.tuning.replay import replay

NUM_EXITS = 3
# The score head's float32 softmax against numpy's (tuning.replay), over all sentences here.
SCORE_ATOL = 1e-6
# ONNX Runtime with all its fusions against the runtime, which leaves one out; logits.
FUSION_ATOL = 2e-6
FP16_ATOL = 1e-3  # logits of all exits, end to end
FP16_FLIPS = 0.02  # share of rows whose prediction or exit may change
INT8_RMS = 0.25  # of the difference ÷ of the logits, each exit


def assert_same_rows(got: Result, expected: Result, rows: object = slice(None)) -> None:
    """`got` is the answer to the rows `rows` of the request that `expected` answers; decisions are equal always."""
    np.testing.assert_array_equal(got.exit_index, expected.exit_index[rows])
    np.testing.assert_array_equal(got.prediction, expected.prediction[rows])
    assert got.reason == np.array(expected.reason)[rows].tolist()
    np.testing.assert_array_equal(got.outputs["logits"], expected.outputs["logits"][rows])
    np.testing.assert_array_equal(got.score, expected.score[rows])


@pytest.mark.parametrize("length", [4, 7, 24, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_chain_is_the_whole_graph_bit_for_bit_at_every_exit(
    minilm: MiniLM, runner: Runner, rows: int, length: int
) -> None:
    inputs = minilm.passage(rows, length)
    for exit_index, logits in enumerate(minilm.logits(inputs)):
        runner.policy = everyone_leaves_at(exit_index, NUM_EXITS)
        result = runner.run(inputs)
        assert (result.exit_index == exit_index).all()
        np.testing.assert_array_equal(result.outputs["logits"], logits)
        np.testing.assert_array_equal(result.prediction, logits.argmax(1))


def test_a_session_with_all_optimisations_says_the_same_to_the_last_digit(minilm: MiniLM, runner: Runner) -> None:
    runner.policy = Policy.full_depth()
    inputs = batches_of(minilm.sentences)[0]
    usual = minilm.usual.run(None, inputs)[-1]
    np.testing.assert_allclose(runner.run(inputs).outputs["logits"], usual, rtol=0, atol=FUSION_ATOL)


def test_full_depth_is_the_final_exit(minilm: MiniLM, runner: Runner) -> None:
    inputs = inputs_from_ids(minilm.sentences[:40])  # more rows than the bundle takes at once
    runner.policy = Policy.full_depth()
    np.testing.assert_array_equal(runner.run(inputs).outputs["logits"], minilm.logits(inputs)[-1])


@pytest.mark.parametrize("batch", [1, 5, 32])
def test_order_and_split_of_a_batch_change_no_bit(minilm: MiniLM, runner: Runner, trace: Trace, batch: int) -> None:
    runner.policy = thresholds_near(trace, "max_prob", [0.6, 0.5])
    inputs = inputs_from_ids(minilm.sentences[:32])
    together = runner.run(inputs)
    assert np.bincount(together.exit_index, minlength=NUM_EXITS).min() > 0, "rows leave at every exit"
    order = np.random.default_rng(batch).permutation(32)
    for start in range(0, 32, batch):
        rows = order[start : start + batch]
        assert_same_rows(runner.run(choose(inputs, rows)), together, rows)


@pytest.mark.parametrize("width", [40, 63, 64, 101, 128])
def test_padding_changes_no_bit(minilm: MiniLM, runner: Runner, trace: Trace, width: int) -> None:
    runner.policy = thresholds_near(trace, "max_prob", [0.6, 0.5])
    sentences = [ids for ids in minilm.sentences if len(ids) < 40][:32]
    padded = runner.run(inputs_from_ids(sentences, width))
    for row, ids in enumerate(sentences):
        alone = runner.run(inputs_from_ids([ids]))
        assert_same_rows(alone, padded, [row])


PATTERNS: dict[str, tuple[str, list[float | None]]] = {
    "a few leave early": ("max_prob", [0.9, 0.8]),
    "most leave early": ("max_prob", [0.2, 0.2]),
    "first exit closed": ("margin", [None, 0.5]),
    "second exit closed": ("margin", [0.5, None]),
    "by entropy": ("entropy", [0.3, 0.6]),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_compacted_batch_is_every_row_alone(minilm: MiniLM, runner: Runner, trace: Trace, name: str) -> None:
    runner.policy = thresholds_near(trace, *PATTERNS[name])
    inputs = inputs_from_ids(minilm.sentences[:32])
    result = runner.run(inputs)
    expected = answer_row_by_row(minilm, runner.policy, inputs)
    assert len(set(result.exit_index)) > 1, "some leave, some go on"
    np.testing.assert_allclose(result.score, expected.score, rtol=0, atol=SCORE_ATOL)
    result.score[:] = expected.score
    assert_same_rows(result, expected)


@pytest.mark.parametrize("score", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("batch", [1, 7, 128])
def test_replay_is_what_the_runner_does(minilm: MiniLM, runner: Runner, trace: Trace, score: str, batch: int) -> None:
    runner.policy = thresholds_near(trace, score, [0.5, 0.4])
    replayed = replay(runner.policy, trace)
    num_rows = len(minilm.sentences) if batch > 1 else 16
    for start in range(0, num_rows, batch):
        rows = slice(start, start + batch)
        result = runner.run(inputs_from_ids(minilm.sentences[rows]))
        np.testing.assert_array_equal(result.exit_index, replayed.exit_index[rows])
        np.testing.assert_array_equal(result.prediction, replayed.prediction[rows])
        assert result.reason == replayed.reason[rows].tolist()


def test_fp16_changes_few_decisions(minilm: MiniLM, trace: Trace) -> None:
    with Runner.open(minilm.bundle, backend="onnxruntime", precision="fp16") as lowered:
        lowered_trace = lowered.record(batches_of(minilm.sentences), minilm.labels, TEMPERATURES)
    np.testing.assert_allclose(lowered_trace.logits, trace.logits, rtol=0, atol=FP16_ATOL)
    assert (lowered_trace.predictions != trace.predictions).mean() <= FP16_FLIPS
    for share in (0.2, 0.5, 0.8):
        limits = [float(np.quantile(trace.scores[:, k, 0], share)) for k in range(NUM_EXITS - 1)]
        policy = Policy.thresholds("max_prob", limits, TEMPERATURES)
        flipped = replay(policy, lowered_trace).exit_index != replay(policy, trace).exit_index
        assert flipped.mean() <= FP16_FLIPS, f"limits {limits}"


def test_int8_stays_near_fp32(minilm: MiniLM, trace: Trace) -> None:
    with Runner.open(minilm.bundle, backend="onnxruntime", precision="int8") as lowered:
        lowered_trace = lowered.record(batches_of(minilm.sentences), minilm.labels, TEMPERATURES)
    difference = np.square(lowered_trace.logits - trace.logits).mean((0, 2)) / np.square(trace.logits).mean((0, 2))
    assert (difference > 0).all(), "these are other graphs"
    assert np.sqrt(difference).max() < INT8_RMS


@pytest.mark.parametrize("batch", [1, 5, 32])
def test_int8_row_has_the_same_bits_in_any_batch_order_and_padding(minilm: MiniLM, batch: int) -> None:
    sentences = [ids for ids in minilm.sentences if len(ids) < 64][:32]
    order = np.random.default_rng(batch).permutation(32)
    with Runner.open(minilm.bundle, backend="onnxruntime", precision="int8") as lowered:
        alone = [lowered.run(inputs_from_ids([ids])) for ids in sentences]
        for width in (0, 63, 64, 101, 128)[: 5 if batch > 1 else 2]:
            for start in range(0, 32, batch):
                rows = order[start : start + batch]
                together = lowered.run(inputs_from_ids([sentences[row] for row in rows], width))
                for position, row in enumerate(rows):
                    assert_same_rows(alone[row], together, [position])


def test_int8_compacted_batch_is_every_row_alone(minilm: MiniLM, trace: Trace) -> None:
    policy = thresholds_near(trace, "max_prob", [0.6, 0.5])
    inputs = inputs_from_ids(minilm.sentences[:32])
    with Runner.open(minilm.bundle, backend="onnxruntime", precision="int8", policy=policy) as lowered:
        together = lowered.run(inputs)
        assert len(set(together.exit_index)) > 1, "some leave, some go on"
        for row in range(32):
            assert_same_rows(lowered.run(choose(inputs, slice(row, row + 1))), together, [row])
