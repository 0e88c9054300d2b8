"""The pool's rule: what runs next, and whether regrouping survivors pays. Pure: no threads, no clocks, no engines.

Holding survivors back while the executor is idle, and running them at once, deepest or oldest first, gain nothing: the
first only adds waiting, the others are no regrouping at all. What gains is to let new rows go first until a queue of
survivors is full, or its first row has waited too long. That costs latency only when the executor is saturated,
where it gives throughput back. The saturated gain is, with B rows per batch of which the share S_k reaches segment k,

    sum_k L_k(B S_k)  /  sum_k S_k L_k(B)        L_k(b): latency of segment k on b rows (costs.py)

which is 1 wherever latency grows in proportion to rows (a compute-bound segment). Times are milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb, inf
from typing import Protocol, TypeVar

from offramp.runtime.costs import BatchCosts

# Python's work around one engine call when its caches are cold (docs/log.md): it makes very small batches worse.
CALL_MS = 0.1
MIN_GAIN = 1.03  # below this, predicted from medians that are known to a few percent, nobody's order is changed
WITHIN_BEST = 1.01  # of two batch sizes this close per row, the smaller one answers sooner
PATIENCE_BATCHES = 4  # in full-batch latencies; 1 gave the gain away again (simulated, tests/runtime/test_schedule.py)
MIN_ROWS_SEEN = 64  # at an exit, before its survival rate is believed
_FORGET_ROWS = 4096  # the rates are those of about so many rows
_EXACT_ROWS = 64  # more survivors than this vary too little to sum over


class Waiting(Protocol):
    """Rows that wait at one segment and could run together."""

    @property
    def segment(self) -> int: ...
    @property
    def rows(self) -> int: ...  # at least 1
    @property
    def full(self) -> int: ...  # rows that make a batch full
    @property
    def since_ms(self) -> float: ...  # when its first row began to wait
    @property
    def patience_ms(self) -> float: ...  # how long that row may give way to others


Queue = TypeVar("Queue", bound=Waiting)


def choose(queues: Iterable[Queue], now_ms: float, max_wait_ms: float) -> tuple[Queue | None, float]:
    """The queue to run now; or None and the time at which to ask again (inf: when there is something new).

    A queue may run when it is full, or when its first row has waited for `max_wait_ms`: with 0 any may, and the
    executor never idles. Of those that may:

    1. Survivors whose first row has waited longer than their patience, the deepest such queue.
    2. The deepest full queue. New rows out of patience count as one, so that a rare shape gets its turn.
    3. The deepest queue.

    At the same depth, the one that has waited longest.
    """
    best: Queue | None = None
    best_rank = (0, 0, 0.0)  # urgency, depth, age
    wake_ms = inf
    for queue in queues:
        segment, age = queue.segment, now_ms - queue.since_ms
        is_full = queue.rows >= queue.full
        if not is_full and age < max_wait_ms:
            wake_ms = min(wake_ms, queue.since_ms + max_wait_ms)
            continue
        is_late = age > queue.patience_ms
        rank = (2 if segment and is_late else 1 if is_full or is_late else 0, segment, age)
        if best is None or rank > best_rank:
            best, best_rank = queue, rank
    return best, inf if best is not None else wake_ms


@dataclass(frozen=True, slots=True)
class Plan:
    """How rows of one size are run."""

    batch_rows: int  # of a full batch
    regroup: tuple[bool, ...]  # E: whether survivors wait for others before this segment; else they run on at once
    patience_ms: float  # how long a row may give way to others, see `choose`
    gain: float  # predicted: saturated throughput over that of running every batch to completion


def plan_without_costs(num_segments: int, max_batch: int) -> Plan:
    """Nothing is known, so nothing is regrouped, and whoever came first goes first."""
    return Plan(max_batch, (False,) * num_segments, 0.0, 1.0)


def plan_from_costs(costs: BatchCosts, survival: Sequence[float], max_batch: int, row_size: int = 0) -> Plan:
    """The best plan for rows of `row_size` (0: as measured) when the share `survival[k]` goes on after exit k.

    Both ways of running are priced per row at every batch size, and among sizes that are as good the smallest is
    taken. Regrouping is chosen only where it is predicted to gain MIN_GAIN over the best batch run to completion.
    """
    sizes = sorted({1 << power for power in range(max_batch.bit_length())} | {max_batch})
    closed = (False,) * (len(survival) + 1)
    alone = {size: _price(costs, survival, size, closed, row_size) for size in sizes}
    flags = {size: _regroup_flags(costs, survival, size, row_size) for size in sizes}
    pooled = {size: _price(costs, survival, size, flags[size], row_size) for size in sizes}
    plain, best = _smallest_best(alone), _smallest_best(pooled)
    gain = alone[plain] / pooled[best]
    size, regroup = (best, flags[best]) if gain >= MIN_GAIN else (plain, closed)
    full_ms = sum(costs.latency_ms(k, size, row_size) for k in range(len(closed)))
    return Plan(size, regroup, PATIENCE_BATCHES * full_ms, gain)


class SurvivalEstimate:
    """The share of rows that go on after each exit, over about the last thousands. Not locked."""

    __slots__ = ("_entered", "_stayed")

    def __init__(self, num_early: int) -> None:
        self._entered = [0.0] * num_early
        self._stayed = [0.0] * num_early

    def observe(self, exit_index: int, entered: int, stayed: int) -> None:
        """`stayed` of `entered` rows did not leave at `exit_index`."""
        self._entered[exit_index] += entered
        self._stayed[exit_index] += stayed
        if self._entered[exit_index] > _FORGET_ROWS:
            self._entered[exit_index] /= 2
            self._stayed[exit_index] /= 2

    def rates(self) -> tuple[float, ...]:
        """One per early exit; 1 where too little was seen, which promises no gain."""
        return tuple(
            stayed / entered if entered >= MIN_ROWS_SEEN else 1.0
            for entered, stayed in zip(self._entered, self._stayed, strict=True)
        )


def _price(costs: BatchCosts, survival: Sequence[float], size: int, regroup: tuple[bool, ...], row_size: int) -> float:
    """Milliseconds of the executor per admitted row when segment 0 gets `size` rows at once."""
    price, reach, share = 0.0, 1.0, 1.0  # rows that get here; and their share of the batch they come in
    for k, is_regrouped in enumerate(regroup):
        if k:
            reach, share = reach * survival[k - 1], share * survival[k - 1]
        if is_regrouped:
            share = 1.0
        if reach > 0:
            price += reach * _price_of_share(costs, k, size, share, row_size)
    return price


def _regroup_flags(costs: BatchCosts, survival: Sequence[float], size: int, row_size: int) -> tuple[bool, ...]:
    """Where survivors of `size` rows had better wait for others."""
    flags, share = [False], 1.0
    for k, rate in enumerate(survival, start=1):
        share *= rate
        together = _price_of_share(costs, k, size, 1.0, row_size)
        is_worth_it = share > 0 and _price_of_share(costs, k, size, share, row_size) > MIN_GAIN * together
        flags.append(is_worth_it)
        share = 1.0 if is_worth_it else share
    return tuple(flags)


def _price_of_share(costs: BatchCosts, segment: int, size: int, share: float, row_size: int) -> float:
    """Per row in `segment` when of every `size` rows each gets there with probability `share` > 0, in one call."""

    def call_ms(rows: float) -> float:
        return (costs.latency_ms(segment, rows, row_size) + CALL_MS) if rows else 0.0

    if share >= 1 or size > _EXACT_ROWS:
        return call_ms(size * share) / (size * share)
    expected = sum(
        comb(size, rows) * share**rows * (1 - share) ** (size - rows) * call_ms(rows) for rows in range(1, size + 1)
    )
    return expected / (size * share)


def _smallest_best(prices: dict[int, float]) -> int:
    limit = min(prices.values()) * WITHIN_BEST
    return min(size for size, price in prices.items() if price <= limit)
