"""The rows that costs are measured on: spread over the data, without padding, and answered as ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny

from offramp.bundle import ROWS, DimensionSpec, InputSpec
from offramp.runtime import Runner
from offramp.runtime.fake import X, fake_manifest
from offramp.runtime.row_sample import RowSample, token_mask


@pytest.mark.parametrize("num_rows", [1, 64, 127, 128, 1000, 4096])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_rows_are_evenly_spread_whatever_the_batches(num_rows: int, step: int) -> None:
    sample = RowSample(fake_manifest(1, 2, (X,)))
    for start in range(0, num_rows, step):
        values = np.arange(start, min(start + step, num_rows), dtype=np.float32)
        sample.add({"x": values}, len(values))
    kept = [float(sample.batch(place, 1)["x"][0]) for place in range(128)]
    kept = kept[: kept.index(0.0, 1)] if 0.0 in kept[1:] else kept  # it goes round
    stride = kept[1] - kept[0] if len(kept) > 1 else 1
    assert kept == list(np.arange(0, num_rows, stride))
    assert min(num_rows, 64) <= len(kept) <= 128


def test_rows_lose_the_padding_of_their_batch_and_get_that_of_the_next(shared_runner: Runner) -> None:
    manifest = replace(shared_runner.manifest, trims={"fp32": "sequence"})
    sentences = [[1, 2, 3, 4, 5], [6], [7, 8]]
    sample = RowSample(manifest)
    sample.add(tiny.request(sentences, width=9), 3)
    assert [sample.batch(row, 1)["ids"].shape for row in range(3)] == [(1, 5), (1, 1), (1, 2)]
    batch = sample.batch(1, 2)
    assert batch["mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["ids"].tolist() == [[6, 6], [7, 8]]
    whole, again = (shared_runner.run(inputs) for inputs in (tiny.request(sentences), sample.batch(0, 6)))
    np.testing.assert_array_equal(np.tile(whole.outputs["logits"], (2, 1)), again.outputs["logits"])


def test_padding_stays_where_it_may_not_be_cut_off(shared_runner: Runner) -> None:
    sample = RowSample(shared_runner.manifest)
    sample.add(tiny.request([[1], [1, 2]]), 2)
    sample.add(tiny.request([[1, 2, 3]]), 1)  # of another width: it cannot share a batch with the others
    assert sample.batch(0, 4)["mask"].tolist() == [[1, 0], [1, 1]] * 2


def test_a_dimension_keeps_its_minimum() -> None:
    mask = InputSpec("mask", "int64", (ROWS, "sequence"), 0, 1, True)
    manifest = replace(fake_manifest(1, 2, (mask,)), trims={"fp32": "sequence"})
    manifest = replace(manifest, dimensions={**manifest.dimensions, "sequence": DimensionSpec(3, 9)})
    sample = RowSample(manifest)
    sample.add({"mask": np.array([[1, 0, 0, 0, 0]])}, 1)
    assert sample.batch(0, 1)["mask"].shape == (1, 3)


def test_tokens_are_told_by_one_mask_or_not_at_all() -> None:
    mask = InputSpec("mask", "int64", (ROWS, 4), 0, 1, True)
    assert token_mask(fake_manifest(1, 2, (X,))) is None
    assert token_mask(fake_manifest(1, 2, (X, mask))) == mask
    assert token_mask(fake_manifest(1, 2, (mask, replace(mask, name="other")))) is None
