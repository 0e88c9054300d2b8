"""Paths: sequences of thresholds, from full depth to more and more early exits, for fixed-sequence testing.

A path is learned on rows that are then not tested, or laid out beforehand. It lives in the space of thresholds over a
base policy, whose other conditions (patience, veto, minimum depth, closed exits) hold all along it. Thresholds only
loosen on the way, so going along it moves every row at most once per exit.

Learning is greedy: from where it stands, it loosens the one threshold, as far as pays, that saves most cost per risk.
What it counts as risk is the losses seen, drawn towards a curve through all losses of an exit the more the fewer there
are: the first loss beyond a threshold says little (docs/log.md has what the curve gains). How good a guess that is does
not matter for the validity of the test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import LEARNED
from offramp.policy import Policy, score_values
from offramp.trace import Trace
from offramp.tuning.replay import recorded_output, scores_at

# Sureness is a score with a sign: larger is surer, for entropy too. A limit on it is reached from above; +inf: closed.
Sureness = NDArray[np.float32]  # (E - 1, N)
Limits = NDArray[np.float32]  # (J, E - 1): point 0 is full depth, and no limit ascends along J

GRID_EXPONENTS = (8.0, 0.15)  # thresholds 1 - 10^-x: a linear grid certified nothing where this one did
GRID_POINTS = 400  # the test has no price for more of them
BINS = 256  # places per exit where a learned threshold may lie, at equal shares of the rows
PRIOR = 0.1  # losses added to every step when steps are compared: without, one row that saves anything looks free
POINTS = 500  # of a learned path, about; more cost time only
CURVE_LOSSES = 100  # allowed losses at which the curve and the losses seen count alike
_RIDGE = (1e-3, 0.3)  # of the curve's intercept and slope, in rows
_NEWTON_STEPS = 30
_CLIP = 2.0**-23  # what a float32 score near 1 can tell apart


def open_exits(policy: Policy, trace: Trace) -> list[bool]:
    """Which exits before the final one `policy` may let rows leave at, whatever their thresholds."""
    policy.check_exits(trace.num_exits)
    has_score = [policy.score != LEARNED or has for has in trace.has_learned[:-1]]
    is_open = [limit is not None for limit in policy.limits] if policy.limits else has_score
    return [opened and k + 1 >= policy.minimum_depth for k, opened in enumerate(is_open)]


def sureness_of(policy: Policy, trace: Trace) -> Sureness:
    """How sure every exit before the final one is of every row; -inf where `policy` keeps it in whatever the score.

    That is by the conditions other than thresholds, which do not depend on them: a row that reaches an exit has passed
    all exits before. An exit that the policy closes is never left. Raises OptionError when it is for another model.
    """
    early = trace.num_exits - 1
    sign, loosest = (-1, 1.0) if policy.score == "entropy" else (1, 0.0)
    limits = tuple(loosest if opened else None for opened in open_exits(policy, trace))
    letting_go = replace(policy, limits=limits, sources={})
    letting_go.check_learned(trace.has_learned)
    if trace.is_regression:
        letting_go.check_values()
    scores = scores_at(trace, policy.inverse_temperatures(trace.num_exits))
    sureness = np.full((early, len(trace.labels)), -np.inf, np.float32)
    state = None
    for k in range(early):
        out = recorded_output(trace, scores, k, slice(None))
        leaves, _, state = letting_go.decide(k, out, state)
        sureness[k, leaves] = sign * score_values(policy.score, out)[leaves]
    return sureness


def policy_at(base: Policy, limits: NDArray[np.float32]) -> Policy:
    """`base` with the thresholds of one point (E - 1,) of a path."""
    sign = -1 if base.score == "entropy" else 1
    found = [None if np.isinf(limit) else float(np.clip(sign * limit, 0, 1)) for limit in limits]
    return replace(base, limits=tuple(found))


def exits_along(sureness: Sureness, path: Limits) -> Iterator[NDArray[np.int64]]:
    """Where the rows leave (N,) at every point of `path`; the array is the same one, changed from point to point."""
    early, num_rows = sureness.shape
    exit_index = np.full(num_rows, early)
    before = np.full(early, np.inf, np.float32)
    for limits in path:
        for k in np.flatnonzero(limits < before):
            exit_index[(sureness[k] >= limits[k]) & (exit_index > k)] = k
        before = limits
        yield exit_index


def grid_path(score: str, is_open: Sequence[bool]) -> Limits:
    """One threshold for all open exits, from strict to loose, fixed before any data are seen."""
    steps = 10.0 ** -np.linspace(*GRID_EXPONENTS, GRID_POINTS)
    values = np.unique((-steps if score == "entropy" else 1 - steps).astype(np.float32))[::-1]
    path = np.full((len(values) + 1, len(is_open)), np.inf, np.float32)
    path[1:, list(is_open)] = values[:, None]
    return path


def expected_losses(sureness: Sureness, losses: NDArray[np.float64], allowed: float) -> NDArray[np.float64]:
    """What losses (M, E) to expect: those seen, drawn towards a logistic curve over the log-odds of the sureness.

    One curve per exit; negative losses have another, and rows that cannot leave at an exit say nothing about it. The
    more losses may be `allowed` on these rows in all, the less the curve has to say.
    """
    expected = np.zeros_like(losses)
    for k, values in enumerate(sureness):
        counts = np.isfinite(values)
        unit = values[counts].astype(np.float64) + (1 if counts.any() and values[counts].min() < 0 else 0)
        unit = unit.clip(_CLIP, 1 - _CLIP)
        odds = np.log(unit / (1 - unit))
        for sign in (1, -1):
            part = (sign * losses[counts, k]).clip(0, None)  # in [0, 1]
            if part.any():
                expected[counts, k] += sign * _logistic_curve(odds, part)
    seen = allowed / (allowed + CURVE_LOSSES)
    mixed: NDArray[np.float64] = seen * losses + (1 - seen) * expected
    return mixed


def _logistic_curve(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Penalised logistic regression of y (M,) in [0, 1] on x (M,), at x. Newton's method."""
    z = (x - x.mean()) / (x.std() + 1e-9)
    design, ridge, weights = np.stack([np.ones_like(z), z], axis=1), np.array(_RIDGE), np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(design @ weights).clip(-30, 30)))
        hessian = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(hessian, design.T @ (p - y) + ridge * weights)
        weights -= step
        if np.abs(step).max() < 1e-6:
            break
    curve: NDArray[np.float64] = 1 / (1 + np.exp(-(design @ weights).clip(-30, 30)))
    return curve


@dataclass
class _Walk:
    """Where a greedy walk stands: what loosening each exit's threshold by so many bins would add up to."""

    bins: NDArray[np.int64]  # (E - 1, M): 0 the surest; BINS: cannot leave there
    losses: NDArray[np.float64]  # (E, M)
    costs: NDArray[np.float64]  # (E,) of leaving at each exit
    exit_index: NDArray[np.int64]  # (M,)
    num_open: NDArray[np.int64]  # (E - 1,): bins that leave
    saved: NDArray[np.float64]  # (E - 1, BINS): cost saved by the rows that are still there, if they left here
    risked: NDArray[np.float64]  # (E - 1, BINS): loss added by them

    def move(self, exit_index: int, num_bins: int) -> None:
        """Let `num_bins` more bins leave at `exit_index`; only what the rows that move add up to changes."""
        self.num_open[exit_index] += num_bins
        moving = np.flatnonzero((self.bins[exit_index] < self.num_open[exit_index]) & (self.exit_index > exit_index))
        before = self.exit_index[moving]
        for k in range(len(self.bins)):
            rows, was = moving[before > k], before[before > k]
            self._add(k, rows, was, -1.0)
            if k < exit_index:
                self._add(k, rows, np.full(len(rows), exit_index), 1.0)
        self.exit_index[moving] = exit_index

    def _add(self, k: int, rows: NDArray[np.intp], leaving: NDArray[np.int64], sign: float) -> None:
        bins = self.bins[k, rows]
        saved = self.costs[leaving] - self.costs[k]
        risked = self.losses[k, rows] - self.losses[leaving, rows]
        self.saved[k] += sign * np.bincount(bins, saved, BINS + 1)[:BINS]
        self.risked[k] += sign * np.bincount(bins, risked, BINS + 1)[:BINS]

    def best_step(self, budget: float) -> tuple[int, NDArray[np.float64]] | None:
        """The exit to loosen, and the risk added up bin by bin to where it pays most; None when nothing pays."""
        best: tuple[float, int, NDArray[np.float64]] | None = None
        for k, first in enumerate(self.num_open):
            saved, risked = self.saved[k, first:].cumsum(), self.risked[k, first:].cumsum()
            worth = saved / (risked.clip(0, None) + PRIOR)
            worth[(risked > budget) | (saved <= 1e-9 * self.costs[-1])] = -1  # less than rounding may leave behind
            if len(worth) and worth.max() > (best[0] if best else 0):
                best = float(worth.max()), k, risked[: int(worth.argmax()) + 1]
        return best[1:] if best else None


def learned_path(sureness: Sureness, losses: NDArray[np.float64], costs: NDArray[np.float64], budget: float) -> Limits:
    """A path learned on M rows with losses (M, E), up to where their expected losses add up to `budget`.

    `costs` (E,) is what leaving at each exit costs; it ascends.
    """
    early, num_rows = sureness.shape
    edges = [_edges(values) for values in sureness]  # per exit: the limit that lets the bins 0 … b leave
    bins = np.stack([np.searchsorted(-edge, -values) for edge, values in zip(edges, sureness, strict=True)])
    bins[~np.isfinite(sureness)] = BINS
    walk = _Walk(
        bins=bins,
        losses=np.ascontiguousarray(losses.T),
        costs=costs,
        exit_index=np.full(num_rows, early),
        num_open=np.zeros(early, np.int64),
        saved=np.zeros((early, BINS)),
        risked=np.zeros((early, BINS)),
    )
    rows = np.arange(num_rows)
    for k in range(early):
        walk._add(k, rows, walk.exit_index, 1.0)
    limits = np.full(early, np.inf, np.float32)
    path, spent, grain = [limits], 0.0, budget / POINTS
    while step := walk.best_step(budget - spent):
        k, risked = step
        first = walk.num_open[k]
        # A long step is taken in parts, so that the test may stop on the way.
        for count in np.flatnonzero(np.diff(np.floor((spent + risked) / grain), append=np.inf)) + 1:
            limits = limits.copy()
            limits[k] = edges[k][first + count - 1]
            path.append(limits)
        walk.move(k, len(risked))
        spent += float(risked[-1])
    return np.array(path)


def _edges(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most BINS limits (B,), descending, that part the finite `values` (M,) into equal shares."""
    distinct, counts = np.unique(values[np.isfinite(values)], return_counts=True)
    if len(distinct) == 0:
        return np.empty(0, np.float32)
    distinct, below = distinct[::-1], counts[::-1].cumsum()  # the surest first
    marks = np.unique(np.searchsorted(below, np.linspace(0, below[-1], BINS + 1)[1:]).clip(max=len(distinct) - 1))
    middle = (distinct[marks] / 2 + np.append(distinct[1:], distinct[-1])[marks] / 2).astype(np.float32)
    is_between = np.append(middle[:-1] > distinct[marks[:-1] + 1], False)  # rounding may leave nothing between
    edges: NDArray[np.float32] = np.where(is_between, middle, distinct[marks])
    return edges
