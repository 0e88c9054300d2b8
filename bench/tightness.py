"""How far up a grid each test gets, and what thresholds per exit save over one threshold. Reference: the exact test.

Statistics instead of physics: all tests keep the same promise, so the one that rejects more is the better. On losses of
0 and 1 the exact binomial test is compared with Hoeffding-Bentkus and with betting (Waudby-Smith and Ramdas) on the
same rows, whose risk ascends along the grid: the index reached, averaged over trials. Then whole policies: thresholds
per exit, learned on a third of the rows and tested on two thirds, against the best certified threshold for all exits,
which is tested on all rows; on simulated traces of several sizes. `bench/certified.py` has the demo's rows.

Costs are one per segment, so that what is compared is depth. `--quick` runs fewer trials of fewer cells.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from coverage import GRIDS, LEVELS, ROWS, Cell, losses_at, simulated_trace, true_risks
from machine import describe_machine

from offramp.binomial import allowed_losses
from offramp.policy import Policy
from offramp.tuning.certify import CertifyOptions, certify
from offramp.tuning.replay import mean_depth, replay
from offramp.tuning.risk_tests import betting_p_value, hoeffding_bentkus, last_rejected_of

RESULT = Path(__file__).parent / "results" / "tightness.json"
TRACES = ((5, 3000), (5, 20_000), (12, 3000), (12, 20_000))  # (exits, rows to calibrate with)
POPULATION = 40_000


def reached(cell: Cell, trials: int) -> dict[str, float]:
    """The mean index that each test reaches on the same rows; -1 is full depth."""
    risks = true_risks(cell)
    uniform = np.random.default_rng(0).random((trials, cell.num_rows))
    counts = np.stack([losses_at("binary", uniform, risk).sum(axis=1) for risk in risks], axis=1)  # (T, J)
    by_bound = [k for k in range(cell.num_rows + 1) if hoeffding_bentkus(k, cell.num_rows, cell.max_risk) <= cell.delta]
    betting = np.zeros(counts.shape, np.bool_)
    going = np.arange(trials)
    for j, risk in enumerate(risks):
        p_values = betting_p_value(losses_at("binary", uniform[going], risk), cell.max_risk, cell.delta)
        going = going[p_values <= cell.delta]
        betting[going, j] = True
    rejected = {
        "exact": counts <= allowed_losses(cell.num_rows, cell.max_risk, cell.delta),
        "hoeffding_bentkus": counts <= max(by_bound, default=-1),
        "betting": betting,
    }
    return {name: float(last_rejected_of(found).mean()) for name, found in rejected.items()}


def depths(num_exits: int, num_rows: int, draws: int) -> dict[str, Any]:
    """Mean depth of certified policies on the rows of a simulated trace that they were not made with."""
    population = simulated_trace(POPULATION, num_exits, seed=3)
    base, options = Policy(temperatures=(1.0,) * num_exits), CertifyOptions(max_risk=0.01)
    found: dict[str, list[float]] = {"per_exit": [], "one_threshold": []}
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(POPULATION)
        held_out = population.rows(order[num_rows:])
        for name, depth in found.items():
            chosen = replace(options, per_exit=name == "per_exit", seed=draw)
            policy = certify(population.rows(order[:num_rows]), base, chosen).policy
            depth.append(mean_depth(replay(policy, held_out).exit_index))
    means = {name: float(np.mean(depth)) for name, depth in found.items()}
    saved = 1 - means["per_exit"] / means["one_threshold"]
    return {"exits": num_exits, "rows": num_rows, "draws": draws, **means, "depth_saved": saved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="the small cells, written nowhere")
    arguments = parser.parse_args()
    cells = []
    rows, grids = ((100, 500), (5, 20)) if arguments.quick else (ROWS, GRIDS)
    for num_rows, grid, (max_risk, delta) in product(rows, grids, LEVELS):
        cell = Cell("binary", "ramp", num_rows, grid, max_risk, delta)
        means = reached(cell, 50 if arguments.quick else arguments.trials)
        cells.append(
            {"num_rows": num_rows, "grid": grid, "max_risk": max_risk, "delta": delta, "reached": means}
            | {"exact_is_first": means["exact"] >= max(means["hoeffding_bentkus"], means["betting"])}
        )
        print(cells[-1], flush=True)
    policies = []
    for num_exits, count in ((5, 2000),) if arguments.quick else TRACES:
        policies.append(depths(num_exits, count, 2 if arguments.quick else 10))
        print(policies[-1], flush=True)
    summary = {
        "bench": "tightness",
        "cells": len(cells),
        "cells_where_the_exact_test_is_first": sum(cell["exact_is_first"] for cell in cells),
        "policies": policies,
        "machine": describe_machine(),
    }
    if not arguments.quick:
        RESULT.write_text(json.dumps({**summary, "reached": cells}, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
