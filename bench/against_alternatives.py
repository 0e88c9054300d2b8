"""offramp against everything a user could pick instead: same weights, same sentences, same process, interleaved.

Physics: a row that leaves after a third of the layers should cost a third. What is in the way differs: an If in ONNX
Runtime stops fusion and packing at its border and takes one branch for the whole batch; PyTorch pays its dispatcher
for every operator of a short sentence and one synchronisation an exit; a batch that leaves together waits for its
least sure row, so of 32 rows hardly any batch leaves early; a static model pays nothing and answers worse. offramp
pays per segment for a call, a gather and a score head (bench/chain_vs_uncut.py), and runs later segments on smaller
batches, where a matrix product is less efficient.

Measured: wall time of whole calls, from numpy inputs to predictions and exits, interleaved call by call, so every
alternative finds the caches as another left them; `in_a_row_ms` is the median where the alternative before is itself.
Requests are test sentences in their order, padded to the longest of their request, one request at a time. jitter is
p99 - p50. A speedup is a quotient of means. Before anything is timed, every alternative must have answered all test
rows as the policy says. Thresholds are chosen on validation sentences; accuracy is that of the test sentences. An INT8
runner has the thresholds of FP32 in the table and its own in the frontier. torch's OpenMP threads sleep between
regions (OMP_WAIT_POLICY), because spinning ones would slow whatever is timed next. Sessions of ONNX Runtime have all
of its optimisations and the threads and spinning of offramp's engines; `uncut, offramp's session options` is what is
left of the difference when the user knows them.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from alternatives import (
    EAGER_ROWS,
    IF_GRAPH,
    INT8,
    OFFRAMP,
    PER_ROW,
    UNCUT,
    Alternative,
    check,
    open_alternatives,
    plain_policy,
    runner_answer,
    uncut_alternative,
)
from frontier import Point, accuracy_at, draw_frontier, measure_frontier, record
from machine import describe_machine
from poisson import measure_poisson
from subject import DEMO, Subject, demo_subject, tiny_subject
from timed import progress, time_requests

from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.trace import Trace
from offramp.tuning.replay import mean_depth, replay

BATCHES = (1, 8, 32)
NEVER = 1.0  # a threshold that no score reaches, on an exit that is open
WORST_CASE_OPENINGS = 3  # where weights land in memory moves a ratio by a percent

Accuracies = dict[str, dict[int, float]]  # alternative -> rows a request -> accuracy


@dataclass(frozen=True)
class Plan:
    """How long and on what to measure."""

    threads: tuple[int, ...]
    seconds: float  # per number of threads and size of request
    compiles: bool


def measure(subject: Subject, plan: Plan) -> dict[str, Any]:
    """All results of one run, as JSON values."""
    validation, test = record(subject, subject.validation), record(subject, subject.test)
    policy, source = plain_policy(subject, validation)
    decided = replay(policy, test)
    result: dict[str, Any] = {
        "rows": len(test.labels),
        "policy": {"from": source, "score": policy.score, "thresholds": policy.limits},
        "mean_depth": round(mean_depth(decided.exit_index), 3),
        "exit_shares": (np.bincount(decided.exit_index, minlength=test.num_exits) / len(test.labels)).round(4).tolist(),
        "threads": {},
        "did_not_run": {},
    }
    accuracies: Accuracies = {}
    for threads in plan.threads:
        progress(f"opening everything with {threads} threads")
        with open_alternatives(subject, policy, threads, plan.compiles) as opened:
            result["did_not_run"] |= opened.missing
            accuracies = accuracies or check_all(opened.alternatives, policy, test, subject)
            result["threads"][str(threads)] = time_all(opened.alternatives, accuracies, subject, plan.seconds)
            if threads == plan.threads[-1]:
                alone = {name: found[1] for name, found in accuracies.items()}
                points = measure_frontier(subject, opened, alone, threads, plan.seconds)
    result["frontier"] = [point._asdict() for point in points]
    result["worst_case"] = [worst_case(subject, test, threads, plan.seconds) for threads in plan.threads]
    result["poisson"] = measure_poisson(subject, policy, plan.threads[-1], plan.seconds)
    result["did_not_run"] |= result["poisson"].pop("did_not_run", {})
    result["claims"] = claims(result, points)
    return result


def check_all(alternatives: Sequence[Alternative], policy: Policy, test: Trace, subject: Subject) -> Accuracies:
    """Accuracy of every alternative; what leaves together answers every size of request differently."""
    accuracies: Accuracies = {}
    for alternative in alternatives:
        sizes = BATCHES[1:] if not alternative.alone else BATCHES[:1] if not alternative.batched else (8,)
        checked = {b: check(alternative, policy, test, subject.requests(b), progress) for b in sizes}
        accuracies[alternative.name] = {b: checked.get(b, checked[sizes[0]]) for b in BATCHES}
        progress(f"{alternative.name}: checked, accuracy {checked[sizes[0]]:.3f}")
    return accuracies


def time_all(
    alternatives: Sequence[Alternative], accuracies: Accuracies, subject: Subject, seconds: float
) -> dict[str, dict[str, Any]]:
    """Figures by alternative and size of request, as far as it makes sense for them."""
    found: dict[str, dict[str, Any]] = {a.name: {"rule": a.rule} for a in alternatives}
    for batch in BATCHES:
        answers = {a.name: a.answer for a in alternatives if (a.alone if batch == 1 else a.batched)}
        for name, times in time_requests(answers, subject.requests(batch), seconds).items():
            found[name][f"batch_{batch}"] = times | {"accuracy": accuracies[name][batch]}
    return found


def worst_case(subject: Subject, test: Trace, threads: int, seconds: float) -> dict[str, Any]:
    """What it costs when every exit is open and no row ever leaves early: chain ÷ uncut, one row a request."""
    never = Policy.thresholds("max_prob", [NEVER] * (test.num_exits - 1))
    if (replay(never, test).exit_index < test.num_exits - 1).any():
        raise SystemExit(f"a row of the test data is sure to {NEVER} at an early exit: it is no worst case")
    openings = []
    for _ in range(WORST_CASE_OPENINGS):
        uncut = uncut_alternative(subject, threads)
        with Runner.open(subject.bundle, "onnxruntime", never, threads) as runner:
            answers = {UNCUT: uncut.answer, "never leaving": runner_answer(runner)}
            found = time_requests(answers, subject.requests(1), seconds / WORST_CASE_OPENINGS)
        openings.append({key: found["never leaving"][key] / found[UNCUT][key] for key in ("p50_ms", "p99_ms")})
    return {
        "threads": threads,
        "rounds": found[UNCUT]["rounds"],
        "p50_ratio": round(float(np.median([opening["p50_ms"] for opening in openings])), 4),
        "p99_ratio": round(float(np.median([opening["p99_ms"] for opening in openings])), 4),
        "p99_ratios": [round(opening["p99_ms"], 4) for opening in openings],
    }


def claims(result: dict[str, Any], points: Sequence[Point]) -> dict[str, Any]:
    """The ratios that offramp is judged by, of mean times of one row."""
    claimed: dict[str, Any] = {}
    for threads, found in result["threads"].items():
        ours = found[OFFRAMP]["batch_1"]
        against = {name: found[name]["batch_1"]["mean_ms"] / ours["mean_ms"] for name in (UNCUT, EAGER_ROWS, IF_GRAPH)}
        claimed[f"{threads} threads"] = {f"faster than {name}": round(ratio, 3) for name, ratio in against.items()}
    top = next(point for point in points if point.name == UNCUT)
    for curve in (OFFRAMP, INT8):
        within = [p for p in points if p.name == curve and p.accuracy >= top.accuracy - 0.01]
        if within:
            best = min(within, key=lambda point: point.mean_ms)
            claimed[f"{curve}, at most one point less accurate than uncut"] = {
                "faster than uncut": round(top.mean_ms / best.mean_ms, 3),
                "accuracy": best.accuracy,
                "max_drop": best.max_drop,
            }
    statics = [point for point in points if point.name.startswith(("cut after", "static"))]
    claimed["accuracy at the same mean time"] = {
        point.name: {"its own": point.accuracy, OFFRAMP: accuracy_at(points, OFFRAMP, point.mean_ms)}
        for point in statics
    }
    return claimed


def table(result: dict[str, Any], threads: str) -> list[str]:
    """The figures of one number of threads in Markdown."""
    found = result["threads"][threads]
    slowest = found[UNCUT]["batch_1"]["mean_ms"]
    lines = [
        f"{threads} threads, {result['rows']} rows, policy {result['policy']['from']}, "
        f"mean depth {result['mean_depth']}",
        "",
        "| | leaves | accuracy | mean ms | p50 | p95 | p99 | jitter | speedup | in a row, p50 | rows/s at 8 | at 32 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rules = {PER_ROW: "row", "the batch leaves together": "batch"}
    for name, figures in found.items():
        one = figures.get("batch_1", {})
        keys = ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "jitter_ms")
        cells = [f"{one[key]:.2f}" if one else "n/a" for key in keys]
        cells.append(f"{slowest / one['mean_ms']:.2f}x" if one else "n/a")
        cells.append(f"{one['in_a_row_ms']:.2f}" if one else "n/a")
        batches = [figures.get(f"batch_{batch}", {}) for batch in BATCHES]
        cells += [f"{batch['rows_per_s']:.0f}" if batch else "n/a" for batch in batches[1:]]
        accuracy = " / ".join(sorted({f"{batch['accuracy']:.3f}" for batch in batches if batch}, reverse=True))
        lines.append(f"| {name} | {rules.get(figures['rule'], '-')} | {accuracy} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print progress and tables to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "checkpoint", help="the same weights in torch")
    parser.add_argument("--static-bundle", type=Path, default=DEMO / "static-bundle", help="a smaller model, no exits")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=40.0, help="per number of threads and size of request")
    parser.add_argument("--rows", type=int, help="only about so many rows: for trying out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="also write this JSON file, and an .svg beside it")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows the script, no result")
    options = parser.parse_args()
    machine, started = describe_machine(), time.monotonic()
    threads = tuple(int(number) for number in options.threads.split(","))
    with tempfile.TemporaryDirectory(prefix="offramp-bench-") as folder:
        if options.quick:
            subject, plan = tiny_subject(Path(folder)), Plan(threads[-1:], 0.05, compiles=False)
        else:
            subject = demo_subject(options.bundle, options.checkpoint, options.static_bundle)
            plan = Plan(threads, options.seconds, not options.no_compile)
        result = measure(subject.first_rows(options.rows) if options.rows else subject, plan)
    result = {"bench": "against_alternatives", "model": subject.name, "machine": machine} | result
    result["seconds"] = round(time.monotonic() - started)
    for number in result["threads"]:
        progress("\n".join(["", *table(result, number)]))
    progress("\n".join(["", *(f"{name}: {reason}" for name, reason in result["did_not_run"].items())]))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        points = [Point(**point) for point in result["frontier"]]
        title = f"{subject.name}, one row a request, CPU threads: {threads[-1]}, {machine['cpu']}"
        draw_frontier(points, options.output.with_suffix(".svg"), title, result["rows"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
