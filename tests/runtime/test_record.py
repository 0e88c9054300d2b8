"""Recording traces."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from offramp.errors import DataError, OptionError
from offramp.policy import Policy
from offramp.runtime import Runner, SegmentOutput, fake_runner
from offramp.runtime.fake import FakeEngine
from offramp.scores import scores_from_logits
from offramp.trace import UNKNOWN


def batches(num_rows: int, size: int) -> list[tiny.Inputs]:
    sentences = tiny.sentences(num_rows)
    return [tiny.request(sentences[start : start + size]) for start in range(0, num_rows, size)]


def test_a_trace_is_what_every_exit_says(shared_runner: Runner) -> None:
    shared_runner.policy = Policy.thresholds("max_prob", [0.0, 0.0])  # recording does not heed it
    labels = np.arange(20) % tiny.NUM_CLASSES
    trace = shared_runner.record(batches(20, 7), labels, [1.0, 2.0, 0.5])
    inputs = tiny.request(tiny.sentences(20))
    for k, inverse in enumerate([1, 0.5, 2]):
        expected = tiny.reference_logits(inputs, k)
        np.testing.assert_array_equal(trace.logits[:, k], expected)
        np.testing.assert_array_equal(trace.predictions[:, k], expected.argmax(axis=1))
        scores = scores_from_logits(expected, np.float32(inverse))
        np.testing.assert_allclose(trace.scores[:, k], scores, atol=1e-6)
    assert trace.labels.tolist() == labels.tolist()
    assert trace.temperatures.tolist() == [1.0, 2.0, 0.5]
    assert (trace.backend, trace.precision) == ("onnxruntime", "fp32")
    assert trace.fingerprint == shared_runner.manifest.fingerprint
    assert trace.files == tuple(segment.graphs["fp32"].sha256 for segment in shared_runner.manifest.segments)
    assert trace.costs_ms.shape == (tiny.NUM_SEGMENTS,)
    assert (trace.costs_ms > 0).all()


@pytest.mark.parametrize("size", [1, tiny.MAX_ROWS, 5 * tiny.MAX_ROWS + 1])
def test_batches_do_not_show_in_a_trace(shared_runner: Runner, size: int) -> None:
    trace, other = (shared_runner.record(iter(batches(43, by))) for by in (size, 10))
    np.testing.assert_array_equal(trace.logits, other.logits)
    np.testing.assert_array_equal(trace.scores, other.scores)
    assert trace.labels.tolist() == [UNKNOWN] * 43
    assert trace.temperatures.tolist() == [1.0] * 3


def test_costs_tell_a_dear_segment_from_a_cheap_one() -> None:
    class Slow(FakeEngine):
        def run(self, carry: object, rows: np.ndarray, inverse_temperature: np.float32) -> SegmentOutput:
            np.sin(np.ones(200_000))
            return super().run(carry, rows, inverse_temperature)

    runner = fake_runner([0.6, 0.6, 0.6])
    slow = Slow(lambda inputs: np.zeros((len(inputs["x"]), 2)))
    runner.engines = (runner.engines[0], slow, runner.engines[2])
    costs_ms = runner.record([{"x": np.zeros(3, np.float32)}]).costs_ms
    assert costs_ms[1] > 3 * costs_ms[[0, 2]].max()


def test_no_rows_are_no_trace(shared_runner: Runner) -> None:
    with pytest.raises(DataError, match="got no rows"):
        shared_runner.record([])
    with pytest.raises(DataError, match="got no rows"):
        shared_runner.record([tiny.request([])])


def test_labels_must_fit_the_rows(shared_runner: Runner) -> None:
    with pytest.raises(DataError, match="got 2 labels for 3 rows"):
        shared_runner.record(batches(3, 3), [0, 1])
    with pytest.raises(DataError, match="expected below 3"):
        shared_runner.record(batches(3, 3), [0, 1, 3])


def test_temperatures_must_fit_the_exits(shared_runner: Runner) -> None:
    with pytest.raises(OptionError, match="2 temperatures"):
        shared_runner.record(batches(3, 3), temperatures=[1.0, 1.0])


def test_progress_goes_to_standard_error(shared_runner: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    shared_runner.record(batches(9, 3), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "recording" in err
