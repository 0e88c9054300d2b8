"""The contract every engine keeps, run against all of them: a new engine is one more entry in CHAINS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from faked import Faked

from offramp.bundle import load_manifest
from offramp.errors import BackendError
from offramp.runtime import Engine, FakeEngine, TensorRtOptions
from offramp.runtime.onnxruntime_engine import open_onnxruntime_engines
from offramp.scores import scores_from_logits

ONE = np.float32(1)
SCORE_TOLERANCE = 1e-6  # exp and log of numpy against ONNX Runtime's, in [0, 1]: seen up to 1.8e-7
FP16_TOLERANCE = 0.01  # of logits up to 11: seen 0, as these activations happen to be exact in FP16 too


def fake_chain(bundle: Path) -> list[Engine]:
    def answer(exit_index: int, inputs: tiny.Inputs) -> np.ndarray:
        return tiny.reference_logits(inputs, exit_index)

    return [FakeEngine(partial(answer, k)) for k in range(tiny.NUM_SEGMENTS)]


def onnxruntime_chain(bundle: Path) -> list[Engine]:
    return list(open_onnxruntime_engines(bundle, load_manifest(bundle), "fp32", threads=1))


def tensorrt_chain(bundle: Path, *, speculate: bool = False) -> list[Engine]:
    return list(Faked(bundle, TensorRtOptions(speculate=speculate)).chain.engines)


CHAINS: dict[str, Callable[[Path], list[Engine]]] = {
    "fake": fake_chain,
    "onnxruntime": onnxruntime_chain,
    "tensorrt on a fake device": tensorrt_chain,
    "the same, speculating": partial(tensorrt_chain, speculate=True),
}


@pytest.fixture(params=CHAINS)
def chain(request: pytest.FixtureRequest, bundle: Path) -> list[Engine]:
    return CHAINS[request.param](bundle)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_every_segment_answers_as_the_reference(chain: list[Engine], num_rows: int) -> None:
    inputs = tiny.request(tiny.sentences(num_rows))
    carry, rows = inputs, np.arange(num_rows)
    for k, engine in enumerate(chain):
        out = engine.run(carry, rows, ONE)
        expected = tiny.reference_logits(inputs, k)
        np.testing.assert_array_equal(out.logits, expected, strict=True)
        np.testing.assert_array_equal(out.prediction, expected.argmax(axis=1), strict=True)
        np.testing.assert_allclose(out.scores, scores_from_logits(expected, ONE), atol=SCORE_TOLERANCE)
        assert out.scores.dtype == np.float32
        assert out.scores.shape == (num_rows, 3)
        carry = out.carry


@pytest.mark.parametrize("rows", [[0], [4], [1, 3], [3, 1, 0], [0, 1, 2, 3, 4]])
def test_rows_name_positions_in_the_output_before(chain: list[Engine], rows: list[int]) -> None:
    sentences = tiny.sentences(5)
    carry = chain[0].run(tiny.request(sentences), np.arange(5), ONE).carry
    out = chain[1].run(carry, np.array(rows), ONE)
    expected = tiny.reference_logits(tiny.request([sentences[row] for row in rows], width=12), 1)
    np.testing.assert_array_equal(out.logits, expected)
    again = chain[2].run(out.carry, np.array([len(rows) - 1]), ONE)
    expected = tiny.reference_logits(tiny.request([sentences[rows[-1]]], width=12), 2)
    np.testing.assert_array_equal(again.logits, expected)


def test_a_carry_is_not_consumed(chain: list[Engine]) -> None:
    carry = chain[0].run(tiny.request(tiny.sentences(3)), np.arange(3), ONE).carry
    first = chain[1].run(carry, np.array([2]), ONE)
    chain[1].run(carry, np.array([0, 1]), ONE)
    second = chain[1].run(carry, np.array([2]), ONE)
    np.testing.assert_array_equal(first.logits, second.logits)


def test_temperature_moves_scores_and_nothing_else(chain: list[Engine]) -> None:
    inputs, rows = tiny.request(tiny.sentences(4)), np.arange(4)
    plain, warm = chain[0].run(inputs, rows, ONE), chain[0].run(inputs, rows, np.float32(0.25))
    np.testing.assert_array_equal(plain.logits, warm.logits)
    np.testing.assert_array_equal(plain.prediction, warm.prediction)
    expected = scores_from_logits(plain.logits, np.float32(0.25))
    np.testing.assert_allclose(warm.scores, expected, atol=SCORE_TOLERANCE)
    assert (warm.scores[:, 0] < plain.scores[:, 0]).all()


def test_a_closed_engine_says_so(chain: list[Engine]) -> None:
    chain[0].close()
    with pytest.raises(BackendError, match="closed"):
        chain[0].run(tiny.request([[1]]), np.arange(1), ONE)


def test_fp16_graphs_open_and_stay_close(bundle: Path) -> None:
    chain = open_onnxruntime_engines(bundle, load_manifest(bundle), "fp16", threads=1)
    inputs = tiny.request(tiny.sentences(6))
    carry, rows = inputs, np.arange(6)
    for k, engine in enumerate(chain):
        out = engine.run(carry, rows, ONE)
        assert out.logits.dtype == np.float32
        np.testing.assert_allclose(out.logits, tiny.reference_logits(inputs, k), atol=FP16_TOLERANCE)
        carry = out.carry


def test_an_error_of_onnxruntime_is_translated(bundle: Path) -> None:
    chain = onnxruntime_chain(bundle)
    carry = chain[0].run(tiny.request(tiny.sentences(2)), np.arange(2), ONE).carry
    with pytest.raises(BackendError, match=r"segment 1 on 1 rows .* out of data bounds"):
        chain[1].run(carry, np.array([7]), ONE)
