"""Placement: how long the choice takes for 12 exits, and whether a placed bundle keeps its word on the clock.

Physics: an exit costs every row that passes it a head, a score head, a second call and a cold start of both, a few
percent of a small model; it saves the rest of the model for the rows that leave. Dropping one that few rows use, or
that its neighbour nearly replaces, is a gain that thresholds alone cannot have: a closed exit still costs. Under a
bound on full depth exits must go that would pay, and the mean rises.

Measured: (1) `place` on simulated traces of 12 exits; the target is 10 s. (2) On the demo bundle, exits and thresholds
chosen on the validation rows for several bounds; the bundle cut again; then, in one process and interleaved row by
row, the uncut model, the bundle with all exits under the best thresholds for them within the same risk, the placed one,
and full depth of both. Single test rows, all ONNX Runtime FP32 with the same session options. `mean_ms` is over all
calls, `quiet_ms` over the fastest of REPEATS of every row. Accuracy and consistency (share of the answers that are the
uncut model's) are over all test rows. Target: placed is never slower than all exits where full depth is not bound.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from coverage import trace_from_logits
from machine import describe_machine
from subject import DEMO, Inputs, Subject, demo_subject, tiny_subject
from timed import WARMUP, Asking, figures, progress

from offramp.bundle import load_manifest, read_policy
from offramp.commands.exit_costs import measured_costs
from offramp.commands.uncut import load_reference, uncut_call
from offramp.export.export_bundle import ExportOptions, Extras, export_bundle
from offramp.export.recut import source_from_bundle, with_exits
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.timing import interleaved_ms
from offramp.trace import Trace
from offramp.tuning.placement import place
from offramp.tuning.placement_data import Costs, Placement, PlacementOptions

REPEATS = 3
SLOWER = 1.01  # two runs of the same bundle differ by so much
TARGET_SECONDS = 10.0


def simulated_trace(num_rows: int, num_exits: int, seed: int) -> Trace:
    """Two classes; rows that are hard at one exit are hard at the others, and later exits are right more often."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, num_rows)
    hardness = random.normal(size=num_rows)
    depth = (1 + np.arange(num_exits)) / num_exits
    signal = 2.5 * depth * (1 + hardness[:, None] / 2) + random.normal(size=(num_rows, num_exits))
    logits = np.zeros((num_rows, num_exits, 2), np.float32)
    logits[np.arange(num_rows), :, labels] = signal
    return trace_from_logits(logits, labels)


def time_search(num_rows: int, num_exits: int, seeds: range) -> list[dict[str, Any]]:
    """Seconds of `place` on simulated traces, and what it came to."""
    found = []
    for seed in seeds:
        trace = simulated_trace(num_rows, num_exits, seed)
        costs = Costs((1.0,) * num_exits, (0.15,) * (num_exits - 1), num_exits - 0.15 * (num_exits - 1))
        start, used = time.perf_counter(), time.process_time()
        placement = place(trace, costs, PlacementOptions(max_worst_case=1.1))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - used
        progress(f"{num_exits} exits, {num_rows} rows: {seconds:.2f} s, exits {placement.kept}")
        found.append(
            {
                "rows": num_rows,
                "exits": num_exits,
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu_seconds, 2),
                "combinations": placement.combinations,
                "expected": round(placement.expected_ms, 4),
                "all_exits": round(placement.all_exits_ms, 4),
            }
        )
    return found


def cut_again(bundle: Path, placement: Placement, folder: Path) -> Path:
    """The bundle with the kept exits, FP32 only; the old one where it has no others."""
    manifest = load_manifest(bundle)
    if len(placement.kept) == len(manifest.exits):
        return bundle
    source = source_from_bundle(bundle, manifest, load_reference(bundle, manifest))
    placed = folder / "-".join(map(str, ("placed", *placement.kept)))
    if placed.is_dir():
        return placed
    export_bundle(with_exits(source, placement.kept), placed, ExportOptions("fp32"), extras=Extras(placement.policy))
    return placed


def judge(subject: Subject, placement: Placement, everything: Placement, folder: Path, num_rows: int) -> dict[str, Any]:
    """Times, accuracy and consistency of a placement and of all exits on the test rows."""
    placed = cut_again(subject.bundle, placement, folder)
    opened = {
        "all exits": Runner.open(subject.bundle, "onnxruntime", everything.policy, precision="fp32"),
        "placed": Runner.open(placed, "onnxruntime", placement.policy, precision="fp32"),
        "all exits, full depth": Runner.open(subject.bundle, "onnxruntime", never(everything), precision="fp32"),
        "placed, full depth": Runner.open(placed, "onnxruntime", never(placement), precision="fp32"),
    }
    call = uncut_call(subject.bundle, opened["all exits"], 0)
    assert call, "the whole graph lies beside the bundle that was placed from it"
    answers: dict[str, Callable[[Inputs], Any]] = {"uncut": lambda inputs: call(inputs)[0].argmax(axis=1)}
    answers |= {name: lambda inputs, runner=runner: runner.run(inputs).prediction for name, runner in opened.items()}
    expected = np.concatenate([answers["uncut"](batch) for batch in subject.test.batches])
    requests = subject.requests(1)
    rows = [requests[place] for place in np.linspace(0, len(requests) - 1, min(num_rows, len(requests))).astype(int)]
    found: dict[str, Any] = {}
    times = time_rows(answers, rows)
    for name, answer in answers.items():
        said = np.concatenate([answer(batch) for batch in subject.test.batches])
        found[name] = times[name] | {
            "accuracy": round(float((said == subject.test.labels).mean()), 4),
            "consistency": round(float((said == expected).mean()), 4),
        }
    for runner in opened.values():
        runner.close()
    return found


def never(placement: Placement) -> Policy:
    """A policy that decides everywhere and lets nobody leave: full depth as it costs in service."""
    num_exits = len(placement.kept)
    return Policy.thresholds("max_prob", [1.0] * (num_exits - 1), [1e3] * num_exits)


def time_rows(answers: dict[str, Callable[[Inputs], Any]], rows: list[Inputs]) -> dict[str, dict[str, float]]:
    """Every alternative on every row REPEATS times, interleaved."""
    asking = {name: Asking(answer, rows) for name, answer in answers.items()}
    times = interleaved_ms(asking, REPEATS * len(rows), WARMUP)
    return {
        name: figures(taken, 1) | {"quiet_ms": round(float(taken.reshape(REPEATS, -1).min(axis=0).mean()), 4)}
        for name, taken in times.items()
    }


def place_and_judge(
    subject: Subject, settings: list[PlacementOptions], num_rows: int, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The measured costs, and a placement for every setting, judged on the clock."""
    with Runner.open(subject.bundle, "onnxruntime", Policy.full_depth(), precision="fp32") as runner:
        temperatures = Policy.from_json(read_policy(subject.bundle, load_manifest(subject.bundle))).temperatures
        trace = runner.record(subject.validation.batches, subject.validation.labels, temperatures)
        measured = measured_costs(subject.bundle, runner, subject.requests(1)[:num_rows][:48], 0, progress)
    found = []
    all_early = tuple(range(trace.num_exits - 1))
    for options in settings:
        placement = place(trace, measured.costs, options, temperatures)
        forced = replace(options, is_chosen=False, keep=all_early)
        everything = place(trace, measured.costs, forced, temperatures)
        progress(f"risk {options.max_risk}, full depth {options.max_worst_case}: exits {placement.kept}")
        judged = judge(subject, placement, everything, folder, num_rows)
        bound = options.max_worst_case
        found.append(
            {
                "max_risk": options.max_risk,
                "max_worst_case": bound if math.isfinite(bound) else None,
                "kept": placement.kept,
                "is_complete": placement.is_complete,
                "expected_ms": round(placement.expected_ms, 4),
                "expected_all_exits_ms": round(placement.all_exits_ms, 4),
                "held_out_ms": round(placement.held_out_ms, 4),
                "held_out_risk": round(placement.held_out_risk, 4),
                "predicted_worst_case": round(placement.worst_case, 4),
                "measured_worst_case": ratio(judged, "placed, full depth", "uncut"),
                "placed_over_all_exits": ratio(judged, "placed", "all exits"),
                "speedup": ratio(judged, "uncut", "placed"),
                "alternatives": judged,
            }
        )
    costs = {
        "segments_ms": [round(ms, 4) for ms in measured.costs.segments_ms],
        "exits_ms": [round(ms, 4) for ms in measured.costs.exits_ms],
        "uncut_ms": round(measured.costs.uncut_ms, 4),
        "residual": round(measured.residual, 4),
    }
    return costs, found


def ratio(judged: dict[str, Any], one: str, other: str) -> float:
    return round(judged[one]["quiet_ms"] / judged[other]["quiet_ms"], 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--rows", type=int, default=300, help="test rows to time")
    parser.add_argument("--output", type=Path, help="write the results here, too")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rows: shows the script, no result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            subject = tiny_subject(Path(folder))
            searched = time_search(600, 5, range(1))
            settings = [PlacementOptions(max_risk=0.2, max_worst_case=math.inf)]
        else:
            subject = demo_subject(options.bundle)
            searched = time_search(20_000, 12, range(3))
            settings = [
                PlacementOptions(max_risk=risk, max_worst_case=bound)
                for risk, bound in ((0.005, math.inf), (0.01, math.inf), (0.02, math.inf), (0.01, 1.05))
            ]
        costs, judged = place_and_judge(subject, settings, 12 if options.quick else options.rows, Path(folder))
    free = [one for one in judged if one["max_worst_case"] is None]
    summary = {
        "bench": "placement",
        "machine": describe_machine(),
        "model": subject.name,
        "search": searched,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "search_within_target": max(one["seconds"] for one in searched) <= TARGET_SECONDS,
        "costs": costs,
        "placements": judged,
        "never_slower_than_all_exits": all(one["placed_over_all_exits"] <= SLOWER for one in free),
    }
    if options.output:
        options.output.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    sys.exit(main())
