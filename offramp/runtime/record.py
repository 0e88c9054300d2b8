"""Records a trace: every exit's answers about every row, and each segment's cost for one row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import ROWS
from offramp.errors import DataError
from offramp.policy import Policy
from offramp.runtime.engine import Engine, SegmentOutput
from offramp.runtime.inputs import checked_inputs
from offramp.trace import UNKNOWN, Trace

if TYPE_CHECKING:
    from offramp.runtime.runner import Runner

# Chosen, not measured: at most a few seconds of a model of 50 ms per row.
_COST_PASSES = 64  # timed, one row each
_WARM_UP_PASSES = 8

_Inputs = dict[str, NDArray[Any]]


def record_trace(
    runner: Runner,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    labels: Sequence[int] | NDArray[np.int64],
    temperatures: Sequence[float],
    *,
    progress: bool,
) -> Trace:
    """See Runner.record."""
    num_exits = len(runner.manifest.exits)
    setting = Policy(temperatures=tuple(temperatures))
    setting.check_exits(num_exits)
    inverse = tuple(setting.inverse_temperatures(num_exits))
    outputs: list[list[SegmentOutput]] = []  # chunk -> exit
    samples: list[_Inputs] = []
    for batch in _with_progress(batches, progress):
        for chunk in _chunks(batch, runner):
            outputs.append(_run_all_exits(runner.engines, chunk, inverse))
            if len(samples) < _COST_PASSES:
                samples.append({name: array[:1] for name, array in chunk.items()})
    if not outputs:
        raise DataError("recording a trace: got no rows, expected at least one; pass some batches")
    return Trace(
        logits=_stacked([[out.logits for out in exits] for exits in outputs]),
        scores=_stacked([[out.scores for out in exits] for exits in outputs]),
        predictions=_stacked([[out.prediction for out in exits] for exits in outputs]),
        temperatures=np.asarray(setting.temperatures or (1.0,) * num_exits, np.float64),
        labels=_checked_labels(labels, sum(len(exits[0].logits) for exits in outputs)),
        costs_ms=_median_costs_ms(runner.engines, samples, inverse),
        fingerprint=runner.manifest.fingerprint,
        backend=runner.backend,
        precision=runner.precision,
        learned=_learned(outputs),
        files=runner.files,
    )


def _chunks(batch: Mapping[str, NDArray[Any]], runner: Runner) -> Iterable[_Inputs]:
    """The rows of `batch`, checked, at most as many at once as the bundle takes."""
    arrays, num_rows = checked_inputs(batch, runner.manifest)
    limits = runner.manifest.dimensions.get(ROWS)
    step = limits.max if limits else max(num_rows, 1)
    for start in range(0, num_rows, step):
        yield {name: array[start : start + step] for name, array in arrays.items()}


def _run_all_exits(
    engines: Sequence[Engine], inputs: _Inputs, inverse_temperatures: tuple[np.float32, ...]
) -> list[SegmentOutput]:
    """Every segment on all rows of `inputs`; the carries are let go."""
    carry: Any = inputs
    rows = np.arange(len(next(iter(inputs.values()))))  # (S,)
    outputs = []
    for engine, inverse_temperature in zip(engines, inverse_temperatures, strict=True):
        out = engine.run(carry, rows, inverse_temperature)
        outputs.append(out._replace(carry=None))
        carry = out.carry
    return outputs


def _median_costs_ms(
    engines: Sequence[Engine], samples: list[_Inputs], inverse_temperatures: tuple[np.float32, ...]
) -> NDArray[np.float64]:
    """(E,) median time of each segment over single rows taken across the data set."""
    times_ms = np.zeros((_WARM_UP_PASSES + _COST_PASSES, len(engines)))
    row = np.zeros(1, np.int64)
    for timed in range(len(times_ms)):
        carry: Any = samples[timed % len(samples)]
        for k, engine in enumerate(engines):
            start = perf_counter()
            carry = engine.run(carry, row, inverse_temperatures[k]).carry
            times_ms[timed, k] = (perf_counter() - start) * 1e3
    medians: NDArray[np.float64] = np.median(times_ms[_WARM_UP_PASSES:], axis=0)
    return medians


def _learned(outputs: list[list[SegmentOutput]]) -> NDArray[np.float32]:
    """(N, E), NaN for exits without a learned confidence; no columns when none has one."""
    if all(out.learned is None for out in outputs[0]):
        return np.empty((0, 0), np.float32)
    nothing = [np.full(len(exits[0].logits), np.nan, np.float32) for exits in outputs]
    return _stacked(
        [
            [missing if out.learned is None else out.learned for out in exits]
            for exits, missing in zip(outputs, nothing, strict=True)
        ]
    )


def _stacked(parts: list[list[NDArray[Any]]]) -> NDArray[Any]:
    """chunk -> exit -> (S, …) to (N, E, …)."""
    return np.concatenate([np.stack(exits, axis=1) for exits in parts])


def _checked_labels(labels: Sequence[int] | NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    if not len(labels):
        return np.full(num_rows, UNKNOWN, np.int64)
    if len(labels) != num_rows:
        raise DataError(
            f"recording a trace: got {len(labels)} labels for {num_rows} rows; expected one per row, or none"
        )
    return np.asarray(labels, np.int64)


def _with_progress(
    batches: Iterable[Mapping[str, NDArray[Any]]], progress: bool
) -> Iterable[Mapping[str, NDArray[Any]]]:
    if not progress:
        return batches
    from rich.console import Console
    from rich.progress import track

    total = len(batches) if isinstance(batches, Sized) else None
    return track(batches, "recording", total=total, console=Console(stderr=True))
