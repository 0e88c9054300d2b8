"""Padding is cut off where that was shown to change no bit, and nowhere else; then answers are the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.bundle import DimensionSpec, InputSpec, TensorSpec, load_manifest, save_manifest
from offramp.commands import verification
from offramp.commands.verification import verify_bundle
from offramp.errors import CorruptError, ParityError
from offramp.export.capture import DEFAULT_OPSET
from offramp.export.cut import Segment
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import source_from_model
from offramp.export.trim import trimmable
from offramp.policy import Policy
from offramp.runtime import Runner
from tests.export import models

FP32 = ExportOptions(precision="fp32")
MASK = InputSpec("mask", "int64", ("rows", "sequence"), 0, 1, True)
LARGEST, MEAN, LAST = (
    lambda x, mask: x.masked_fill(mask[:, :, None] == 0, -1e4).amax(1),
    lambda x, _: x.mean(1),
    lambda x, _: x[:, -1],
)


def export(path: Path, model: tuple[Any, Any], options: ExportOptions = FP32) -> Any:
    return export_bundle(source_from_model("model", *model, DEFAULT_OPSET), path, options)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A `transformers` model that honours its mask."""
    path = tmp_path_factory.mktemp("trim") / "bundle"
    manifest = export(path, models.by_keyword(), ExportOptions())
    assert manifest.trims == {"fp32": "sequence", "fp16": "sequence"}
    return path


def request(lengths: list[int], width: int) -> dict[str, np.ndarray]:
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    ids = (np.arange(mask.size).reshape(mask.shape) * 7 + 3) % 50
    return {"input_ids": ids, "attention_mask": mask}


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    more=st.integers(0, 24),
    limit=st.none() | st.floats(0.5, 1),
)
def test_answers_are_the_same_bits(bundle: Path, lengths: list[int], more: int, limit: float | None) -> None:
    """Any lengths, padded by any width, whoever leaves: as without cutting, and as each row alone at its own length."""
    inputs = request(lengths, max(2, *lengths) + more)
    with Runner.open(bundle, policy=Policy.thresholds("max_prob", [limit])) as runner:
        cut = runner.run(inputs)
        plain = Runner(runner.engines, replace(runner.manifest, trims={}), runner.policy)
        whole = plain.run(inputs)
        np.testing.assert_array_equal(cut.outputs["logits"], whole.outputs["logits"])
        np.testing.assert_array_equal(cut.score, whole.score)
        np.testing.assert_array_equal(cut.exit_index, whole.exit_index)
        for row, length in enumerate(lengths):
            alone = {name: array[row : row + 1, : max(2, length)] for name, array in inputs.items()}
            np.testing.assert_array_equal(plain.run(alone).outputs["logits"][0], cut.outputs["logits"][row])


def widths_run(monkeypatch: pytest.MonkeyPatch, runner: Runner, inputs: dict[str, np.ndarray]) -> list[int]:
    """How wide the mask is that every segment gets."""
    widths = []
    for engine in runner.engines:
        run = engine.run

        def spy(carry: Any, rows: Any, inverse: Any, run: Any = run) -> Any:
            arrays = carry.values() if isinstance(carry, dict) else carry
            widths.append(min(array.shape[-1] for array in arrays))
            return run(carry, rows, inverse)

        monkeypatch.setattr(engine, "run", spy)
    runner.run(inputs)
    return widths


def test_columns_that_are_padding_for_all_are_not_computed(bundle: Path, monkeypatch) -> None:
    inputs = request([20, 12, 12, 9], 30)
    with Runner.open(bundle) as runner:
        first = runner.record([inputs]).scores[:, 0, 0]
    leaves_longest = Policy.thresholds("max_prob", [float(first[0])]) if first[0] == first.max() else None
    with Runner.open(bundle, policy=leaves_longest or Policy.full_depth()) as runner:
        widths = widths_run(monkeypatch, runner, inputs)
    assert widths == ([20, 12] if leaves_longest else [20, 16])


def test_a_request_of_one_row_is_left_alone(bundle: Path, monkeypatch) -> None:
    with Runner.open(bundle) as runner:
        assert min(widths_run(monkeypatch, runner, request([5], 30))) > 5


def test_the_range_of_the_dimension_is_kept(bundle: Path, monkeypatch) -> None:
    """The model takes 2 tokens at least."""
    with Runner.open(bundle) as runner:
        assert widths_run(monkeypatch, runner, request([1, 1, 1], 9))[0] == 2


def test_masks_with_padding_in_front_are_not_cut(bundle: Path) -> None:
    inputs = request([5, 7, 3], 9)
    inputs["attention_mask"] = inputs["attention_mask"][:, ::-1].copy()
    with Runner.open(bundle) as runner:
        cut = runner.run(inputs)
        whole = Runner(runner.engines, replace(runner.manifest, trims={}), runner.policy).run(inputs)
    np.testing.assert_array_equal(cut.outputs["logits"], whole.outputs["logits"])


@pytest.mark.parametrize(
    ("pool", "found"),
    [
        (MEAN, r"(logits|scores) of exit \d differs when sequence is cut to \d+"),
        (LAST, r"(logits|scores) of exit \d differs when sequence is cut to \d+"),
        (lambda x, mask: x[:, 0] + mask.shape[1] * 1e-2, r"(logits|scores) of exit \d differs"),
    ],
)
def test_models_that_look_at_padding_keep_it(tmp_path, pool: Callable[[Tensor, Tensor], Tensor], found: str) -> None:
    manifest = export(tmp_path / "bundle", models.pooled(pool))
    assert manifest.trims == {}
    assert re.search(found, manifest.parity["trimming"]["fp32"])


def test_only_the_last_exit_looks_at_padding(tmp_path) -> None:
    """Every exit counts: the carry is cut for all that follow."""
    calls = []

    def pool(x: Tensor, mask: Tensor) -> Tensor:
        calls.append(x)
        return MEAN(x, mask) if len(calls) % 3 == 0 else x[:, 0]

    manifest = export(tmp_path / "bundle", models.pooled(pool))
    assert manifest.trims == {}
    assert " of exit 2 differs" in manifest.parity["trimming"]["fp32"]


def test_sequences_that_shorten_themselves_are_not_cut(tmp_path) -> None:
    """Token pruning takes its number of tokens from the padded length."""
    manifest = export(tmp_path / "bundle", models.pruned_bert())
    assert manifest.trims == {}
    assert re.search(r"has dimension dim_\d, which may depend on how wide", manifest.parity["trimming"]["fp32"])


@pytest.mark.parametrize(
    ("inputs", "carry", "reason"),
    [
        ((MASK,), ("rows", "sequence", "sequence", 8), ""),
        ((), ("rows", 8), "0 masks"),
        ((MASK, replace(MASK, name="other")), ("rows", 8), "2 masks"),
        ((replace(MASK, shape=("rows", 12)),), ("rows", 8), "expected one of shape"),
        (
            (MASK, InputSpec("x", "float32", ("rows", "height"), None, None, False)),
            ("rows", 8),
            "x has dimension height",
        ),
        ((MASK,), ("rows", "dim_0"), "carry_out_0 of segment 0 has dimension dim_0"),
    ],
)
def test_what_could_be_cut_at_all(inputs: tuple[InputSpec, ...], carry: tuple[int | str, ...], reason: str) -> None:
    segment = Segment(0, None, (), (), (TensorSpec("carry_out_0", "float32", carry),), ())
    dimension, why = trimmable(inputs, [segment])
    assert dimension == ("" if reason else "sequence")
    assert reason in why


def test_inputs_as_wide_as_they_may_be_narrow_show_nothing(tmp_path) -> None:
    model, example = models.pooled(LARGEST)
    narrow = replace(example, ranges={"sequence": (20, 64)})
    assert export(tmp_path / "wide", (model, example)).trims == {"fp32": "sequence"}
    manifest = export(tmp_path / "narrow", (model, narrow))
    assert manifest.trims == {}
    assert "20 wide, which leaves nothing to cut off" in manifest.parity["trimming"]["fp32"]


def test_another_machine_is_asked_again(bundle: Path, tmp_path: Path, monkeypatch) -> None:
    assert verify_bundle(bundle).trimming == {"fp32": "sequence: the same bits"}
    monkeypatch.setattr(verification, "verified_trims", lambda *_: ({}, {"fp32": "logits of exit 1 differs"}))
    with pytest.raises(ParityError, match="changes some here: logits of exit 1 differs; export"):
        verify_bundle(bundle)


def test_dimension_in_the_manifest_has_a_mask(bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(bundle)
    assert manifest.dimensions["sequence"] == DimensionSpec(2, 64)
    (tmp_path / "spoilt").mkdir()
    save_manifest(tmp_path / "spoilt", replace(manifest, trims={"fp32": "rows"}))
    with pytest.raises(CorruptError, match="'rows' cannot be trimmed without a mask over it"):
        load_manifest(tmp_path / "spoilt")
