"""Commands around traces: trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from offramp.command_line.options import BACKEND, BUNDLE, DATA, JSON, PRECISION, THREADS, picked, print_result


@click.command()
@BUNDLE
@DATA
@click.option("--split", type=click.Choice(["validation", "test"]), default="validation", show_default=True)
@click.option("--limit", default=0, show_default="all", help="Record this many rows, drawn at random.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the trace here.  [default: BUNDLE.reference/traces/BACKEND-PRECISION.npz, where calibrate finds it]",
)
@BACKEND
@PRECISION
@THREADS
@JSON
def trace(bundle: Path, as_json: bool, output: Path | None, **options: Any) -> None:
    """Record what every exit says about every row of --data, on the engines that will run, and what segments cost.

    In bounded memory; killed and started again, it goes on where it was. Nothing else should run meanwhile: segments
    are timed, and so is the uncut model where BUNDLE.reference is there.
    """
    from offramp.commands.traces import TraceRequest, record_bundle, summary_of

    request = TraceRequest(**picked(options, "data", "split", "limit", "backend", "precision", "threads"))
    path, sha256 = record_bundle(bundle, request, output, progress=not as_json)
    document = summary_of(path, sha256)
    costs = ", ".join(f"{ms:.2f}" for ms in document["costs_ms"])
    uncut = document["uncut_ms"]
    lines = [
        f"{document['rows']} rows x {document['exits']} exits on {document['backend']} {document['precision']}: {path}",
        f"{document['labelled']} with a label; from {', '.join(document['sources']) or 'no source that has a name'}",
        f"one row costs {costs} ms by segment" + (f", {uncut:.2f} ms uncut" if uncut else ""),
        f"sha256 {sha256}",
    ]
    print_result(as_json, document, lines)
