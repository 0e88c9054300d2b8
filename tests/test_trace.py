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


FULL: dict[str, Any] = {
    "learned": np.array([[0.25, np.nan]] * 4, np.float32),
    "sources": np.array(["kiosk", "", "öffentlich", "mail"]),
    "lengths": np.array([3, 1, 12, UNKNOWN]),
    "retention": np.array([[np.nan, 0.5], [np.nan, 1.0], [np.nan, 0.125], [np.nan, 0.75]], np.float32),
    "cost_sizes": np.array([1, 4]),
    "batch_costs_ms": np.array([[1.0, 2.0], [3.0, 5.0]]),
    "uncut_ms": 2.75,
    "files": ("a" * 64, "b" * 64),
}


def test_the_trace_of_some_exits_keeps_what_is_known_of_rows_and_adds_costs_up() -> None:
    trace = replace(make_trace(), **FULL)
    found = trace.exits([1])
    np.testing.assert_array_equal(found.logits, trace.logits[:, [1]], strict=True)
    np.testing.assert_array_equal(found.retention, trace.retention[:, [1]], strict=True)
    assert found.has_learned == (False,)
    assert (found.sources.tolist(), found.lengths.tolist()) == (trace.sources.tolist(), trace.lengths.tolist())
    assert (found.costs_ms.tolist(), found.batch_costs_ms.tolist()) == ([3.0], [[3.0], [8.0]])
    assert (found.uncut_ms, found.files, found.num_exits) == (trace.uncut_ms, (), 1)


@pytest.mark.parametrize("rows", [0, 4])
def test_the_trace_of_all_exits_is_the_trace(rows: int) -> None:
    trace = make_trace(rows, exits=3)
    assert trace.exits(range(3)).sha256 == trace.sha256
    assert trace.exits(range(3)).costs_ms.tolist() == trace.costs_ms.tolist()
    assert trace.exits([0, 2]).costs_ms.tolist() == [1.0, 5.0]


@pytest.mark.parametrize("known", [[], list(FULL)], ids=["nothing", "everything"])
def test_what_need_not_be_known_survives_too(tmp_path: Path, known: list[str]) -> None:
    trace = replace(make_trace(), **{name: FULL[name] for name in known})
    save_trace(tmp_path / "trace.npz", trace)
    loaded = load_trace(tmp_path / "trace.npz")
    for field in fields(Trace):
        left, right = getattr(trace, field.name), getattr(loaded, field.name)
        np.testing.assert_array_equal(left, right, strict=isinstance(left, np.ndarray))
        assert type(left) is type(right)
    assert loaded.sha256 == trace.sha256


def test_an_old_trace_lacks_what_it_did_not_know(tmp_path: Path) -> None:
    arrays = {f.name: np.asarray(getattr(make_trace(), f.name)) for f in fields(Trace) if f.name not in FULL}
    np.savez(tmp_path / "trace.npz", **arrays)
    old = load_trace(tmp_path / "trace.npz")
    assert (old.learned.shape, old.retention.shape) == ((4, 0), (4, 0))
    assert (old.sources.tolist(), old.lengths.tolist()) == ([""] * 4, [UNKNOWN] * 4)
    assert (old.cost_sizes.shape, old.batch_costs_ms.shape, old.files) == ((0,), (0, 2), ())
    assert np.isnan(old.uncut_ms)


def test_the_hash_is_of_what_was_said_and_by_what() -> None:
    """Not of times, nor of how wide the array of the names happens to be."""
    trace = replace(make_trace(), **FULL)
    assert len(trace.sha256) == 64
    times = {"costs_ms": np.ones(2), "uncut_ms": 7.0, "cost_sizes": np.array([2]), "batch_costs_ms": np.ones((1, 2))}
    wide = {"sources": FULL["sources"].astype("<U99"), "logits": np.asfortranarray(trace.logits)}
    assert replace(trace, **times, **wide).sha256 == trace.sha256
    changes: dict[str, Any] = {
        "logits": trace.logits + np.float32(1e-6),
        "labels": np.roll(trace.labels, 1),
        "learned": np.array([[0.25, 0.5]] * 4, np.float32),
        "sources": np.array(["kios", "k", "öffentlich", "mail"]),
        "lengths": np.array([3, 1, 12, 2]),
        "retention": np.empty((4, 0), np.float32),
        "files": ("a" * 64, "c" * 64),
        "precision": "int8",
        "temperatures": np.array([1.0, 2.0]),
    }
    hashes = {replace(trace, **{name: value}).sha256 for name, value in changes.items()} | {trace.sha256}
    assert len(hashes) == len(changes) + 1


def test_a_file_has_the_same_bytes_for_the_same_trace(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_trace(tmp_path / name, replace(make_trace(), **FULL))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


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
    "retention range": ({"retention": np.zeros((4, 2), np.float32)}, r"retention outside \(0, 1\]"),
    "retention shape": ({"retention": np.ones((4, 1), np.float32)}, r"retention of shape \(4, 1\)"),
    "sources": ({"sources": np.array(["a"])}, r"sources of shape \(1,\), expected \(4,\)"),
    "numbered sources": ({"sources": np.arange(4)}, "sources of dtype int64, expected names"),
    "lengths": ({"lengths": np.array([1, 2, 3, -2])}, "length of -2"),
    "sizes": ({"cost_sizes": np.array([4, 1]), "batch_costs_ms": np.ones((2, 2))}, r"cost_sizes \[4, 1\]"),
    "size 0": ({"cost_sizes": np.array([0]), "batch_costs_ms": np.ones((1, 2))}, r"cost_sizes \[0\]"),
    "sizes without costs": ({"cost_sizes": np.array([1])}, r"batch_costs_ms of shape \(0, 2\), expected \(1, 2\)"),
    "negative costs": ({"cost_sizes": np.array([1]), "batch_costs_ms": -np.ones((1, 2))}, "negative or not finite"),
    "uncut": ({"uncut_ms": 0.0}, "uncut_ms 0.0"),
    "files": ({"files": ("a",)}, "1 files for 2 segments"),
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
    with pytest.raises(DataError, match=r"trace\.npz.*offramp trace"):
        load_trace(path)


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"writing .*trace\.npz"):
        save_trace(tmp_path / "file" / "trace.npz", make_trace())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
