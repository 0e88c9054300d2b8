"""Records a trace: every exit's answers about every row, and each segment's costs.

In memory (`record_trace`), or into a file in bounded memory and so that a recording that was killed goes on where it
was (`record_to_file`): answers are written in parts, each under the hash of what it is the answer to.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import LEARNED, RETENTION, ROWS
from offramp.errors import DataError
from offramp.policy import Policy
from offramp.runtime.costs import measure_trace_costs
from offramp.runtime.engine import Engine, SegmentOutput
from offramp.runtime.inputs import checked_inputs
from offramp.runtime.row_sample import RowSample, token_mask
from offramp.trace import UNKNOWN, Trace, joined, load_trace, save_joined, save_trace

if TYPE_CHECKING:
    from offramp.runtime.runner import Runner

# Of a part: what is lost when a recording is killed, and what is in memory at a time.
_PART_ROWS = 4096
_PART_BYTES = 1 << 26  # of its inputs

_Inputs = dict[str, NDArray[Any]]


class Rows(NamedTuple):
    """Consecutive rows of a data set."""

    inputs: Mapping[str, NDArray[Any]]
    labels: NDArray[Any] | None = None  # (N,) classes, UNKNOWN where not known; values of a regression, NaN where not
    sources: NDArray[np.str_] | None = None  # (N,), "" where not known


@dataclass(frozen=True)
class RecordOptions:
    """How to record. Single rows are always timed; `cost_sizes` are the batch sizes of the cost table."""

    temperatures: tuple[float, ...] = ()  # one per exit; empty: 1
    cost_sizes: tuple[int, ...] = ()
    budget_s: float = 2.0  # for the costs
    uncut: Callable[[_Inputs], object] | None = None  # the uncut model, to be timed beside the segments
    progress: bool = False


def record_trace(runner: Runner, batches: Iterable[Rows], options: RecordOptions = RecordOptions()) -> Trace:
    """What every exit of `runner` says about every row of `batches`; see Runner.record."""
    sample = RowSample(runner.manifest)
    asked = _Asked.of(runner, options)
    parts = [asked.answered(part) for part in _parts(batches, runner, sample, options)]
    if not parts:
        raise _no_rows()
    return replace(joined(parts), **_times(runner, sample, options))


def record_to_file(
    runner: Runner,
    batches: Iterable[Rows],
    path: Path,
    options: RecordOptions = RecordOptions(),
) -> str:
    """Record a trace in the file `path`, in memory for a few thousand rows; returns its `Trace.sha256`.

    Killed at any moment and called again with the same rows, it goes on after the last part that is whole, in the
    directory `.<name>.parts` beside `path`, and ends with the same hash. Raises InputError, OptionError, DataError
    or StorageError.
    """
    folder = path.with_name(f".{path.name}.parts")
    sample = RowSample(runner.manifest)
    asked = _Asked.of(runner, options)
    places: list[Path] = []
    for part in _parts(batches, runner, sample, options):
        places.append(folder / f"{len(places):06d}-{asked.key(part)}.npz")
        if not _is_whole(places[-1]):
            save_trace(places[-1], asked.answered(part))
    if not places:
        raise _no_rows()
    sha256 = save_joined(path, places, **_times(runner, sample, options))
    shutil.rmtree(folder, ignore_errors=True)
    return sha256


def _no_rows() -> DataError:
    return DataError("recording a trace: got no rows, expected at least one; pass some batches")


def _is_whole(place: Path) -> bool:
    try:
        return place.is_file() and bool(len(load_trace(place).labels))
    except DataError:
        return False


class Truth(NamedTuple):
    """What rows really are: one of the two is not known, depending on what the model answers."""

    labels: NDArray[np.int64]  # (S,), UNKNOWN where not known
    targets: NDArray[np.float32]  # (S,), NaN where not known


def truth_from_labels(labels: NDArray[Any] | None, num_rows: int, is_regression: bool) -> Truth:
    """Labels (N,), values in the case of a regression, as a trace has them. Raises DataError for another number."""
    if labels is not None and labels.shape != (num_rows,):
        raise DataError(
            f"recording a trace: got {len(labels)} labels for {num_rows} rows; expected one per row, or none"
        )
    unknown = Truth(np.full(num_rows, UNKNOWN, np.int64), np.full(num_rows, np.nan, np.float32))
    if labels is None:
        return unknown
    if is_regression:
        return unknown._replace(targets=labels.astype(np.float32))
    return unknown._replace(labels=labels.astype(np.int64))


class _Chunk(NamedTuple):
    """Rows that fit the engines, checked."""

    inputs: _Inputs
    truth: Truth
    sources: NDArray[np.str_]


def _parts(
    batches: Iterable[Rows], runner: Runner, sample: RowSample, options: RecordOptions
) -> Iterator[list[_Chunk]]:
    """All rows, in parts that are the same for the same batches; `sample` is shown them."""
    part: list[_Chunk] = []
    num_rows = num_bytes = 0
    for rows in _with_progress(batches, options.progress):
        for chunk in _chunks(rows, runner):
            sample.add(chunk.inputs, len(chunk.sources))
            part.append(chunk)
            num_rows += len(chunk.sources)
            num_bytes += sum(array.nbytes for array in chunk.inputs.values())
            if num_rows >= _PART_ROWS or num_bytes >= _PART_BYTES:
                yield part
                part, num_rows, num_bytes = [], 0, 0
    if part:
        yield part


def _chunks(rows: Rows, runner: Runner) -> Iterator[_Chunk]:
    """`rows`, at most as many at once as the bundle takes."""
    arrays, num_rows = checked_inputs(rows.inputs, runner.manifest)
    truth = truth_from_labels(rows.labels, num_rows, runner.manifest.is_regression)
    sources = np.full(num_rows, "", np.str_) if rows.sources is None else rows.sources
    limits = runner.manifest.dimensions.get(ROWS)
    step = limits.max if limits else max(num_rows, 1)
    for start in range(0, num_rows, step):
        span = slice(start, start + step)
        some = Truth(truth.labels[span], truth.targets[span])
        yield _Chunk({name: array[span] for name, array in arrays.items()}, some, sources[span])


@dataclass(frozen=True)
class _Asked:
    """The engines and the setting that answers come from."""

    runner: Runner
    temperatures: tuple[float, ...]  # E
    inverse_temperatures: tuple[np.float32, ...]  # E

    @classmethod
    def of(cls, runner: Runner, options: RecordOptions) -> _Asked:
        num_exits = len(runner.manifest.exits)
        policy = Policy(temperatures=options.temperatures)
        policy.check_exits(num_exits)
        return cls(runner, policy.temperatures or (1.0,) * num_exits, tuple(policy.inverse_temperatures(num_exits)))

    def key(self, part: Sequence[_Chunk]) -> str:
        """A name for what the answers about `part` depend on: the rows, and what runs."""
        runner = self.runner
        running = (runner.backend, runner.precision, runner.manifest.fingerprint, runner.files, self.temperatures)
        digest = hashlib.sha256(repr(running).encode())
        for chunk in part:
            for name, array in sorted(chunk.inputs.items()):
                digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
                digest.update(array.tobytes())
            digest.update(repr((*(known.tolist() for known in chunk.truth), chunk.sources.tolist())).encode())
        return digest.hexdigest()[:32]

    def answered(self, part: Sequence[_Chunk]) -> Trace:
        """The trace of the rows of `part`, without times."""
        runner = self.runner
        outputs = [_run_all_exits(runner.engines, chunk.inputs, self.inverse_temperatures) for chunk in part]
        return Trace(
            logits=_stacked([[out.logits for out in exits] for exits in outputs]),
            scores=_stacked([[out.scores for out in exits] for exits in outputs]),
            predictions=_stacked([[out.prediction for out in exits] for exits in outputs]),
            temperatures=np.asarray(self.temperatures, np.float64),
            labels=np.concatenate([chunk.truth.labels for chunk in part]),
            targets=np.concatenate([chunk.truth.targets for chunk in part]),
            costs_ms=np.zeros(len(runner.engines)),
            fingerprint=runner.manifest.fingerprint,
            backend=runner.backend,
            precision=runner.precision,
            learned=_row_output(outputs, LEARNED),
            retention=_row_output(outputs, RETENTION),
            sources=np.concatenate([chunk.sources for chunk in part]),
            lengths=np.concatenate([_lengths(runner, chunk) for chunk in part]),
            files=runner.files,
        )


def _times(runner: Runner, sample: RowSample, options: RecordOptions) -> dict[str, Any]:
    return measure_trace_costs(runner, sample, options.cost_sizes, options.budget_s, options.uncut)._asdict()


def _lengths(runner: Runner, chunk: _Chunk) -> NDArray[np.int64]:
    """(S,) tokens of each row, UNKNOWN for a model of something else."""
    mask = token_mask(runner.manifest)
    if mask is None:
        return np.full(len(chunk.sources), UNKNOWN, np.int64)
    return np.asarray(np.count_nonzero(chunk.inputs[mask.name], axis=1), np.int64)


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


def _row_output(outputs: list[list[SegmentOutput]], name: str) -> NDArray[np.float32]:
    """One of ROW_OUTPUTS of every row and exit, (N, E), NaN for exits without; no columns when none has it."""
    told = [[getattr(out, name) for out in exits] for exits in outputs]  # chunk -> exit
    if all(values is None for values in told[0]):
        return np.empty((0, 0), np.float32)
    nothing = [np.full(len(exits[0].logits), np.nan, np.float32) for exits in outputs]
    return _stacked(
        [
            [missing if values is None else values for values in exits]
            for exits, missing in zip(told, nothing, strict=True)
        ]
    )


def _stacked(parts: list[list[NDArray[Any]]]) -> NDArray[Any]:
    """chunk -> exit -> (S, …) to (N, E, …)."""
    return np.concatenate([np.stack(exits, axis=1) for exits in parts])


def _with_progress(batches: Iterable[Rows], progress: bool) -> Iterable[Rows]:
    if not progress:
        return batches
    from rich.console import Console
    from rich.progress import track

    total = len(batches) if isinstance(batches, Sized) else None
    return track(batches, "recording", total=total, console=Console(stderr=True))
