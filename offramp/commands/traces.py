"""The traces of a bundle: where they lie, whether they are still of its engines, and how they are recorded.

One trace per backend and precision, `BUNDLE.reference/traces/<backend>-<precision>.npz`. Who needs a trace asks
`trace_for` (finds it, or records it) or `stored_trace` (finds it, opens no engine).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.bundle import Manifest, load_manifest
from offramp.commands.dataset import ROTTEN_TOMATOES, open_rows
from offramp.commands.decoder_traces import precision_of, record_decoder
from offramp.commands.uncut import uncut_call
from offramp.errors import DataError, OptionError
from offramp.export.export_bundle import reference_path
from offramp.runtime import Runner
from offramp.runtime.backends import ONNXRUNTIME
from offramp.runtime.costs import SIZES
from offramp.runtime.record import RecordOptions, record_to_file
from offramp.trace import UNKNOWN, Trace, load_fields, load_trace

TRACES = "traces"
_TEST = "test"
_COST_SECONDS = 5.0  # for the table of batch costs


@dataclass(frozen=True)
class TraceRequest:
    """Which trace of a bundle: what runs the segments, and on which rows."""

    data: str = ""  # empty: the trace that is there already; where there is none, rotten-tomatoes
    split: str = "validation"  # of rotten-tomatoes
    limit: int = 0  # rows, drawn at random; 0: all
    backend: str = "auto"
    precision: str = "auto"
    threads: int = 0


def trace_path(bundle: Path, backend: str, precision: str) -> Path:
    """Where the trace of `bundle` on these engines lies."""
    return reference_path(bundle) / TRACES / f"{backend}-{precision}.npz"


def trace_for(
    bundle: Path, request: TraceRequest, progress: bool = False, say: Callable[[str], None] = lambda _: None
) -> Trace:
    """The trace that lies beside `bundle`, where it is of the engines that `request` opens; recorded anew otherwise.

    With `request.data`, it is recorded in any case. `say` is told what is done. Raises OptionError, DataError,
    BundleError or BackendError.
    """
    if load_manifest(bundle).decoder:
        path = trace_path(bundle, ONNXRUNTIME, precision_of(request))
        if not request.data and path.is_file() and is_of(trace := load_trace(path), load_manifest(bundle)):
            say(f"using {path} with {len(trace.labels)} token positions")
            return trace
        record_decoder(bundle, request, path)
        return load_trace(path)
    with Runner.open(bundle, request.backend, None, request.threads, request.precision) as runner:
        path = trace_path(bundle, runner.backend, runner.precision)
        if not request.data and path.is_file():
            trace = load_trace(path)
            if trace.files == runner.files:
                say(f"using {path} with {len(trace.labels)} rows")
                return trace
            say(f"{path} is of other engines, recording another")
        _record(bundle, runner, request, path, progress)
    return load_trace(path)


def record_bundle(
    bundle: Path, request: TraceRequest, output: Path | None = None, progress: bool = False
) -> tuple[Path, str]:
    """Record what `bundle` says about the rows of `request` in `output`, or in its place; returns where, and the hash.

    Raises as `trace_for` does; OptionError for test rows without an `output`.
    """
    if output is None and request.split == _TEST:
        raise OptionError(
            f"trace: got split {_TEST!r} without an output; the trace beside a bundle is what it is calibrated on: "
            f"name another file with `-o`"
        )
    if load_manifest(bundle).decoder:
        path = output or trace_path(bundle, ONNXRUNTIME, precision_of(request))
        return path, record_decoder(bundle, request, path)
    with Runner.open(bundle, request.backend, None, request.threads, request.precision) as runner:
        path = output or trace_path(bundle, runner.backend, runner.precision)
        return path, _record(bundle, runner, request, path, progress)


def stored_trace(bundle: Path, backend: str = "auto", precision: str = "auto") -> Trace:
    """The trace beside `bundle` of its present graphs or plans, read without opening an engine.

    Raises DataError, with the command, when there is none, or more than one for "auto".
    """
    manifest = load_manifest(bundle)
    asked = {"backend": backend, "precision": precision}
    traces = {
        place.stem: trace
        for place in sorted((reference_path(bundle) / TRACES).glob("*.npz"))
        if is_of(trace := load_trace(place), manifest)
        and all(value in ("auto", getattr(trace, name)) for name, value in asked.items())
    }
    if len(traces) != 1:
        got = f"got {', '.join(traces)}; choose one with `--backend` and `--precision`" if traces else "got none"
        raise DataError(
            f"looking for a trace of {bundle} on its present graphs: {got}"
            + ("" if traces else f"; run `offramp trace {bundle} --data DATA`")
        )
    return next(iter(traces.values()))


def summary_of(path: Path, sha256: str) -> dict[str, Any]:
    """What the trace at `path` is of, for people, without reading more of it than that. Raises DataError."""
    labels, targets, sources, costs_ms, sizes, batch_costs_ms, uncut_ms = load_fields(
        path, "labels", "targets", "sources", "costs_ms", "cost_sizes", "batch_costs_ms", "uncut_ms"
    )
    backend, precision, fingerprint, files = load_fields(path, "backend", "precision", "fingerprint", "files")
    return {
        "path": str(path),
        "sha256": sha256,
        "rows": len(labels),
        "labelled": int(((labels != UNKNOWN) | ~np.isnan(targets)).sum()),
        "sources": [str(name) for name in np.unique(sources) if name],
        "exits": len(costs_ms),
        "costs_ms": costs_ms.tolist(),
        "batch_costs_ms": {int(size): line for size, line in zip(sizes, batch_costs_ms.tolist(), strict=True)},
        "uncut_ms": None if np.isnan(uncut_ms) else float(uncut_ms),
        "backend": str(backend),
        "precision": str(precision),
        "fingerprint": str(fingerprint),
        "files": files.tolist(),
    }


def is_of(trace: Trace, manifest: Manifest) -> bool:
    """Did every segment of `trace` run a graph or plan that the bundle of `manifest` has now?"""
    if len(trace.files) != len(manifest.segments):
        return False
    for sha256, segment in zip(trace.files, manifest.segments, strict=True):
        graph = segment.graphs.get(trace.precision)
        graphs = {graph.sha256} if graph else set()
        plans = {plan.file.sha256 for plan in segment.plans if plan.backend == trace.backend}
        if sha256 not in (graphs if trace.backend == ONNXRUNTIME else plans):
            return False
    return True


def _record(bundle: Path, runner: Runner, request: TraceRequest, path: Path, progress: bool) -> str:
    """Record the rows of `request` in `path`; returns the trace's hash."""
    rows = open_rows(runner, request.data or ROTTEN_TOMATOES, request.split, limit=request.limit)
    uncut = uncut_call(bundle, runner, request.threads)
    options = RecordOptions(cost_sizes=SIZES, budget_s=_COST_SECONDS, uncut=uncut, progress=progress)
    return record_to_file(runner, rows, path, options)
