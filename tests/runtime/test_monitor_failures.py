"""What a monitor does when something fails, is missing or makes no sense: never fail a request."""

from __future__ import annotations

import random
import secrets
import sys
import threading
from random import Random
from typing import Any

import numpy as np
import pytest
from monitored import (
    BASELINE,
    NUM_EXITS,
    answer,
    monitor_of,
    monitored_runner,
    rows,
    trip,
)
from numpy.typing import NDArray

from offramp.errors import BackendError, OptionError
from offramp.runtime import (
    Baseline,
    Change,
    FakeEngine,
    Monitor,
    MonitorOptions,
    SegmentOutput,
    Snapshot,
    fake_runner,
)
from offramp.runtime.monitor_sink import Sink
from offramp.runtime.monitor_states import FULL_DEPTH, NORMAL, RECOVERY, SUSPECT
from offramp.runtime.monitor_watch import FULL_DEPTH as FORCED

PATIENCE_S = 30.0
OFTEN = MonitorOptions(audit_rate=0.3, suspect_audit_rate=0.3)


def test_a_segment_that_fails_costs_its_request_alone() -> None:
    monitor = monitor_of()
    runner = monitored_runner(monitor)
    engines = runner.engines

    class Broken(FakeEngine):
        def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
            raise BackendError("broken")

    runner.engines = (*engines[:2], Broken(answer(2)), engines[3])
    with pytest.raises(BackendError):
        runner.run(rows([3]))
    runner.engines = engines
    runner.run(rows([3]))
    snapshot = monitor.snapshot()
    assert (snapshot.total.rows, snapshot.total.failed) == (1, 1)
    assert not monitor._pending[""]
    assert not snapshot.is_blind


def test_a_callback_that_fails_or_hangs_stops_nothing() -> None:
    may_go, told = threading.Event(), []

    def on_change(change: Change) -> None:
        told.append(change.after)
        may_go.wait(PATIENCE_S)
        raise RuntimeError("nobody home")

    monitor = monitor_of(on_change=on_change)
    runner = monitored_runner(monitor)
    trip(runner)
    assert runner.run(rows([0])).reason == [FORCED]  # while the callback still hangs
    assert not monitor.wait_told(0.01)
    may_go.set()
    assert monitor.wait_told(PATIENCE_S)
    assert told[-1] == FULL_DEPTH
    snapshot = monitor.snapshot()
    assert snapshot.callback_errors == len(told)
    assert snapshot.is_blind


def test_a_callback_that_ends_its_thread_is_called_again() -> None:
    told: list[int] = []

    def on_change(change: Change) -> None:
        told.append(change.trips)
        sys.exit("enough")

    sink = Sink(on_change)
    for i in range(2):
        sink.put([Change("", NORMAL, FULL_DEPTH, "", i)])
        assert sink.wait(PATIENCE_S)
    assert (told, sink.errors) == ([0, 1], 2)


def test_changes_that_nobody_takes_are_dropped_and_counted() -> None:
    may_go, told = threading.Event(), []

    def on_change(change: Change) -> None:
        may_go.wait(PATIENCE_S)
        told.append(change.trips)

    sink = Sink(on_change)
    for i in range(200):
        sink.put([Change("", NORMAL, SUSPECT, "", i)])
    may_go.set()
    assert sink.wait(PATIENCE_S)
    assert told == sorted(told)
    assert told[-1] == 199
    assert sink.errors == 200 - len(told) > 100


def test_where_no_thread_can_start_changes_wait_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    sink = Sink(lambda change: told.append(change.trips))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    sink.put([Change("", NORMAL, FULL_DEPTH, "", 1)])
    assert (told, sink.errors) == ([], 1)
    monkeypatch.undo()
    sink.put([Change("", FULL_DEPTH, RECOVERY, "", 2)])
    assert sink.wait(PATIENCE_S)
    assert (told, sink.errors) == ([1, 2], 1)


def test_an_error_of_the_monitor_is_counted_and_the_request_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = monitor_of()
    runner = monitored_runner(monitor)
    for method in ("_enter", "_end"):
        monkeypatch.setattr(monitor, method, lambda *_: 1 / 0)
        assert runner.run(rows([1])).exit_index[0] in (1, NUM_EXITS - 1)
        monkeypatch.undo()
    assert monitor.snapshot().errors == 2
    assert monitor.snapshot().is_blind


def test_without_a_baseline_it_counts() -> None:
    monitor = Monitor()
    runner = monitored_runner(monitor)
    for _ in range(50):
        assert runner.run(rows([0, 2], [True, True])).exit_index.tolist() == [0, 2]
    snapshot = monitor.snapshot()
    assert snapshot.total.exits == (50, 0, 50, 0)
    assert snapshot.streams == {}
    assert monitor.state_of() == ""
    assert snapshot == Snapshot.from_json(snapshot.to_json())


def test_no_rows_are_no_evidence() -> None:
    monitor = monitor_of(options=MonitorOptions(audit_rate=1.0))
    result = monitored_runner(monitor).run(rows([]))
    assert result.reason == []
    assert monitor.snapshot().total.rows == 0
    assert not monitor._pending[""]


def test_audits_cannot_be_foretold_unless_asked_for() -> None:
    assert isinstance(Monitor(BASELINE)._streams[""]._rng, secrets.SystemRandom)

    def chosen(rng: Random) -> list[str]:
        runner = monitored_runner(Monitor(BASELINE, OFTEN, rng=rng))
        return runner.run(rows([0] * 64)).reason

    assert chosen(random.Random(1)) == chosen(random.Random(1)) != chosen(random.Random(2))
    assert len({tuple(chosen(secrets.SystemRandom())) for _ in range(3)}) == 3


def test_a_monitor_for_another_model_is_refused() -> None:
    with pytest.raises(OptionError, match="it is for 2 exits, the model has 4"):
        monitored_runner(Monitor(Baseline((1, 1), 0.01)))
    monitor = Monitor()
    monitored_runner(monitor)
    with pytest.raises(OptionError, match="it is for 4 exits, the model has 1"):
        fake_runner([0.9]).monitor = monitor
    with pytest.raises(OptionError, match="different numbers of exits"):
        Monitor(BASELINE, sources={"kiosk": Baseline((1, 1), 0.01)})
    with pytest.raises(OptionError, match="sources alone"):
        Monitor(sources={"kiosk": BASELINE})
    with pytest.raises(OptionError, match="take the place"):
        monitor_of().renew(BASELINE, "kiosk")
