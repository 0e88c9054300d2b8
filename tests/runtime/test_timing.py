import gc

import numpy as np
import pytest

from offramp.errors import OptionError
from offramp.runtime.timing import interleaved_ms, summary


class FakeClock:
    """A clock that moves only when a callable says so."""

    def __init__(self):
        self.now_ns = 0
        self.calls = []

    def __call__(self):
        return self.now_ns

    def taking(self, name, *durations_ms):
        """A callable that takes the next of `durations_ms`, the last one over and over."""
        left = list(durations_ms)

        def run():
            self.calls.append(name)
            self.now_ns += int((left.pop(0) if len(left) > 1 else left[0]) * 1e6)

        return run


def test_times_are_milliseconds_in_order_and_warm_up_is_left_out():
    clock = FakeClock()
    callables = {"a": clock.taking("a", 50, 1, 2, 3), "b": clock.taking("b", 70, 0.5)}
    times_ms = interleaved_ms(callables, repetitions=3, warmup=1, clock=clock)
    assert {name: values.tolist() for name, values in times_ms.items()} == {"a": [1, 2, 3], "b": [0.5] * 3}


def test_rounds_are_interleaved_and_rotate():
    clock = FakeClock()
    callables = {name: clock.taking(name, 1) for name in "abc"}
    interleaved_ms(callables, repetitions=4, warmup=2, clock=clock)
    assert "".join(clock.calls) == "bca" + "cab" + "abc" + "bca" + "cab" + "abc"


@pytest.mark.parametrize("was_on", [True, False])
def test_the_garbage_collector_is_off_meanwhile_and_then_as_before(was_on):
    seen = []
    try:
        if not was_on:
            gc.disable()
        interleaved_ms({"a": lambda: seen.append(gc.isenabled())}, repetitions=2, warmup=1)
        assert gc.isenabled() is was_on
    finally:
        gc.enable()
    assert seen == [False, False, False]


def test_the_garbage_collector_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        interleaved_ms({"a": lambda: 1 // 0}, repetitions=1, warmup=0)
    assert gc.isenabled()


def test_the_real_clock_moves():
    times_ms = interleaved_ms({"a": lambda: sum(range(1000))}, repetitions=5, warmup=0)
    assert (times_ms["a"] > 0).all()


@pytest.mark.parametrize(("names", "repetitions", "warmup"), [("", 1, 0), ("a", 0, 0), ("a", 1, -1)])
def test_nothing_to_time_is_an_option_error(names, repetitions, warmup):
    with pytest.raises(OptionError, match="expected at least 1, 1 and 0"):
        interleaved_ms({name: list for name in names}, repetitions, warmup)


def test_summary_by_hand():
    expected = {"mean_ms": 51.0, "p50_ms": 51.0, "p95_ms": 96.0, "p99_ms": 100.0, "jitter_ms": 49.0}
    assert summary(np.arange(1.0, 102.0)) == expected
