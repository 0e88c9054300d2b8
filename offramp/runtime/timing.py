"""Timing: several callables measured side by side, so that a slow second of the machine hits all of them.

Numpy only. It measures wall-clock time of whole calls; it does not know what they do.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from offramp.errors import OptionError

Clock = Callable[[], int]  # nanoseconds since any fixed moment


def interleaved_ms(
    callables: Mapping[str, Callable[[], object]],
    repetitions: int,
    warmup: int,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, NDArray[np.float64]]:
    """Time every callable `repetitions` times, in rounds that call each of them once.

    Every round begins with the next callable, so that none is always the first or the last. `warmup` rounds
    go untimed before. The garbage collector is off meanwhile. Returns milliseconds, (repetitions,) per name.
    Raises OptionError when there is nothing to time.
    """
    if not callables or repetitions < 1 or warmup < 0:
        raise OptionError(
            f"timing: got {len(callables)} callables, {repetitions} repetitions and {warmup} warm-up rounds, "
            f"expected at least 1, 1 and 0"
        )
    names = list(callables)
    times_ms = {name: np.empty(repetitions) for name in names}
    with _garbage_collector_off():
        for current in range(-warmup, repetitions):
            for offset in range(len(names)):
                name = names[(current + offset) % len(names)]
                start = clock()
                callables[name]()
                elapsed = clock() - start
                if current >= 0:
                    times_ms[name][current] = elapsed / 1e6
    return times_ms


def summary(times_ms: NDArray[np.float64]) -> dict[str, float]:
    """Mean, median, 95th and 99th percentile of times_ms (R,), R >= 1, and the jitter: p99 - p50."""
    p50, p95, p99 = np.percentile(times_ms, [50, 95, 99]).tolist()
    mean = float(times_ms.mean())
    return {"mean_ms": mean, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "jitter_ms": p99 - p50}


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    """Collect once, then hold the garbage collector off for the block."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
