"""What the runner itself costs per segment, beside the engines. Budget: 25 us at batch 1, 60 us at batch 64.

Physics: nothing here computes a model. A pass over E segments does, in Python, the checks of the request
once (one numpy reduction reads 24 numbers in about 1 us, nearly all of it the call), and per segment one
`decide`, and where rows leave one nonzero, one gather of positions, and one write: a handful of numpy calls of
0.2 to 1 us each, whatever the batch, and a Python assignment per row that leaves. Beside segments of milliseconds
on a CPU that is noise; on a GPU, where they take a fraction of one, it is percents: hence the budget. Beside real
engines the same code runs with cold caches and costs five times as much (docs/log.md).

Measured: the median of `runner.run` with FakeEngines, minus that of the same engine calls in a bare loop,
interleaved call by call. All exits are open; at batch 1 nobody leaves early, at larger batches an equal share of the
rows leaves at every exit, so that every decision is taken and every write is made.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from offramp.bundle import InputSpec
from offramp.policy import Policy
from offramp.runtime import Runner, fake_runner
from offramp.runtime.fake import logits_from_max_prob
from offramp.runtime.inputs import checked_inputs
from offramp.runtime.timing import interleaved_ms

LENGTH = 24  # tokens of a usual sentence
INPUTS = (
    InputSpec("input_ids", "int64", ("rows", "sequence"), 0, 30521, False),
    InputSpec("attention_mask", "int64", ("rows", "sequence"), 0, 1, True),
)


def answer(exit_index: int, num_segments: int, num_rows: int) -> Callable[[dict[str, Any]], Any]:
    """Sure of the rows whose turn it is to leave at `exit_index`; the first token of a row is its number."""
    sure, unsure = logits_from_max_prob([0.95, 0.6], 2)
    leaving = num_rows if num_rows == 1 else (exit_index + 1) * num_rows // num_segments
    table = np.where((np.arange(num_rows) < leaving)[:, None] & (num_rows > 1), sure, unsure)
    return lambda inputs: table[inputs["input_ids"][:, 0]]


def rows_per_segment(runner: Runner, inputs: dict[str, Any]) -> list[np.ndarray]:
    """The rows that every engine is asked for in one pass of the runner."""
    for engine in runner.engines:
        engine.calls.clear()
    runner.run(inputs)
    return [call.rows for engine in runner.engines for call in engine.calls]


def engines_alone(runner: Runner, inputs: dict[str, Any], rows: list[np.ndarray]) -> None:
    """The engine calls of a pass and nothing else."""
    carry: Any = inputs
    for engine, chosen in zip(runner.engines, rows, strict=False):
        carry = engine.run(carry, chosen, np.float32(1)).carry


def measure(num_segments: int, num_rows: int, repetitions: int) -> dict[str, float]:
    """Medians in microseconds for one number of segments and one batch."""
    policy = Policy.thresholds("max_prob", [0.9] * (num_segments - 1))
    answers = [answer(k, num_segments, num_rows) for k in range(num_segments)]
    runner = fake_runner(answers, policy, INPUTS)
    inputs = {
        "input_ids": np.repeat(np.arange(num_rows)[:, None], LENGTH, axis=1),
        "attention_mask": np.ones((num_rows, LENGTH), np.int64),
    }
    rows = rows_per_segment(runner, inputs)
    times_ms = interleaved_ms(
        {
            "whole": lambda: runner.run(inputs),
            "engines": lambda: engines_alone(runner, inputs, rows),
            "checks": lambda: checked_inputs(inputs, runner.manifest),
        },
        repetitions=repetitions,
        warmup=100,
    )
    whole_us, engines_us, checks_us = (float(np.median(times)) * 1e3 for times in times_ms.values())
    own_us = whole_us - engines_us
    return {
        "segments": num_segments,
        "batch": num_rows,
        "own_us": round(own_us, 1),
        "checks_us": round(checks_us, 1),
        "own_us_per_segment": round(own_us / num_segments, 1),
    }


def profile(num_segments: int, num_rows: int) -> None:
    """Print where the time goes, function by function, for one case."""
    answers = [answer(k, num_segments, num_rows) for k in range(num_segments)]
    runner = fake_runner(answers, Policy.thresholds("max_prob", [0.9] * (num_segments - 1)), INPUTS)
    inputs = {name: np.ones((num_rows, LENGTH), np.int64) for name in ("input_ids", "attention_mask")}
    inputs["input_ids"] = np.repeat(np.arange(num_rows)[:, None], LENGTH, axis=1)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(3000):
        runner.run(inputs)
    profiler.disable()
    pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(14)


def main() -> None:
    """Print a line per case, and at the end one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3000)
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows the script, no result")
    parser.add_argument("--profile", action="store_true", help="also print a profile of batch 1 and 64, 3 segments")
    options = parser.parse_args()
    repetitions = 20 if options.quick else options.repetitions
    cases = [measure(segments, rows, repetitions) for rows in (1, 64) for segments in (1, 3, 6)]
    if options.profile:
        profile(3, 1)
        profile(3, 64)
    for case in cases:
        print("  ".join(f"{name} {value}" for name, value in case.items()))
    at_batch_1 = {case["segments"]: case["own_us"] for case in cases if case["batch"] == 1}
    summary = {
        "bench": "runner_overhead",
        "machine": f"{platform.machine()} {platform.python_version()} numpy {np.__version__}",
        "worst_us_per_segment_batch_1": max(c["own_us_per_segment"] for c in cases if c["batch"] == 1),
        "three_segments_us_per_segment": round(at_batch_1[3] / 3, 1),
        "further_segment_us": round((at_batch_1[6] - at_batch_1[1]) / 5, 1),
        "budget_us_per_segment_batch_1": 25,
        "worst_us_per_segment_batch_64": max(c["own_us_per_segment"] for c in cases if c["batch"] == 64),
        "budget_us_per_segment_batch_64": 60,
        "cases": cases,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
