"""The main job, end to end, on real data: train, export, build, record, calibrate, certify, measure, report.

Each step is what the command of the same name does. Prints a table and writes demo/result.json and demo/report.html;
leaves the bundle, certified, in demo/bundle for `offramp run demo/bundle`. Finished training is kept: remove
demo/checkpoint to train again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from offramp.bundle import load_manifest
from offramp.commands.benchmark import compare, runner_answer, uncut_answer
from offramp.commands.dataset import ROTTEN_TOMATOES, load_dataset
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.tuning.replay import accuracy, exit_shares, mean_depth, replay

HERE = Path(__file__).parent
BUNDLE, STATIC = HERE / "bundle", HERE / "static-bundle"
EXITS = (0, 2, 4, 6)  # layers; 0 are the embeddings
# Accuracy on validation that the policy may cost. On sentences that did not choose them, thresholds of 1,000 lose about
# 0.75 points more (docs/log.md), so that 0 stays within one point on average.
MAX_DROP = 0.0
MAX_RISK = 0.01  # of the certificate: answers that differ from full depth's
NAIVE = 0.9  # the threshold that everybody takes
NUM_REQUESTS = 500


def main() -> None:
    started = time.monotonic()
    train("checkpoint", ",".join(map(str, EXITS)))
    # What one would deploy instead: two layers, trained on their own, no exits, with the head that suits so few.
    train("static-checkpoint", "2", "--pooling", "window")
    offramp("export", HERE / "checkpoint", "-o", BUNDLE, "--precision", "fp16,int8")
    offramp("export", HERE / "static-checkpoint", "-o", STATIC, "--precision", "fp32")
    built = json.loads(offramp("build-engine", BUNDLE, "--json", capture=True))
    offramp("trace", BUNDLE)
    offramp("calibrate", BUNDLE, "--max-drop", str(MAX_DROP))
    fastest = Policy.from_json((BUNDLE / "policy.json").read_bytes())
    offramp("calibrate", BUNDLE, "--max-risk", str(MAX_RISK), "--compare")
    offramp("report", BUNDLE, "-o", HERE / "report.html")
    result = measure(fastest)
    result["plans"] = [
        {
            "segment": plan["segment"],
            "backend": built["backend"],
            "precision": built["precision"],
            "bytes": plan["bytes"],
            "seconds": plan["seconds"],
        }
        for plan in built["segments"]
    ]
    result["seconds"] = time.monotonic() - started
    (HERE / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def train(name: str, exits: str, *options: str) -> None:
    """Train unless a finished checkpoint is there; go on where an interrupted run stopped."""
    path = HERE / name
    if (path / "calibration.jsonl").is_file():
        print(f"{path} is there: not training again", file=sys.stderr)
        return
    resume = ["--resume"] if (path / "training.pt").is_file() else []
    offramp("train", "-o", path, "--exits", exits, *options, *resume)


def offramp(*arguments: object, capture: bool = False) -> str:
    """Run one command of offramp in a process of its own; its stdout when captured."""
    command = [sys.executable, "-m", "offramp", *map(str, arguments)]
    print("$ offramp", *[os.path.relpath(a) if isinstance(a, Path) else a for a in arguments], file=sys.stderr)
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None)
    return done.stdout or ""


def measure(fastest: Policy) -> dict[str, Any]:
    """Accuracy and latency on the test sentences: uncut, static, and the bundle under three policies.

    `offramp` is the `fastest` one, `certified` that of the bundle, `naive` one threshold that nobody calibrated.
    """
    with Runner.open(BUNDLE, require_certificate=True) as runner:
        exits = len(runner.manifest.exits)
        policies = {
            "offramp": fastest,
            "certified": runner.policy,
            "naive": Policy.thresholds("max_prob", [NAIVE] * (exits - 1)),
        }
        test = load_dataset(runner, ROTTEN_TOMATOES, "test")
        trace = runner.record(test.batches, test.labels, progress=True)
        same_engines = {name: Runner(runner.engines, runner.manifest, policy) for name, policy in policies.items()}
        alternatives = {
            "uncut": uncut_answer(BUNDLE, runner.manifest, threads=0),
            **{name: runner_answer(other) for name, other in same_engines.items()},
            "static": uncut_answer(STATIC, load_manifest(STATIC), threads=0),
        }
        measured = compare(alternatives, test.rows(), test.labels, NUM_REQUESTS)
    result: dict[str, Any] = {name: asdict(found) for name, found in measured.items()}
    for name, found in measured.items():
        result[name]["speedup"] = measured["uncut"].p50_ms / found.p50_ms
        result[name]["mean_speedup"] = measured["uncut"].mean_ms / found.mean_ms
    for name, policy in policies.items():
        decided = replay(policy, trace)
        shares = exit_shares(decided.exit_index, exits)
        result[name]["agreement"] = float(np.mean(decided.prediction == trace.predictions[:, -1]))
        result[name] |= {"mean_depth": mean_depth(decided.exit_index), "shares": shares.tolist()}
    result["exits"] = [accuracy(trace.predictions[:, k], trace.labels) for k in range(exits)]
    return result


def show(result: Mapping[str, Any]) -> None:
    """The two tables of the demo."""
    exits = Table("exit", "accuracy", "rows that leave", "certified", title="Rotten Tomatoes, 1,000 test sentences")
    for k, (layers, found) in enumerate(zip(EXITS, result["exits"], strict=True)):
        shares = (f"{result[name]['shares'][k]:.1%}" for name in ("offramp", "certified"))
        exits.add_row(f"{k} (after {layers} layers)", f"{found:.3f}", *shares)
    models = Table("model", "accuracy", "as full depth", "p50 ms", "p95 ms", "mean ms", "speedup p50", "speedup mean")
    for name in ("uncut", "offramp", "certified", "naive", "static"):
        found, keys = result[name], ("p50_ms", "p95_ms", "mean_ms")
        same = f"{found['agreement']:.1%}" if "agreement" in found else ""
        speedups = (f"{found[key]:.2f}x" for key in ("speedup", "mean_speedup"))
        models.add_row(name, f"{found['accuracy']:.3f}", same, *(f"{found[key]:.2f}" for key in keys), *speedups)
    console = Console(width=100)
    console.print(exits)
    console.print(models)
    console.print(
        f"mean depth {result['offramp']['mean_depth']:.2f}, certified {result['certified']['mean_depth']:.2f}"
    )
    for plan in result["plans"]:
        console.print(f"segment {plan['segment']}: {plan['backend']} {plan['precision']} {plan['bytes'] / 1e6:.1f} MB")
    console.print(f"{result['seconds']:.0f} s; the report: demo/report.html")
    console.print("try: echo 'a moving, funny film' | .venv/bin/offramp run demo/bundle")


if __name__ == "__main__":
    main()
