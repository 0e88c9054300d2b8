"""Certified calibration: from a trace to the cheapest policy whose risk is shown to be within bounds.

The rows are shuffled once. On a third of them temperatures and a path of thresholds are learned; on the others the
points of the path are tested in order, and the last that passes is taken. What is tested is the whole policy: patience,
veto and minimum depth decide which rows may leave at all, and what comes out is replayed by the policy itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offramp.binomial import p_value, rows_needed, upper_bound
from offramp.certificate import RISKS, Certificate, ExitRisk, SourceStatement
from offramp.errors import DataError, OptionError
from offramp.policy import Policy
from offramp.trace import UNKNOWN, Trace
from offramp.tuning.calibrate import scaled_temperatures
from offramp.tuning.losses import LossTable, losses_from_trace
from offramp.tuning.path import (
    Limits,
    Sureness,
    exits_along,
    expected_losses,
    grid_path,
    learned_path,
    open_exits,
    policy_at,
    sureness_of,
)
from offramp.tuning.replay import cumulative_costs_ms, mean_depth, replay
from offramp.tuning.risk_tests import betting_p_value, betting_upper_bound, last_rejected

Sources = Literal["together", "simultaneous", "each"]

LEARNING_SHARE = 1 / 3  # of the rows, for the path; the others test it
REACH = 2.5  # a path goes on until so many times the allowed losses are expected: where they really end, the test says


@dataclass(frozen=True)
class CertifyOptions:
    """What to certify. Raises OptionError when made with values that make no sense.

    `sources`: "together" is one policy for all rows; "simultaneous" one per source, each at level delta / G, so that
    all G statements hold at once with `confidence`; "each" at level delta, so that every one does. Requests from no
    source or another go to full depth, or with `strictest_for_unknown` to the strictest policy certified for any.
    """

    max_risk: float = 0.01
    confidence: float = 0.95
    risk: str = "consistency"
    class_index: int = UNKNOWN  # of a missed detection
    per_exit: bool = True  # False: one threshold for all exits, from a grid, tested on all rows
    sources: Sources = "together"
    strictest_for_unknown: bool = False
    seed: int = 0
    value_range: float = 1.0  # of a regression: larger distances count as this, and risks are shares of it

    def __post_init__(self) -> None:
        for name in ("max_risk", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise OptionError(
                    f"certify: got {name} {getattr(self, name)}, expected a number between 0 and 1, such as "
                    f"{0.01 if name == 'max_risk' else 0.95}"
                )
        if self.risk not in RISKS:
            raise OptionError(f"certify: got risk {self.risk!r}, expected one of {', '.join(RISKS)}")
        if not 0 < self.value_range < math.inf:
            raise OptionError(f"certify: got value range {self.value_range}, expected a positive number")
        if self.sources not in get_args(Sources):
            raise OptionError(f"certify: got sources {self.sources!r}, expected one of {', '.join(get_args(Sources))}")

    @property
    def delta(self) -> float:
        return 1 - self.confidence


@dataclass(frozen=True)
class Certified:
    """A policy with its certificate, and the sequence along which it was found."""

    policy: Policy
    certificate: Certificate
    path: Limits  # (J, E - 1) of thresholds as sureness; point 0 is full depth
    positions: Mapping[str, int] = field(hash=False)  # of the chosen point, per source ("" for all together)
    tested: NDArray[np.int64] = field(repr=False)  # (T,) rows of the trace, in the order of the test


@dataclass(frozen=True)
class _Group:
    """Rows that are tested together, and at which level."""

    rows: NDArray[np.int64]  # (T,) of the trace, shuffled
    delta: float


@dataclass(frozen=True)
class _Workings:
    """What the tests of all groups share."""

    base: Policy
    sureness: Sureness  # (E - 1, N)
    table: LossTable
    path: Limits


def certify(trace: Trace, base: Policy, options: CertifyOptions) -> Certified:
    """The policy over `base` that is found to have at most `options.max_risk`, with its certificate.

    `base` says the score and all other conditions; exits that it closes stay closed and its other thresholds play no
    part. Where it has no temperatures they are fitted on the learning rows with labels, or are the trace's. Where
    nothing can be shown the policy is full depth, and the certificate says how many rows are missing. Raises
    OptionError, also for a regression unless `base` decides by learned confidences alone, and DataError when no row
    counts.
    """
    order = np.random.default_rng(options.seed).permutation(len(trace.labels))
    num_learned = int(len(order) * LEARNING_SHARE) if options.per_exit else 0
    learned, tested = order[:num_learned], order[num_learned:]
    if not base.temperatures:
        has_labels = not trace.is_regression and bool((trace.labels[learned] != UNKNOWN).any())
        temperatures = scaled_temperatures(trace.rows(learned)) if has_labels else tuple(trace.temperatures.tolist())
        base = replace(base, temperatures=temperatures)
    base = replace(base, sources={})
    inverse = base.inverse_temperatures(trace.num_exits)
    table = losses_from_trace(trace, options.risk, inverse, options.class_index, options.value_range)
    sureness = sureness_of(base, trace)
    work = _Workings(base, sureness, table, _path(trace, base, sureness, table, learned, options))
    groups = _groups(trace, tested, options)
    positions = {name: _position(work, group, options) for name, group in groups.items()}
    policy = _policy(work, positions, options)
    certificate = _certificate(trace, policy, work, groups, positions, options)
    return Certified(policy, certificate, work.path, positions, tested)


def _path(
    trace: Trace,
    base: Policy,
    sureness: Sureness,
    table: LossTable,
    learned: NDArray[np.int64],
    options: CertifyOptions,
) -> Limits:
    """The sequence to test, from the rows `learned` alone."""
    if not options.per_exit:
        return grid_path(base.score, open_exits(base, trace))
    counted = learned[table.counts[learned]]
    allowed = options.max_risk * len(counted)
    some = sureness[:, counted]
    losses = expected_losses(some, table.values[counted], allowed)
    return learned_path(some, losses, cumulative_costs_ms(trace), REACH * allowed)


def _groups(trace: Trace, tested: NDArray[np.int64], options: CertifyOptions) -> dict[str, _Group]:
    """The tested rows by source; rows without one belong to none, and are left out."""
    if options.sources == "together":
        return {"": _Group(tested, options.delta)}
    names = sorted(set(trace.sources.tolist()) - {""})
    if not names:
        raise DataError(
            "certify: got a trace without sources, expected the source of some rows; record it from data that has a "
            "column `source`, or certify all rows together"
        )
    delta = options.delta / len(names) if options.sources == "simultaneous" else options.delta
    return {name: _Group(tested[trace.sources[tested] == name], delta) for name in names}


def _position(work: _Workings, group: _Group, options: CertifyOptions) -> int:
    """The last point of the path that is certified for `group`; 0, full depth, needs no test: it has no losses."""
    counted = group.rows[work.table.counts[group.rows]]
    p_values = _p_values(work, counted, group.delta, options.max_risk)
    return last_rejected(p_values, group.delta) + 1


def _p_values(work: _Workings, rows: NDArray[np.int64], delta: float, max_risk: float) -> Iterator[float]:
    """The p-value of every point of the path after full depth, on `rows`, which all count."""
    table = work.table.rows(rows)
    walk = exits_along(work.sureness[:, rows], work.path)
    next(walk)
    for exit_index in walk:
        yield _p_value(table.of(exit_index), table.is_counted, delta, max_risk)


def _p_value(losses: NDArray[np.float64], is_counted: bool, delta: float, max_risk: float) -> float:
    if is_counted:
        return p_value(int(losses.sum()), len(losses), max_risk)
    return float(betting_p_value(losses, max_risk, delta))


def _upper_bound(losses: NDArray[np.float64], is_counted: bool, delta: float) -> float:
    if is_counted:
        return upper_bound(int(losses.sum()), len(losses), delta)
    return betting_upper_bound(losses, delta)


def _policy(work: _Workings, positions: Mapping[str, int], options: CertifyOptions) -> Policy:
    """The policy with the chosen point of the path for each source, and for requests from no source or another."""
    if list(positions) == [""]:
        return policy_at(work.base, work.path[positions[""]])
    closed = work.path[0]
    certified = [position for position in positions.values() if position]
    unknown = work.path[min(certified)] if certified and options.strictest_for_unknown else closed
    sources = {
        name: replace(policy_at(work.base, work.path[position]), temperatures=())
        for name, position in positions.items()
    }
    return replace(policy_at(work.base, unknown), sources=sources)


def _certificate(
    trace: Trace,
    policy: Policy,
    work: _Workings,
    groups: Mapping[str, _Group],
    positions: Mapping[str, int],
    options: CertifyOptions,
) -> Certificate:
    """What was shown for `policy`, which is replayed as it is."""
    exit_index = replay(policy, trace).exit_index
    rows = np.concatenate([group.rows for group in groups.values()])
    whole = _statement(work.table.rows(rows), exit_index[rows], any(positions.values()), options.delta, options)
    statements = {
        name: _statement(work.table.rows(group.rows), exit_index[group.rows], positions[name] > 0, group.delta, options)
        for name, group in groups.items()
        if name
    }
    return Certificate(
        **(vars(whole) | {"confidence": options.confidence}),  # as it was asked for, to the last bit
        risk=options.risk,
        max_risk=options.max_risk,
        method=_method(work.table, options),
        backend=trace.backend,
        precision=trace.precision,
        files=trace.files,
        policy_sha256=policy.sha256,
        trace_sha256=trace.sha256,
        seed=options.seed,
        class_name=str(options.class_index) if options.class_index != UNKNOWN else "",
        value_range=options.value_range,
        exits=_exit_risks(work.table.rows(rows), exit_index[rows], options.delta),
        sources=statements,
    )


def _statement(
    table: LossTable, exit_index: NDArray[np.int64], is_tested: bool, delta: float, options: CertifyOptions
) -> SourceStatement:
    """What the rows of `table` say when they leave at `exit_index`; full depth has no risk and was not tested."""
    num_exits = table.values.shape[1]
    losses = table.of(exit_index)
    needed = rows_needed(options.max_risk, delta)
    return SourceStatement(
        confidence=1 - delta,
        num_rows=len(losses),
        losses=_plain(losses, table.is_counted),
        p_value=_p_value(losses, table.is_counted, delta, options.max_risk) if is_tested else 0.0,
        upper_bound=_upper_bound(losses, table.is_counted, delta) if is_tested else 0.0,
        exit_counts=tuple(np.bincount(exit_index, minlength=num_exits).tolist()),
        mean_depth=mean_depth(exit_index) if len(exit_index) else float(num_exits),
        rows_missing=0 if is_tested else max(0, needed - len(losses)),
    )


def _exit_risks(table: LossTable, exit_index: NDArray[np.int64], delta: float) -> tuple[ExitRisk, ...]:
    """The losses of the rows that leave at each exit, with bounds that hold together: each at delta / (E - 1)."""
    num_exits = table.values.shape[1]
    losses, left = table.of(exit_index), exit_index[table.counts]
    found = []
    for k in range(num_exits):
        some = losses[left == k]
        bound = 0.0 if k == num_exits - 1 else None
        if k < num_exits - 1 and table.is_counted:
            bound = upper_bound(int(some.sum()), len(some), delta / (num_exits - 1))
        found.append(ExitRisk(len(some), _plain(some, table.is_counted), bound))
    return tuple(found)


def _plain(losses: NDArray[np.float64], is_counted: bool) -> float:
    return int(losses.sum()) if is_counted else math.fsum(losses)


def _method(table: LossTable, options: CertifyOptions) -> str:
    test = "exact binomial test" if table.is_counted else "betting test of Waudby-Smith and Ramdas"
    sequence = (
        "thresholds per exit, learned on other rows" if options.per_exit else "one threshold for all exits, from a grid"
    )
    per_source = {
        "together": "",
        "simultaneous": "; per source, all sources at once",
        "each": "; per source, each by itself",
    }
    return f"{test} along a fixed sequence of {sequence}{per_source[options.sources]}"
