"""How often a certificate is wrong, where the true risk is known. Reference: its own promise, delta.

Statistics instead of physics: in every cell rows are drawn from a distribution whose risk R_j is known at every point j
of a grid, the grid is tested as `offramp calibrate` tests it, and a violation is a chosen point with R_j above what was
certified. Losses of one row at different points share one uniform number, as the losses of one row at different
thresholds do. Two courses of R_j: a ramp that crosses the bound in the middle, and a cliff that steps from a fifth of
it to just above, where a test has the least room: a correct one is wrong there in nearly delta of all trials.

The same cells are run with two bugs seen in published code, which must be caught: choosing the first hypothesis that is
*not* rejected (the reference code of "Fast yet Safe"), and taking the largest wealth of each half of the rows by itself
(MAPIE; it shows where losses are rare and large, so 0/1 losses are tested by betting too). The last cells are end to
end: rows drawn from a simulated trace, `certify` with a learned path, and the policy's risk over the whole trace.

Passes where violations are at most delta + 3 standard errors. `--quick` runs fewer trials of fewer cells.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from numpy.typing import NDArray

from offramp.binomial import allowed_losses
from offramp.policy import Policy
from offramp.scores import scores_from_logits
from offramp.trace import Trace
from offramp.tuning.certify import CertifyOptions, certify
from offramp.tuning.losses import losses_from_trace
from offramp.tuning.path import exits_along, sureness_of
from offramp.tuning.risk_tests import betting_p_value, last_rejected_of

RESULT = Path(__file__).parent / "results" / "coverage.json"
Array = NDArray[np.float64]
Choose = Callable[[NDArray[np.bool_]], NDArray[np.intp]]
BettingTest = Callable[[Array, float, float], Array]

ROWS = (100, 500, 2000)
GRIDS = (5, 20, 60, 200)
LEVELS = ((0.02, 0.1), (0.05, 0.1), (0.2, 0.05))  # (risk, delta)
COURSES = ("ramp", "cliff")
KINDS = ("binary", "binary by betting", "bounded", "signed")
HALF_SPLIT_GRID = 20  # the bug is one of the test, not of the grid
REGRET = 0.02  # of signed losses, the share of rows that only the early answer gets right
CHUNK = 400_000  # uniform numbers drawn at once


@dataclass(frozen=True)
class Cell:
    """One simulated calibration."""

    kind: str
    course: str
    num_rows: int
    grid: int
    max_risk: float
    delta: float


def true_risks(cell: Cell) -> Array:
    """The risk R_j at every point of the grid, (J,)."""
    if cell.course == "ramp":
        return np.linspace(0.02, 2, cell.grid) * cell.max_risk
    return np.where(np.arange(cell.grid) < cell.grid // 2, 0.2, 1.001) * cell.max_risk


def losses_at(kind: str, uniform: Array, risk: float) -> Array:
    """Losses with mean `risk` from uniform numbers, of the same shape."""
    if kind.startswith("binary"):
        return (uniform < risk).astype(np.float64)
    if kind == "signed":
        return (uniform < risk + REGRET).astype(np.float64) - (uniform > 1 - REGRET)
    return 1 - (1 - uniform) ** (risk / (1 - risk))  # Beta(1, 1 / risk - 1) by its quantiles


def first_not_rejected(is_rejected: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The bug of the reference code of "Fast yet Safe": one point too far."""
    return (last_rejected_of(is_rejected) + 1).clip(max=is_rejected.shape[-1] - 1)


def half_split_p_value(losses: Array, risk: float, delta: float) -> Array:
    """The bug of MAPIE: both halves begin with a wealth of 1, and the larger of their largest counts."""
    n = losses.shape[-1]
    counts = np.arange(2, n + 2)
    means = (0.5 + losses.cumsum(axis=-1)) / counts
    variances = (0.25 + ((losses - means) ** 2).cumsum(axis=-1)) / counts
    before = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), variances[..., :-1]], axis=-1)
    steps = np.log1p(-np.sqrt(2 * math.log(1 / delta) / (n * before)).clip(max=1) * (losses - risk))
    halves = [part.cumsum(axis=-1).max(axis=-1) for part in np.array_split(steps, 2, axis=-1)]
    return np.exp(-np.maximum(*halves).clip(min=0))


def shares_violated(
    cell: Cell, trials: int, chooses: Sequence[Choose], betting: BettingTest = betting_p_value, seed: int = 0
) -> list[float]:
    """The share of `trials` in which the point that each of `chooses` takes has a risk above the certified one."""
    generator = np.random.default_rng(seed)
    risks = true_risks(cell)
    violations = [0] * len(chooses)
    step = max(1, CHUNK // cell.num_rows)
    for start in range(0, trials, step):
        uniform = generator.random((min(step, trials - start), cell.num_rows))
        is_rejected = _rejected(cell, uniform, risks, betting)
        for position, choose in enumerate(chooses):
            chosen = choose(is_rejected)
            violations[position] += int(((chosen >= 0) & (risks[chosen] > cell.max_risk)).sum())
    return [violated / trials for violated in violations]


def _rejected(cell: Cell, uniform: Array, risks: Array, betting: BettingTest) -> NDArray[np.bool_]:
    """Which hypotheses are rejected, (T, J), as far as they are tested: False after the first that is not."""
    is_rejected = np.zeros((len(uniform), len(risks)), np.bool_)
    going = np.arange(len(uniform))
    allowed = allowed_losses(cell.num_rows, cell.max_risk, cell.delta)
    for j, risk in enumerate(risks):
        if j and risk == risks[j - 1]:  # the same losses, so the same test
            is_rejected[going, j] = True
            continue
        losses = losses_at(cell.kind, uniform[going], risk)
        if cell.kind == "binary":
            passes = losses.sum(axis=1) <= allowed
        else:
            passes = betting(losses, cell.max_risk, cell.delta) <= cell.delta
        going = going[passes]
        is_rejected[going, j] = True
    return is_rejected


def standard_errors_above(share: float, delta: float, trials: int) -> float:
    """How many standard errors, of a test that is wrong in delta of all trials, `share` lies above delta."""
    return (share - delta) / math.sqrt(delta * (1 - delta) / trials)


def simulated_trace(num_rows: int, num_exits: int, seed: int) -> Trace:
    """Three classes; later exits are right more often, and rows differ in how hard they are at every exit."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, num_rows)
    hardness = generator.normal(size=num_rows)
    logits = generator.normal(size=(num_rows, num_exits, 3)).astype(np.float32) * 0.5
    for k in range(num_exits):
        signal = 2.5 * (k + 1) / num_exits * (1 + hardness / 2) + generator.normal(size=num_rows)
        logits[np.arange(num_rows), k, labels] += signal
    return trace_from_logits(logits, labels)


def trace_from_logits(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Trace:
    """A trace of segments that cost the same, from logits (N, E, C) at temperature 1."""
    num_exits = logits.shape[1]
    return Trace(
        logits=logits,
        scores=np.stack([scores_from_logits(logits[:, k], 1.0) for k in range(num_exits)], axis=1),
        predictions=logits.argmax(axis=2),
        temperatures=np.ones(num_exits),
        labels=labels,
        costs_ms=np.ones(num_exits),
        fingerprint="simulated",
        backend="fake",
        precision="fp32",
    )


def share_violated_end_to_end(
    population: Trace, base: Policy, options: CertifyOptions, num_rows: int, trials: int
) -> float:
    """The share of `trials` in which the policy that `certify` returns has too high a risk over the population."""
    generator = np.random.default_rng(1)
    table = losses_from_trace(population, options.risk, base.inverse_temperatures(population.num_exits))
    sureness = sureness_of(base, population)
    violations = 0
    for trial in range(trials):
        rows = generator.integers(0, len(population.labels), num_rows)
        found = certify(population.rows(rows), base, replace(options, seed=trial))
        limits = found.path[found.positions[""]]
        (exit_index,) = exits_along(sureness, limits[None])
        violations += float(table.of(exit_index).mean()) > options.max_risk
    return violations / trials


def end_to_end(trials: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows drawn with replacement from a simulated trace of 50,000, so that the trace is the population."""
    population = simulated_trace(50_000, 5, seed=3)
    unscaled = (1.0,) * population.num_exits  # fixed, so that sureness is one for all trials
    found = []
    for base in (Policy(temperatures=unscaled), Policy("entropy", patience=2, temperatures=unscaled)):
        for risk, max_risk in (("consistency", 0.05), ("accuracy_gap_signed", 0.05)):
            for num_rows in sizes:
                options = CertifyOptions(max_risk=max_risk, confidence=0.9, risk=risk)
                share = share_violated_end_to_end(population, base, options, num_rows, trials)
                found.append(
                    {"risk": risk, "score": base.score, "patience": base.patience, "num_rows": num_rows}
                    | {"max_risk": max_risk, "delta": 0.1, "violated": share}
                    | {"standard_errors_above": standard_errors_above(share, 0.1, trials)}
                )
                print(found[-1], flush=True)
    return found


def simulated(trials: int, rows: tuple[int, ...], grids: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every cell, as it is and with the bug that applies to it."""
    found = []
    for kind, course, (max_risk, delta), num_rows, grid in product(KINDS, COURSES, LEVELS, rows, grids):
        cell = Cell(kind, course, num_rows, grid, max_risk, delta)
        started = time.perf_counter()
        share, one_too_far = shares_violated(cell, trials, (last_rejected_of, first_not_rejected))
        planted = {"first_not_rejected": one_too_far}
        if kind != "binary" and grid == HALF_SPLIT_GRID:
            (planted["half_split"],) = shares_violated(cell, trials, (last_rejected_of,), half_split_p_value)
        found.append(
            asdict(cell)
            | {"violated": share, "planted": planted}
            | {"standard_errors_above": standard_errors_above(share, delta, trials)}
            | {"seconds": round(time.perf_counter() - started, 2)}
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="200 trials of the small cells, written nowhere")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    trials = 200 if arguments.quick else arguments.trials
    rows, grids = ((100,), (5, 20)) if arguments.quick else (ROWS, GRIDS)
    cells = simulated(trials, rows, grids)
    whole = end_to_end(50 if arguments.quick else trials, (300,) if arguments.quick else (300, 1000))
    worst = max((*cells, *whole), key=lambda cell: cell["standard_errors_above"])
    killed = {
        bug: sum(
            standard_errors_above(cell["planted"][bug], cell["delta"], trials) > 3
            for cell in cells
            if bug in cell["planted"]
        )
        for bug in ("first_not_rejected", "half_split")
    }
    summary = {
        "bench": "coverage",
        "trials": trials,
        "cells": len(cells) + len(whole),
        "cells_above_3_standard_errors": sum(cell["standard_errors_above"] > 3 for cell in (*cells, *whole)),
        "worst": worst,
        "cells_where_a_planted_bug_is_caught": killed,
        "machine": describe_machine(),
    }
    if not arguments.quick:
        arguments.output.write_text(json.dumps({**summary, "simulated": cells, "end_to_end": whole}, indent=1) + "\n")
    print(json.dumps(summary))
    sys.exit(summary["cells_above_3_standard_errors"] > 0 and not arguments.quick)


if __name__ == "__main__":
    main()
