"""Rows come once, in an order that the seed decides."""

import numpy as np
import pytest

from offramp.errors import DataError
from offramp.models.rows import ArrayRows, TextRows, joined, padded, without_labels
from offramp.trace import UNKNOWN


def test_padded() -> None:
    input_ids, attention_mask = padded([[5, 6], [7]], pad_id=1)
    assert input_ids.tolist() == [[5, 6], [7, 1]]
    assert attention_mask.tolist() == [[1, 1], [1, 0]]
    assert padded([])[0].shape == (0, 0)


def test_batches_hold_every_row_once_and_hardly_pad() -> None:
    random = np.random.default_rng(3)
    rows = TextRows([[number] * int(random.integers(1, 60)) for number in range(1000)], np.arange(1000))
    seen, num_tokens, num_places = [], 0, 0
    for batch in rows.batches(32, seed=1):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.shape == mask.shape
        assert ids[:, 0].tolist() == batch.targets.tolist()
        seen += batch.targets.tolist()
        num_tokens += int(mask.sum())
        num_places += mask.size
    assert sorted(seen) == list(range(1000))
    assert num_tokens > 0.95 * num_places


@pytest.mark.parametrize("kind", ["texts", "arrays"])
def test_batches_follow_the_seed(kind: str) -> None:
    targets = np.arange(50)
    texts = TextRows([[1] * (1 + number % 3) for number in range(50)], targets)
    rows = texts if kind == "texts" else ArrayRows({"pixels": targets[:, None].astype(np.uint8)}, targets)
    order = {seed: [batch.targets.tolist() for batch in rows.batches(8, seed)] for seed in (1, 2)}
    assert order[1] == [batch.targets.tolist() for batch in rows.batches(8, 1)]
    assert order[1] != order[2]
    assert sorted(target for batch in order[1] for target in batch) == list(range(50))


def test_pixels_are_numbers_from_0_to_1() -> None:
    targets = np.arange(256)
    rows = ArrayRows({"pixels": np.arange(256, dtype=np.uint8)[:, None], "as_is": targets[:, None]}, targets)
    for batch in rows.batches(100, seed=0):
        assert batch.inputs["pixels"].dtype == np.float32
        np.testing.assert_array_equal(batch.inputs["pixels"][:, 0], batch.targets.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(batch.inputs["as_is"][:, 0], batch.targets)


def test_arrays_of_one_length_only() -> None:
    with pytest.raises(DataError, match="'pixels': 3, 'targets': 2"):
        ArrayRows({"pixels": np.zeros((3, 1))}, np.zeros(2, np.int64))


def test_joined() -> None:
    texts = TextRows([[1], [2]], np.array([0, 1]))
    more = joined(texts, TextRows([[3]], without_labels(1)))
    assert isinstance(more, TextRows)
    assert (more.ids, more.targets.tolist()) == ([[1], [2], [3]], [0, 1, UNKNOWN])
    assert joined(texts, None) is texts
    images = ArrayRows({"pixels": np.zeros((2, 3))}, np.array([0, 1]))
    assert joined(images, images).targets.tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match="expected one kind"):
        joined(texts, images)
