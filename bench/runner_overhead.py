"""What the runner itself costs per segment, beside the engines. Budget: 50 us per segment at batch 1.

Physics: nothing here computes a model. A pass over E segments does, in Python, the checks of the request
once (one numpy reduction reads 24 numbers in about 1 us, nearly all of it the call), and per segment one
`decide`, one nonzero, one gather of positions, and one write where rows leave: a handful of numpy calls of
0.2 to 1 us each, whatever the batch. Beside segments of milliseconds on a CPU that is noise; on a GPU, where
they take a fraction of one, it is percents: hence the budget.

Measured: the median of `runner.run` with FakeEngines, minus that of the same engine calls in a bare loop,
interleaved call by call; all exits are open and nobody leaves early, so that every decision is taken.
"""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import numpy as np

from offramp.bundle import InputSpec
from offramp.policy import Policy
from offramp.runtime import Runner, fake_runner
from offramp.runtime.inputs import checked_inputs
from offramp.runtime.timing import interleaved_ms

LENGTH = 24  # tokens of a usual sentence
INPUTS = (
    InputSpec("input_ids", "int64", ("rows", "sequence"), 0, 30521, False),
    InputSpec("attention_mask", "int64", ("rows", "sequence"), 0, 1, True),
)


def engines_alone(runner: Runner, inputs: dict[str, Any]) -> None:
    """The engine calls of a pass with no exit taken, and nothing else."""
    carry: Any = inputs
    rows = np.arange(len(inputs["input_ids"]))
    for engine in runner.engines:
        carry = engine.run(carry, rows, np.float32(1)).carry


def measure(num_segments: int, num_rows: int, repetitions: int) -> dict[str, float]:
    """Medians in microseconds for one number of segments and one batch."""
    policy = Policy.thresholds("max_prob", [0.9] * (num_segments - 1))
    runner = fake_runner([0.6] * num_segments, policy, INPUTS)
    shape = (num_rows, LENGTH)
    inputs = {"input_ids": np.full(shape, 2026), "attention_mask": np.ones(shape, np.int64)}
    times_ms = interleaved_ms(
        {
            "whole": lambda: runner.run(inputs),
            "engines": lambda: engines_alone(runner, inputs),
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


def main() -> None:
    """Print a line per case, and at the end one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3000)
    repetitions = parser.parse_args().repetitions
    cases = [measure(segments, rows, repetitions) for rows in (1, 32) for segments in (1, 3, 6)]
    for case in cases:
        print("  ".join(f"{name} {value}" for name, value in case.items()))
    at_batch_1 = {case["segments"]: case["own_us"] for case in cases if case["batch"] == 1}
    summary = {
        "bench": "runner_overhead",
        "machine": f"{platform.machine()} {platform.python_version()} numpy {np.__version__}",
        "worst_us_per_segment_batch_1": max(c["own_us_per_segment"] for c in cases if c["batch"] == 1),
        "three_segments_us_per_segment": round(at_batch_1[3] / 3, 1),
        "further_segment_us": round((at_batch_1[6] - at_batch_1[1]) / 5, 1),
        "budget_us_per_segment": 50,
        "cases": cases,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
