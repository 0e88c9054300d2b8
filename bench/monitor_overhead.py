"""What a monitor costs per request, beside the runner. Budget: 20 us at batch 1.

Physics: per request a monitor takes a lock twice, makes one object, counts a row in five dictionaries and lists,
multiplies and adds one vector of 10 bets per exit, and compares a few numbers: some 6 us of Python with warm caches.
Beside a model the caches are cold: every object that is touched comes from memory, at about 0.1 us each. One row in
fifty is audited, which costs about 30 us more (not counted: the segments that it runs beyond where it would have left;
that is what an audit buys, and `bench/monitor.py` has its share). In full depth every row is.

Measured: `runner.run` with FakeEngines with a monitor and without one, interleaved call by call; every row goes to the
final exit on its own, so that an audit runs no segment more. Reported is the difference of the means, because what is
rare is dear: audits, and the thread switches of 8 threads. Cold: 42 MiB are read before every call, untimed. `without`
is what the runner itself costs, to be compared with `bench/runner_overhead.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from monitor import BASELINE, FINAL, monitored_runner
from numpy.typing import NDArray

from offramp.runtime import Baseline, Monitor, MonitorOptions, Runner
from offramp.runtime.monitor_states import FULL_DEPTH

COLD_BYTES = 42 * 2**20  # what a small encoder reads
CLOCK = time.thread_time_ns  # of this thread alone: others may use the machine meanwhile
BUDGET_US = 20.0
RESULTS = Path(__file__).parent / "results" / "monitor_overhead.json"


def in_full_depth() -> Monitor:
    """A monitor that has tripped, and stays so."""
    monitor = Monitor(BASELINE, MonitorOptions(cool_down=2**40))
    runner = monitored_runner(monitor)
    while monitor.state_of() != FULL_DEPTH:
        runner.run(request(1))
    return monitor


def request(num_rows: int) -> dict[str, Any]:
    """Rows that go to the final exit."""
    return {"x": np.full(num_rows, FINAL, np.float32)}


def times_us(
    runners: dict[str, Runner], num_rows: int, repetitions: int, before: Callable[[], object]
) -> dict[str, NDArray[np.float64]]:
    """Microseconds of requests to each runner, (repetitions,), interleaved; `before` every one, untimed."""
    names, asked = list(runners), request(num_rows)
    taken = {name: np.empty(repetitions) for name in names}
    gc.collect()
    gc.disable()
    for current in range(-50, repetitions):
        for offset in range(len(names)):
            name = names[(current + offset) % len(names)]
            before()
            start = CLOCK()
            runners[name].run(asked)
            elapsed = CLOCK() - start
            if current >= 0:
                taken[name][current] = elapsed / 1e3
            for engine in runners[name].engines:
                engine.calls.clear()
    gc.enable()
    return taken


def compared(num_rows: int, repetitions: int, before: Callable[[], object] = lambda: None) -> dict[str, float]:
    """What each kind of monitor adds to a request of `num_rows` rows."""
    steady = Baseline((0,) * FINAL + (10_000,), max_risk=0.02)  # every row goes to the end, as the baseline says
    runners = {
        "without": monitored_runner(None),
        "counting": monitored_runner(Monitor()),
        "watching": monitored_runner(Monitor(steady)),
        "full_depth": monitored_runner(in_full_depth()),
    }
    taken = times_us(runners, num_rows, repetitions, before)
    means = {name: float(np.sort(times)[: int(0.99 * len(times))].mean()) for name, times in taken.items()}
    medians = {name: float(np.median(times)) for name, times in taken.items()}
    adds = {name: round(means[name] - means["without"], 2) for name in list(runners)[1:]}
    adds |= {f"{name}_p50": round(medians[name] - medians["without"], 2) for name in list(runners)[1:]}
    return {"without": round(means["without"], 2), **adds}


def by_threads(num_threads: int, requests: int) -> float:
    """Microseconds of begin and observe per request, all threads together: the cost while others want the lock."""
    monitor = Monitor(Baseline((0,) * FINAL + (10_000,), max_risk=0.02))
    runner = monitored_runner(monitor)
    answer = runner.run(request(1))
    setting = runner.setting

    def work() -> None:
        for _ in range(requests // num_threads):
            monitor.observe(monitor.begin("", 1, setting), answer)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    start = time.process_time_ns()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return round((time.process_time_ns() - start) / 1e3 / requests, 2)


def main() -> None:
    """Print a line per case, and at the end one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows the script, no result")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    logging.disable()  # the alarm that brings a monitor to full depth
    repetitions = 50 if options.quick else 8000
    weights = np.zeros(COLD_BYTES // 8)
    summary: dict[str, Any] = {"bench": "monitor_overhead", "machine": describe_machine(), "budget_us": BUDGET_US}
    summary["batch_1_adds_us"] = compared(1, repetitions)
    summary["batch_1_cold_adds_us"] = compared(1, max(repetitions // 16, 10), weights.sum)
    summary["batch_64_adds_us"] = compared(64, max(repetitions // 8, 10))
    summary["threads_us"] = {str(n): by_threads(n, repetitions * 4) for n in (1, 2, 8, 32)}
    for name, found in summary.items():
        print(name, found)
    if options.save:
        RESULTS.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
