"""Traces: their shape rules and their file."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.errors import DataError, StorageError
from offramp.trace import UNKNOWN, Trace, load_trace, save_trace


def make_trace(rows: int = 4, exits: int = 2, classes: int = 3) -> Trace:
    logits = np.sin(np.arange(rows * exits * classes, dtype=np.float32)).reshape(rows, exits, classes)
    return Trace(
        logits=logits,
        scores=np.full((rows, exits, 3), 0.5, np.float32),
        predictions=logits.argmax(axis=2),
        temperatures=np.ones(exits),
        labels=np.arange(rows) % classes,
        costs_ms=np.arange(1.0, exits + 1),
        fingerprint="f" * 64,
        backend="onnxruntime",
        precision="fp32",
    )


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_a_trace_survives_its_file(tmp_path: Path, rows: int) -> None:
    trace = make_trace(rows)
    save_trace(tmp_path / "deep" / "trace.npz", trace)
    loaded = load_trace(tmp_path / "deep" / "trace.npz")
    for field in fields(Trace):
        left, right = getattr(trace, field.name), getattr(loaded, field.name)
        np.testing.assert_array_equal(left, right, strict=True)
        assert type(left) is type(right)
    assert loaded.num_exits == 2


def test_learned_confidences_are_per_exit(tmp_path: Path) -> None:
    assert make_trace().has_learned == (False, False)
    trace = replace(make_trace(), learned=np.array([[0.25, np.nan]] * 4, np.float32))
    assert trace.has_learned == (True, False)
    save_trace(tmp_path / "trace.npz", trace)
    np.testing.assert_array_equal(load_trace(tmp_path / "trace.npz").learned, trace.learned, strict=True)


def test_a_trace_from_before_learned_confidences_has_none(tmp_path: Path) -> None:
    arrays = {f.name: np.asarray(getattr(make_trace(), f.name)) for f in fields(Trace) if f.name != "learned"}
    np.savez(tmp_path / "trace.npz", **arrays)
    assert load_trace(tmp_path / "trace.npz").learned.shape == (4, 0)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "flat logits": ({"logits": np.zeros((4, 6), np.float32)}, r"logits of shape \(4, 6\)"),
    "NaN": ({"logits": np.full((4, 2, 3), np.nan, np.float32)}, "expected finite"),
    "scores": ({"scores": np.zeros((4, 2, 2), np.float32)}, r"scores of shape \(4, 2, 2\), expected \(4, 2, 3\)"),
    "predictions": ({"predictions": np.zeros(4, np.int64)}, "predictions"),
    "temperatures": ({"temperatures": np.ones(3)}, "temperatures"),
    "labels": ({"labels": np.zeros(5, np.int64)}, "labels of shape"),
    "costs": ({"costs_ms": np.ones(1)}, "costs_ms"),
    "learned shape": ({"learned": np.zeros((4, 1), np.float32)}, r"learned of shape \(4, 1\), expected \(4, 2\)"),
    "learned range": ({"learned": np.full((4, 2), 1.5, np.float32)}, r"learned outside \[0, 1\]"),
    "learned holes": ({"learned": np.array([[0.5, 0.5]] * 3 + [[np.nan, 0.5]], np.float32)}, "NaN for a whole exit"),
    "label too large": ({"labels": np.array([0, 1, 2, 3])}, r"labels in \[0, 3\], expected below 3"),
    "label too small": ({"labels": np.array([0, 1, 2, UNKNOWN - 1])}, r"labels in \[-2, 2\]"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_trace_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(make_trace(), **changes)


def write_partial(path: Path) -> None:
    np.savez(path, logits=np.zeros((1, 2, 3)))


def write_truncated(path: Path) -> None:
    save_trace(path, make_trace())
    path.write_bytes(path.read_bytes()[:-100])


def write_altered(path: Path) -> None:
    save_trace(path, make_trace(200))
    content = bytearray(path.read_bytes())
    content[200:220] = bytes(20)
    path.write_bytes(content)


def write_pickle(path: Path) -> None:
    arrays = {f.name: np.asarray(getattr(make_trace(), f.name)) for f in fields(Trace)}
    np.savez(path, **(arrays | {"logits": np.array([object()])}), allow_pickle=True)


def write_array(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


def write_words(path: Path) -> None:
    arrays = {f.name: np.asarray(getattr(make_trace(), f.name)) for f in fields(Trace)}
    np.savez(path, **(arrays | {"logits": np.full((4, 2, 3), "a")}))


DAMAGES = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no archive"),
    "an array": lambda path: path.write_bytes(b"\x93NUMPY"),
    "a directory": lambda path: path.mkdir(),
    "fields missing": write_partial,
    "truncated": write_truncated,
    "altered": write_altered,
    "pickled": write_pickle,
    "one array": write_array,
    "words for logits": write_words,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_trace_is_refused(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "trace.npz"
    damage(path)
    with pytest.raises(DataError, match=r"trace\.npz.*offramp calibrate"):
        load_trace(path)


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"writing .*trace\.npz"):
        save_trace(tmp_path / "file" / "trace.npz", make_trace())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
