"""Traces recorded into a file: as in memory, in parts, interrupted anywhere and resumed, in bounded memory."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from offramp.errors import DataError, StorageError
from offramp.runtime import Runner, fake_runner, record
from offramp.runtime.fake import MAX_ROWS
from offramp.runtime.record import RecordOptions, Rows, record_to_file, record_trace
from offramp.trace import UNKNOWN, load_trace


@pytest.fixture(autouse=True)
def _small_parts_and_no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_PART_ROWS", 16)


QUICK = RecordOptions(budget_s=0.0)


def rows(num_rows: int, size: int = 7, source: str = "mail") -> list[Rows]:
    """Sentences in batches; every third row without a label, every second from `source`."""
    sentences = tiny.sentences(num_rows)
    labels = np.array([UNKNOWN if row % 3 == 0 else row % tiny.NUM_CLASSES for row in range(num_rows)])
    sources = np.array([source if row % 2 else "" for row in range(num_rows)], np.str_)
    starts = range(0, num_rows, size)
    return [Rows(tiny.request(sentences[a : a + size]), labels[a : a + size], sources[a : a + size]) for a in starts]


def test_a_file_holds_what_a_recording_in_memory_gives(shared_runner: Runner, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    sha256 = record_to_file(shared_runner, rows(50), path, RecordOptions(cost_sizes=(1, 4, 64), budget_s=0.0))
    trace, other = load_trace(path), record_trace(shared_runner, rows(50), QUICK)
    assert trace.sha256 == other.sha256 == sha256
    assert trace.sources.tolist() == ["", "mail"] * 25
    assert trace.labels.tolist()[:3] == [UNKNOWN, 1, 2]
    assert trace.lengths.tolist() == [len(sentence) for sentence in tiny.sentences(50)]
    assert trace.cost_sizes.tolist() == [1, 4]  # 64 is more than the bundle takes
    assert trace.batch_costs_ms.shape == (2, tiny.NUM_SEGMENTS)
    np.testing.assert_array_equal(trace.batch_costs_ms[0], trace.costs_ms)
    assert (trace.batch_costs_ms > 0).all()
    assert np.isnan(trace.uncut_ms)
    assert [found.name for found in tmp_path.iterdir()] == ["trace.npz"]


class Killed(BaseException):
    """Nothing of offramp's catches it: what is on disk then is what a kill leaves."""


def killing(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """`function` for `after` calls, then the end."""
    count = iter(range(after))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(count, None) is None:
            raise Killed
        return function(*arguments, **options)

    return call


MOMENTS: dict[str, tuple[object, str]] = {  # what is called -> killed at every one of its calls
    "before a batch runs": (record, "_run_all_exits"),
    "before a file is safe": (os, "fsync"),
    "before a file is there": (os, "replace"),
    "before the costs": (record, "measure_trace_costs"),
    "before the parts go": (record.shutil, "rmtree"),
}


@pytest.mark.parametrize(("place", "name"), MOMENTS.values(), ids=MOMENTS)
def test_killed_at_any_moment_it_ends_with_the_same_content(
    shared_runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object, name: str
) -> None:
    batches = rows(60, size=9)
    expected = record_trace(shared_runner, batches, QUICK).sha256
    for after in range(100):
        path = tmp_path / str(after) / "trace.npz"
        with monkeypatch.context() as patch:
            patch.setattr(place, name, killing(getattr(place, name), after))
            try:
                record_to_file(shared_runner, batches, path, QUICK)
                break
            except Killed:
                assert path.exists() == (name == "rmtree")
        assert record_to_file(shared_runner, batches, path, QUICK) == expected
        assert load_trace(path).sha256 == expected
        assert [found.name for found in path.parent.iterdir()] == ["trace.npz"]
    assert after >= (1 if name in ("measure_trace_costs", "rmtree") else 4)


def test_what_was_answered_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = fake_runner([0.6, 0.9])
    batches = [Rows({"x": np.arange(start, start + 8, dtype=np.float32)}) for start in range(0, 64, 8)]
    asked: list[float] = []
    real = record._run_all_exits

    def watched(engines: Any, inputs: Any, inverse: Any) -> Any:
        asked.append(float(inputs["x"][0]))
        if len(asked) == 6:
            raise Killed
        return real(engines, inputs, inverse)

    monkeypatch.setattr(record, "_run_all_exits", watched)
    with pytest.raises(Killed):
        record_to_file(runner, batches, tmp_path / "t.npz", QUICK)
    damaged, _ = sorted((tmp_path / ".t.npz.parts").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-50])  # of a disk that lies about fsync
    record_to_file(runner, batches, tmp_path / "t.npz", QUICK)
    assert asked[:6] == [0, 8, 16, 24, 32, 40]
    assert asked[6:] == [0, 8, 32, 40, 48, 56], "parts of 16 rows: the damaged one and those not written"


def test_other_rows_are_not_taken_for_those_of_before(shared_runner: Runner, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with pytest.raises(Killed):
        record_to_file(shared_runner, endless_until(Killed, rows(40)), path, QUICK)
    assert len(list((tmp_path / ".trace.npz.parts").iterdir())) == 2
    record_to_file(shared_runner, rows(40, source="web"), path, QUICK)
    assert set(load_trace(path).sources) == {"", "web"}


def endless_until(error: type[BaseException], batches: list[Rows]) -> Iterator[Rows]:
    yield from batches
    raise error


def test_nothing_to_record(tmp_path: Path, shared_runner: Runner) -> None:
    with pytest.raises(DataError, match="got no rows"):
        record_to_file(shared_runner, [], tmp_path / "trace.npz")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        record_to_file(shared_runner, rows(3), tmp_path / "file" / "trace.npz", QUICK)
    with pytest.raises(DataError, match="expected below 3"):
        record_to_file(shared_runner, [rows(3)[0]._replace(labels=np.array([0, 1, 7]))], tmp_path / "t.npz", QUICK)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bench/trace_memory.py does it for a million rows of 12 exits."""
    monkeypatch.setattr(record, "_PART_ROWS", 1024)
    runner = fake_runner([0.6] * 12)

    def peak_bytes(num_batches: int) -> int:
        batches = (Rows({"x": np.zeros(MAX_ROWS, np.float32)}) for _ in range(num_batches))
        tracemalloc.start()
        record_to_file(runner, batches, tmp_path / "t.npz", QUICK)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        for engine in runner.engines:
            engine.calls.clear()
        return peak

    little, much = peak_bytes(32), peak_bytes(320)  # 2,048 rows and 20,480 rows: 4 MB of answers
    assert load_trace(tmp_path / "t.npz").logits.nbytes > 1.5e6
    assert much < little + 1.5e6
