"""How long a certified calibration takes, and its peak memory. Reference: 5 s and 1 GiB, on one core.

Physics: a path is learned by moving every row at most once per exit, and tested by comparing one column of scores per
point with one number; both are a few hundred passes over arrays of rows, so memory bandwidth sets the pace. The rest is
softmax, for temperatures and for scores at them. Nothing of size rows times points is ever made.

Measured: 100,000 simulated rows of 3 classes at 12 exits; temperatures, path, test along it, replay and certificate
(`certify`), for risks that are counted and one that is bet on. On one core (Linux); the process's
peak includes the interpreter and the trace itself. Apparate's tuner takes 1.08 s for 512 rows at 11 exits
(arXiv 2312.05385, section 5).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

from coverage import simulated_trace
from machine import describe_machine

from offramp.policy import Policy, Veto
from offramp.tuning.certify import CertifyOptions, certify

RESULT = Path(__file__).parent / "results" / "calibration_speed.json"
CASES = {
    "consistency": (CertifyOptions(), Policy()),
    "consistency, patience and veto": (CertifyOptions(), Policy(patience=2, veto=Veto(0.05, True, True))),
    "consistency, entropy": (CertifyOptions(), Policy("entropy")),
    "one threshold": (CertifyOptions(per_exit=False), Policy()),
    "signed accuracy gap": (CertifyOptions(risk="accuracy_gap_signed"), Policy()),
    "hellinger": (CertifyOptions(risk="hellinger", max_risk=0.05), Policy()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--exits", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="2,000 rows, written nowhere")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    trace = simulated_trace(2000 if arguments.quick else arguments.rows, arguments.exits, seed=1)
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = {}
    for name, (options, base) in CASES.items():
        started = time.perf_counter()
        found = certify(trace, base, options)
        seconds[name] = time.perf_counter() - started
        print(f"{name:<32} {seconds[name]:.2f} s, {len(found.path)} points, depth {found.certificate.mean_depth:.2f}")
    summary = {
        "bench": "calibration_speed",
        "rows": len(trace.labels),
        "exits": trace.num_exits,
        "seconds": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_mib_before": before_mib,
        "machine": describe_machine(),
    }
    if not arguments.quick:
        RESULT.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
