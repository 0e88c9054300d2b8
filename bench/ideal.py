"""Wall time of the runner ÷ ideal: the sum, over rows, of the standalone time of the segments that they ran.

Physics: the ideal pays for engines only. The runner adds its checks, decisions, compaction and writing, in Python, with
whatever the segments pushed out of the caches; a segment may also find its carry colder than when it is asked alone.
At batch 32 the ideal is every segment alone at the number of rows that really reach it, so what is lost by smaller
products is not in the ratio; that is in rows per second (bench/against_alternatives.py).

Measured: for each request, one call of the runner and one call of every segment on the carry and rows that the runner
gives it, in turn; sums of medians over the rounds. Targets: 1.05 at batch 1, 1.10 at batch 32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from subject import DEMO, Inputs, Subject, demo_subject, tiny_subject
from timed import num_rows, progress

from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.timing import interleaved_ms

TARGETS = {1: 1.05, 32: 1.10}  # rows a request -> ratio
ROUNDS, WARMUP = 7, 2


def standalone_calls(runner: Runner, inputs: Inputs) -> tuple[list[Callable[[], object]], int]:
    """A call per segment, on what the runner gives it for `inputs`, and the number of segments that it runs.

    Segments that no row reaches are there too, on one row: they keep the caches as a pass to full depth leaves them.
    """
    exit_index = runner.run(inputs).exit_index
    inverse = runner.policy.inverse_temperatures(len(runner.engines))
    live = rows = np.arange(num_rows(inputs))
    carry: Any = inputs
    calls: list[Callable[[], object]] = []
    for k, engine in enumerate(runner.engines):
        if k:
            staying = exit_index[live] >= k
            rows = np.flatnonzero(staying) if staying.any() else np.zeros(1, np.int64)
            live = live[rows]
        calls.append(lambda engine=engine, carry=carry, rows=rows, k=k: engine.run(carry, rows, inverse[k]))
        carry = engine.run(carry, rows, inverse[k]).carry
    return calls, int(exit_index.max()) + 1


def measure(runner: Runner, requests: list[Inputs], rounds: int) -> dict[str, float]:
    """Milliseconds over all `requests`, by the runner and ideally."""
    wall_ms = ideal_ms = 0.0
    for inputs in requests:
        calls, depth = standalone_calls(runner, inputs)
        callables = {"runner": lambda inputs=inputs: runner.run(inputs)}
        callables |= {str(k): call for k, call in enumerate(calls)}
        medians = {name: float(np.median(times)) for name, times in interleaved_ms(callables, rounds, WARMUP).items()}
        wall_ms += medians["runner"]
        ideal_ms += sum(medians[str(k)] for k in range(depth))
    return {"wall_ms": round(wall_ms, 3), "ideal_ms": round(ideal_ms, 3), "ratio": round(wall_ms / ideal_ms, 4)}


def measure_subject(subject: Subject, threads: list[int], max_requests: dict[int, int], rounds: int) -> list[Any]:
    """One case per number of threads, policy and size of request."""
    cases = []
    for number in threads:
        with Runner.open(subject.bundle, "onnxruntime", threads=number) as runner:
            for name, policy in (("the bundle's", runner.policy), ("full depth", Policy.full_depth())):
                runner.policy = policy
                for batch, target in TARGETS.items():
                    requests = [r for r in subject.requests(batch) if num_rows(r) == batch][: max_requests[batch]]
                    found = measure(runner, requests, rounds)
                    cases.append({"threads": number, "policy": name, "batch": batch, "requests": len(requests)} | found)
                    progress(f"{number} threads, batch {batch}, policy {name}: {found['ratio']:.3f}, target {target}")
    return cases


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--requests", type=int, default=200, help="of one row; of 32 rows all that the test data has")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows the script, no result")
    options = parser.parse_args()
    threads = [int(number) for number in options.threads.split(",")]
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="offramp-bench-") as folder:
        if options.quick:
            subject = tiny_subject(Path(folder))
            cases = measure_subject(subject, [1], {1: 4, 32: 1}, 3)
        else:
            subject = demo_subject(options.bundle)
            cases = measure_subject(subject, threads, {1: options.requests, 32: options.requests}, ROUNDS)
    worst = {f"worst_ratio_batch_{b}": max(case["ratio"] for case in cases if case["batch"] == b) for b in TARGETS}
    print(json.dumps({"bench": "ideal", "model": subject.name, "machine": machine, **worst, "cases": cases}))


if __name__ == "__main__":
    main()
