"""What a certificate costs and what it is worth on the demo's model. Reference: the usual ways to choose thresholds.

Statistics on real rows: sentences of IMDB reviews that training has not seen, without labels, as the demo's bundle
answers them on the engines that run (`offramp trace`). Of these rows some are drawn to calibrate with and the others
are held out, 200 times: certified at most 1 % of answers differ from full depth's, with 95 % confidence, against one
threshold certified in the same way, conformal risk control, the best thresholds on the same rows, and 0.9 everywhere.

`violated` is the share of splits in which more than 1 % of *all* rows differ: these rows are the population that the
rows to calibrate with are drawn from. `violated_held_out` counts the rows that were held out alone; they are as random
as the others, so it is above the former. Speedups are expected ones, from the recorded medians of the segments
and the uncut model for one row; `demo/demo.py` and `offramp bench` measure on the clock.

`--quick` takes a simulated trace. Without a bundle in demo/ it says so: run `make demo` first.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from coverage import simulated_trace
from machine import describe_machine

from offramp.commands.traces import TraceRequest, record_bundle
from offramp.policy import Policy
from offramp.trace import Trace, load_trace
from offramp.tuning.alternatives import alternatives
from offramp.tuning.certify import CertifyOptions, certify
from offramp.tuning.replay import cumulative_costs_ms, mean_depth, replay

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
RESULT = Path(__file__).parent / "results" / "certified.json"
ROWS = (1000, 3000, 10_000)  # to calibrate with
DATA, NUM_ROWS = "imdb", 60_000
OPTIONS = CertifyOptions(max_risk=0.01, confidence=0.95, risk="consistency")


def demo_trace(path: Path | None) -> Trace | None:
    """The trace at `path`, or one recorded now; None without a bundle."""
    if path is None:
        path = BUNDLE.parent / "bundle.reference" / "traces" / f"{DATA}.npz"
    if not path.is_file():
        if not (BUNDLE / "manifest.json").is_file():
            return None
        record_bundle(BUNDLE, TraceRequest(data=DATA, limit=NUM_ROWS), output=path, progress=True)
    return load_trace(path)


def splits(trace: Trace, num_rows: int, num_splits: int) -> dict[str, dict[str, float]]:
    """Every way to choose thresholds on `num_rows` random rows, judged on the others; means over the splits."""
    differs = trace.predictions != trace.predictions[:, -1:]  # (N, E)
    costs, rows = cumulative_costs_ms(trace), np.arange(len(trace.labels))
    base = Policy(temperatures=tuple(trace.temperatures.tolist()))
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for split in range(num_splits):
        order = np.random.default_rng(split).permutation(len(rows))
        drawn, held_out = trace.rows(order[:num_rows]), order[num_rows:]
        options = replace(OPTIONS, seed=split)
        for each in alternatives(drawn, certify(drawn, base, options), options):
            exit_index = replay(each.policy, trace).exit_index
            lost = differs[rows, exit_index]
            found[each.name].append(
                {
                    "risk": float(lost[held_out].mean()),
                    "violated": float(lost.mean() > OPTIONS.max_risk),
                    "violated_held_out": float(lost[held_out].mean() > OPTIONS.max_risk),
                    "mean_depth": mean_depth(exit_index[held_out]),
                    "expected_ms": float(costs[exit_index[held_out]].mean()),
                }
            )
    return {name: _means(each, trace) for name, each in found.items()}


def _means(found: list[dict[str, float]], trace: Trace) -> dict[str, float]:
    means = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
    means["speedup_over_full_depth"] = float(cumulative_costs_ms(trace)[-1]) / means["expected_ms"]
    if not math.isnan(trace.uncut_ms):
        means["speedup_over_uncut"] = trace.uncut_ms / means["expected_ms"]
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="of the demo's bundle; default: recorded beside it")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="a simulated trace, two splits, written nowhere")
    arguments = parser.parse_args()
    trace = simulated_trace(4000, 5, seed=3) if arguments.quick else demo_trace(arguments.trace)
    summary: dict[str, Any] = {"bench": "certified", "machine": describe_machine()}
    if trace is None:
        print(json.dumps({**summary, "skipped": f"no bundle in {BUNDLE}; run `make demo`"}))
        return
    summary |= {"rows": len(trace.labels), "backend": trace.backend, "precision": trace.precision}
    summary |= {"costs_ms": trace.costs_ms.tolist(), "uncut_ms": None if math.isnan(trace.uncut_ms) else trace.uncut_ms}
    summary["splits"] = 2 if arguments.quick else arguments.splits
    for num_rows in (2000,) if arguments.quick else ROWS:
        found = splits(trace, num_rows, summary["splits"])
        summary[f"calibrated_on_{num_rows}"] = found
        for name, means in found.items():
            print(f"{num_rows} rows, {name:<38}", {key: round(value, 4) for key, value in means.items()}, flush=True)
    certificate = certify(trace, Policy(temperatures=tuple(trace.temperatures.tolist())), OPTIONS).certificate
    print("\n".join(certificate.words()))
    summary["all_rows"] = {
        "losses": certificate.losses,
        "tested": certificate.num_rows,
        "mean_depth": certificate.mean_depth,
        "p_value": certificate.p_value,
    }
    if not arguments.quick:
        RESULT.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
