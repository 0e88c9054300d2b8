"""What a batch costs in each segment: measured latencies over batch sizes, L_k(b), and the lines between them.

It measures and interpolates, for pools (`measure_batch_costs`: the time without other work on the machine) and for
traces (`measure_trace_costs`: the median); what follows from the figures is decided by whoever asks.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import ROWS, Manifest
from offramp.errors import DataError, InputError, OptionError
from offramp.runtime.inputs import checked_inputs

if TYPE_CHECKING:
    from offramp.runtime.row_sample import RowSample
    from offramp.runtime.runner import Runner

SCHEMA = 1
SIZES = (1, 2, 4, 8, 16, 32)
# Other work on the machine only ever adds: where it came and went, medians told doubled latencies and this did not.
_QUANTILE = 0.25
# Chosen, not measured: of 5 runs, three may be disturbed; more than 200 tell nothing new.
_MIN_REPETITIONS, _MAX_REPETITIONS = 5, 200
_WARM_UP_ROUNDS, _MIN_TRACE_ROUNDS = 8, 40  # of a trace's; 40 give batches of 32 rows 5 rounds
_UNCUT = 0  # beside the batch sizes

_Inputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class BatchCosts:
    """Typical latency of each of E segments at B batch sizes, one executor running alone.

    `sizes` (B,) ascend, `ms[k]` (B,) is positive and never falls. `row_size` is how large the measured rows were:
    the product of their symbolic dimensions, such as their number of tokens. Raises DataError when made otherwise.
    """

    sizes: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    row_size: int = 1

    def __post_init__(self) -> None:
        if not self.sizes or self.sizes[0] < 1 or any(a >= b for a, b in pairwise(self.sizes)):
            raise DataError(f"batch costs: got sizes {self.sizes}, expected ascending numbers from 1")
        if self.row_size < 1:
            raise DataError(f"batch costs: got row_size {self.row_size}, expected at least 1")
        for segment, line in enumerate(self.ms):
            is_whole = len(line) == len(self.sizes) and all(math.isfinite(ms) and ms > 0 for ms in line)
            if not is_whole or any(a > b for a, b in pairwise(line)):
                raise DataError(
                    f"batch costs: segment {segment} has {line}, expected {len(self.sizes)} positive numbers, "
                    f"one per size, none below the one before it; measure again with `measure_batch_costs`"
                )

    def latency_ms(self, segment: int, rows: float, row_size: int = 0) -> float:
        """The expected latency of `segment` on `rows` rows; 0 for none. Never falls as `rows` grows.

        Linear between the measured sizes and beyond them. Rows of another size than the measured ones count by their
        size: 8 rows of 16 tokens as 2 of 64. `row_size=0` is the measured size.
        """
        if rows <= 0:
            return 0.0
        sizes, line = self.sizes, self.ms[segment]
        if row_size:
            rows = rows * row_size / self.row_size
        if len(sizes) == 1:
            return line[0] * rows / sizes[0]
        after = min(max(bisect_right(sizes, rows), 1), len(sizes) - 1)
        slope = (line[after] - line[after - 1]) / (sizes[after] - sizes[after - 1])
        return max(line[after - 1] + slope * (rows - sizes[after - 1]), 0.0)

    def to_json(self) -> str:
        """The costs as JSON; `from_json` gives back exactly these."""
        return json.dumps({"schema": SCHEMA, "row_size": self.row_size, "sizes": self.sizes, "ms": self.ms})

    @classmethod
    def from_json(cls, text: str | bytes) -> BatchCosts:
        """The costs written by `to_json`. Raises DataError when it is anything else."""
        try:
            document = json.loads(text)
            schema, row_size = document["schema"], int(document["row_size"])
            sizes = tuple(int(size) for size in document["sizes"])
            ms = tuple(tuple(float(cost) for cost in line) for line in document["ms"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as exc:
            raise DataError(f"batch costs: not what `to_json` writes ({exc!r}); measure again") from exc
        if schema != SCHEMA:
            raise DataError(f"batch costs have schema {schema!r}, this offramp reads {SCHEMA}")
        return cls(sizes, ms, row_size)


def measure_batch_costs(
    runner: Runner, inputs: Mapping[str, NDArray[Any]], sizes: Sequence[int] = SIZES, budget_s: float = 2.0
) -> BatchCosts:
    """Time every segment of `runner` at every batch size of `sizes` on the rows of `inputs`, repeated as needed.

    All rows go to full depth, one chain after another, so that weights and carries are as cold as they are in service.
    Stops once `budget_s` seconds are over, but not before 5 rounds. Sizes above the bundle's maximum are left out;
    neighbouring sizes are averaged where they contradict one another. Nothing else should run on these engines
    meanwhile. Raises OptionError or InputError.
    """
    arrays, num_rows = checked_inputs(inputs, runner.manifest)
    if not num_rows:
        raise InputError("measuring batch costs: got no rows, expected at least one; pass real inputs")
    chosen = _sizes_within(sizes, runner.manifest)
    batches = {size: {name: a[np.arange(size) % num_rows] for name, a in arrays.items()} for size in chosen}
    chains = {size: partial(_chain_ms, runner, batch) for size, batch in batches.items()}
    times = _timed_rounds(lambda _: chains, _Rounds(1, _MIN_REPETITIONS, budget_s))
    typical = np.asarray([np.quantile(times[size], _QUANTILE, axis=0) for size in chosen])  # (B, E)
    ms = tuple(_straightened(chosen, line) for line in typical.T.tolist())
    return BatchCosts(tuple(chosen), ms, row_size_from_inputs(arrays, runner.manifest))


class TraceCosts(NamedTuple):
    """What a trace says about time: the fields of that name."""

    costs_ms: NDArray[np.float64]  # (E,)
    cost_sizes: NDArray[np.int64]  # (B,), without size 1 where nobody asked for it
    batch_costs_ms: NDArray[np.float64]  # (B, E)
    uncut_ms: float


def measure_trace_costs(
    runner: Runner,
    sample: RowSample,
    sizes: Sequence[int] = SIZES,
    budget_s: float = 2.0,
    uncut: Callable[[_Inputs], object] | None = None,
) -> TraceCosts:
    """Median times of every segment at every batch size, over rounds that each take other rows of `sample`.

    Single rows are timed whatever `sizes` are, with `uncut` beside them on the same rows. The larger a batch, the
    rarer: size s in every (s / 4)-th round, so that all have about as many rows. At least 40 rounds, then until
    `budget_s` seconds are over. Raises OptionError.
    """
    chosen = _sizes_within(sizes, runner.manifest) if sizes else []

    def runs(current: int) -> Mapping[int, Callable[[], list[float]]]:
        single = sample.batch(current, 1)
        timed = {1: partial(_chain_ms, runner, single)}
        if uncut:
            timed[_UNCUT] = partial(_call_ms, uncut, single)
        first = dict(sorted(timed.items(), reverse=bool(current % 2)))  # neither always comes after the other
        due = [size for size in chosen if size > 1 and current % max(1, size // 4) == 0]
        return first | {size: partial(_chain_ms, runner, sample.batch(current * size, size)) for size in due}

    times = _timed_rounds(runs, _Rounds(_WARM_UP_ROUNDS, _MIN_TRACE_ROUNDS, budget_s))
    medians = {size: np.median(np.asarray(found), axis=0) for size, found in times.items()}
    table = np.asarray([medians[size] for size in chosen]).reshape(len(chosen), len(runner.engines))  # (B, E)
    uncut_ms = float(medians[_UNCUT][0]) if uncut else math.nan
    return TraceCosts(medians[1], np.asarray(chosen, np.int64), table, uncut_ms)


def _sizes_within(sizes: Sequence[int], manifest: Manifest) -> list[int]:
    """Those of `sizes` that the bundle takes, ascending. Raises OptionError when there are none."""
    limits = manifest.dimensions.get(ROWS)
    chosen = sorted({int(size) for size in sizes if not limits or size <= limits.max})
    if not chosen or chosen[0] < 1:
        raise OptionError(f"measuring batch costs: got sizes {tuple(sizes)}, expected some from 1 to the maximum")
    return chosen


class _Rounds(NamedTuple):
    """How often to measure: untimed rounds first, then at least `minimum`, and more until `budget_s` is over."""

    warm_up: int
    minimum: int
    budget_s: float


def _timed_rounds(
    runs: Callable[[int], Mapping[int, Callable[[], list[float]]]], rounds: _Rounds
) -> dict[int, list[list[float]]]:
    """What the callables of every round said, by their keys; `runs` gives those of one round, one after another."""
    times: dict[int, list[list[float]]] = {}
    for current in range(-rounds.warm_up, 0):  # the first run of a shape plans memory
        for run in runs(current).values():
            run()
    end = perf_counter() + rounds.budget_s
    for current in range(_MAX_REPETITIONS):
        if current >= rounds.minimum and perf_counter() >= end:
            break
        for key, run in runs(current).items():
            times.setdefault(key, []).append(run())
    return times


def _call_ms(call: Callable[[_Inputs], object], inputs: _Inputs) -> list[float]:
    start = perf_counter()
    call(inputs)
    return [(perf_counter() - start) * 1e3]


def row_size_from_inputs(inputs: _Inputs, manifest: Manifest) -> int:
    """The product of the symbolic dimensions of a row, the row axis itself left out: its tokens, its pixels; or 1."""
    sizes: dict[str, int] = {}
    for spec in manifest.inputs:
        named = zip(spec.shape, inputs[spec.name].shape, strict=True)
        sizes |= {name: size for name, size in named if isinstance(name, str) and name != ROWS}
    return max(int(np.prod(list(sizes.values()), dtype=np.int64)), 1)


def _chain_ms(runner: Runner, inputs: _Inputs) -> list[float]:
    """(E,) times of one pass of all rows through every segment."""
    carry: Any = inputs
    rows = np.arange(len(next(iter(inputs.values()))))  # (S,)
    times = []
    for engine in runner.engines:
        start = perf_counter()
        carry = engine.run(carry, rows, np.float32(1)).carry
        times.append(max((perf_counter() - start) * 1e3, 1e-6))
    return times


def _straightened(sizes: list[int], line: list[float]) -> tuple[float, ...]:
    """A measured line without what only noise can say: that more rows cost less, or one row more in larger company."""
    per_row = [ms / size for size, ms in zip(sizes, _never_falling(line), strict=True)]
    falling = [-ms for ms in _never_falling([-ms for ms in per_row])]
    return tuple(accumulate((ms * size for size, ms in zip(sizes, falling, strict=True)), max))  # but for rounding


def _never_falling(line: list[float]) -> tuple[float, ...]:
    """The nearest line (least squares) that never falls: neighbours in the wrong order are averaged."""
    blocks: list[tuple[float, int]] = []  # mean, how many sizes
    for ms in line:
        mean, count = ms, 1
        while blocks and blocks[-1][0] > mean:
            before, num = blocks.pop()
            mean, count = (mean * count + before * num) / (count + num), count + num
        blocks.append((mean, count))
    return tuple(mean for mean, count in blocks for _ in range(count))
