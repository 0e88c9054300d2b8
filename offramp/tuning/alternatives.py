"""What others would do instead of certifying, on the same rows: to be compared with, never chosen by offramp itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from offramp.policy import Policy
from offramp.trace import Trace
from offramp.tuning.certify import Certified, CertifyOptions, certify
from offramp.tuning.losses import LossTable, losses_from_trace
from offramp.tuning.path import Limits, exits_along, grid_path, learned_path, open_exits, policy_at, sureness_of
from offramp.tuning.replay import cumulative_costs_ms, expected_cost_ms, mean_depth, replay

FIXED = 0.9  # what one writes who has not looked


@dataclass(frozen=True)
class Alternative:
    """One way to choose thresholds, what it does on all rows of the trace, and what is known about other rows."""

    name: str
    policy: Policy
    risk: float  # mean loss on these rows
    mean_depth: float
    expected_speedup: float  # against full depth, from the recorded costs
    known: str  # about the risk on other rows


def alternatives(trace: Trace, certified: Certified, options: CertifyOptions) -> tuple[Alternative, ...]:
    """`certified`, and what else could have been chosen on `trace` over the same base policy."""
    base = replace(certified.policy, limits=(), sources={})
    inverse = base.inverse_temperatures(trace.num_exits)
    table = losses_from_trace(trace, options.risk, inverse, options.class_index, options.value_range)
    sureness, is_open = sureness_of(base, trace), open_exits(base, trace)
    grid = grid_path(base.score, is_open)
    budget = options.max_risk * int(table.counts.sum())
    counted = np.flatnonzero(table.counts)
    greedy = learned_path(sureness[:, counted], table.values[counted], cumulative_costs_ms(trace), budget)
    fixed = 1 - FIXED if base.score == "entropy" else FIXED
    one_threshold = certify(trace, base, replace(options, per_exit=False, sources="together"))
    held = f"at most {options.max_risk:.2%} with {options.confidence:.1%} confidence"

    def last(path: Limits, is_within: Callable[[NDArray[np.float64]], bool]) -> Policy:
        return policy_at(base, path[_last_within(sureness, table, path, is_within)])

    chosen = [
        ("full depth", replace(base, limits=(None,) * len(is_open)), "no risk"),
        (f"fixed threshold {fixed:.1f}", replace(base, limits=_limits(fixed, is_open)), "nothing"),
        (
            "best on these rows",
            last(greedy, lambda losses: float(losses.sum()) <= budget),
            "nothing: it is the best because these rows were kind to it",
        ),
        (
            "conformal risk control, one threshold",
            last(grid, lambda losses: (float(losses.sum()) + 1) / (len(losses) + 1) <= options.max_risk),
            f"at most {options.max_risk:.2%} on average over draws of rows, more on about half of them",
        ),
        ("certified, one threshold", one_threshold.policy, held),
        ("certified" + (", per source" if certified.policy.sources else ""), certified.policy, held),
    ]
    return tuple(_measured(name, policy, known, trace, table) for name, policy, known in chosen)


def _last_within(
    sureness: NDArray[np.float32], table: LossTable, path: Limits, is_within: Callable[[NDArray[np.float64]], bool]
) -> int:
    """The last point of `path` before the first whose losses are not within bounds; full depth always is.

    Conformal risk control: Angelopoulos et al., arXiv 2208.02814, equation 4, for losses of at most 1 that grow along
    the path; where they do not, stopping at the first excess is the cautious reading.
    """
    position = 0
    for j, exit_index in enumerate(exits_along(sureness, path)):
        if j and not is_within(table.of(exit_index)):
            break
        position = j
    return position


def _limits(value: float, is_open: list[bool]) -> tuple[float | None, ...]:
    return tuple(value if opened else None for opened in is_open)


def _measured(name: str, policy: Policy, known: str, trace: Trace, table: LossTable) -> Alternative:
    exit_index = replay(policy, trace).exit_index
    return Alternative(
        name=name,
        policy=policy,
        risk=float(table.of(exit_index).mean()),
        mean_depth=mean_depth(exit_index),
        expected_speedup=float(cumulative_costs_ms(trace)[-1] / expected_cost_ms(exit_index, trace)),
        known=known,
    )
