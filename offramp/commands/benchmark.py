"""Measure a bundle against its alternatives, request by request, as a gateway would ask."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from offramp.bundle import Manifest
from offramp.commands.dataset import Inputs, load_dataset
from offramp.commands.uncut import load_reference, uncut_model
from offramp.errors import OptionError
from offramp.export.export_bundle import WHOLE, reference_path
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.onnxruntime_engine import open_session
from offramp.runtime.timing import interleaved_ms, summary
from offramp.trace import UNKNOWN

Answer = Callable[[Inputs], NDArray[Any]]  # inputs of N rows -> their classes (N,) int64, or values of a regression
WARMUP_ROWS = 20


@dataclass(frozen=True)
class Measured:
    """One alternative: time per request, and how right it is about the rows with a label (None without any).

    Accuracy for classes, the mean absolute error for the values of a regression.
    """

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    jitter_ms: float  # p99 - p50
    rows_per_s: float
    accuracy: float | None
    error: float | None = None


@dataclass(frozen=True)
class BenchOptions:
    """What to time: `num_rows` rows for every size of request. Raises OptionError for numbers that are not positive."""

    num_rows: int = 300
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    backend: str = "auto"
    threads: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.num_rows, *self.batch_sizes) < 1:
            raise OptionError(
                f"bench: got {self.num_rows} rows and batch sizes {self.batch_sizes}, expected positive numbers"
            )


def bench_bundle(
    bundle: Path, data: str, options: BenchOptions, progress: Callable[[str], None] = lambda _: None
) -> dict[str, dict[int, Measured]]:
    """Time `bundle` under its policy, at full depth, and, where its reference is there, uncut and cut at each exit.

    Alternative -> rows per request -> figures. The reference is in FP32 whatever the precision. Raises what opening
    the bundle and reading the data raise.
    """
    opening = options.threads, options.precision
    with (
        Runner.open(bundle, options.backend, None, *opening) as runner,
        Runner.open(bundle, runner.backend, Policy.full_depth(), *opening) as full_depth,
    ):
        alternatives: dict[str, Answer] = {}
        if (reference_path(bundle) / WHOLE).is_file():
            alternatives |= reference_answers(bundle, runner.manifest, options.threads)
        alternatives |= {"full depth": runner_answer(full_depth), "offramp": runner_answer(runner)}
        measured: dict[str, dict[int, Measured]] = {name: {} for name in alternatives}
        for size in options.batch_sizes:
            progress(f"timing {len(alternatives)} alternatives on requests of {size}")
            asked = load_dataset(runner, data, "test", size)
            is_first = size == options.batch_sizes[0]  # a row's answer does not depend on its batch: one time is enough
            labels = asked.labels if is_first else asked.labels[:0]
            found = compare(alternatives, asked.batches, labels, -(-options.num_rows // size))
            for name, figures in found.items():
                first = next(iter(measured[name].values()), figures)
                measured[name][size] = replace(figures, accuracy=first.accuracy, error=first.error)
        return measured


def compare(
    alternatives: Mapping[str, Answer], requests: Sequence[Inputs], labels: NDArray[Any], num_requests: int
) -> dict[str, Measured]:
    """Time all alternatives on the same `num_requests` requests, interleaved; all requests count for accuracy or error.

    `labels` (see runtime.record.Rows) has one entry per row of `requests`, in their order, or none. Requests of another
    size than the first are not timed.
    """
    sizes = [len(next(iter(inputs.values()))) for inputs in requests]
    timed = [inputs for inputs, size in zip(requests, sizes, strict=True) if size == sizes[0]]
    calls = {name: asking(answer, timed) for name, answer in alternatives.items()}
    times_ms = interleaved_ms(calls, num_requests, -(-WARMUP_ROWS // sizes[0]))
    is_value = np.issubdtype(labels.dtype, np.floating)
    known = ~np.isnan(labels) if is_value else labels != UNKNOWN
    measured = {}
    for name, answer in alternatives.items():
        accuracy = error = None
        if known.any():
            answers = np.concatenate([answer(inputs) for inputs in requests])[known]
            if is_value:
                error = float(np.abs(answers - labels[known]).mean())
            else:
                accuracy = float((answers == labels[known]).mean())
        rows_per_s = 1e3 * sizes[0] / float(times_ms[name].mean())
        measured[name] = Measured(**summary(times_ms[name]), rows_per_s=rows_per_s, accuracy=accuracy, error=error)
    return measured


def asking(answer: Answer, requests: Sequence[Inputs]) -> Callable[[], None]:
    """Return a function that asks the next request, from the first again after the last."""
    coming = itertools.cycle(requests)

    def ask() -> None:
        answer(next(coming))

    return ask


def runner_answer(runner: Runner) -> Answer:
    if runner.manifest.is_regression:
        return lambda inputs: runner.run(inputs).outputs["logits"][:, 0]
    return lambda inputs: runner.run(inputs).prediction


def uncut_answer(bundle: Path, manifest: Manifest, threads: int) -> Answer:
    """The whole model beside `bundle` with its final exit only, all of ONNX Runtime's optimisations on."""
    return _session_answer(bundle, load_reference(bundle, manifest), manifest.exits[-1].name, manifest, threads)


def reference_answers(bundle: Path, manifest: Manifest, threads: int) -> dict[str, Answer]:
    """The uncut model, and the same weights cut off at each exit before the final one: static models."""
    whole = load_reference(bundle, manifest)
    names = {"uncut": manifest.exits[-1].name}
    names |= {f"cut at exit {k}": spec.name for k, spec in enumerate(manifest.exits[:-1])}
    return {name: _session_answer(bundle, whole, output, manifest, threads) for name, output in names.items()}


def _session_answer(bundle: Path, whole: ModelProto, output: str, manifest: Manifest, threads: int) -> Answer:
    model = uncut_model(whole, output)
    # All of ONNX Runtime's optimisations, as who does not use offramp has them; threads as the engines have them.
    session = open_session(model.SerializeToString(), threads, str(reference_path(bundle)), left_out=())
    if manifest.is_regression:
        return lambda inputs: np.asarray(session.run(None, inputs)[0])[:, 0]
    return lambda inputs: np.asarray(session.run(None, inputs)[0]).argmax(axis=1)


def tables_from_measured(measured: Mapping[str, Mapping[int, Measured]]) -> list[object]:
    """One table per size of request, for a rich console."""
    from rich.table import Table

    tables: list[object] = []
    for size in next(iter(measured.values()), {}):
        base = next(iter(measured.values()))[size].mean_ms
        is_value = any(sizes[size].error is not None for sizes in measured.values())
        right = "mean error" if is_value else "accuracy"
        table = Table(
            "", "mean ms", "p50", "p95", "p99", "jitter", "rows/s", "speed", right, title=f"{size} rows a request"
        )
        for name, found in ((name, sizes[size]) for name, sizes in measured.items()):
            times = (found.mean_ms, found.p50_ms, found.p95_ms, found.p99_ms, found.jitter_ms)
            quality = found.error if is_value else found.accuracy
            cells = [
                f"{found.rows_per_s:.0f}",
                f"{base / found.mean_ms:.2f}x",
                "" if quality is None else f"{quality:.3f}",
            ]
            table.add_row(name, *(f"{value:.2f}" for value in times), *cells)
        tables.append(table)
    return tables
