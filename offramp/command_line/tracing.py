"""Commands around traces: trace, diagnose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offramp.command_line.options import BACKEND, BUNDLE, DATA, JSON, PRECISION, THREADS, picked, print_result

if TYPE_CHECKING:
    from offramp.tuning.diagnostics import Diagnostics


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

    A decoder's rows are the tokens of the texts in --data (--limit: of the first texts).

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


@click.command()
@BUNDLE
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(path_type=Path),
    help="A trace elsewhere.  [default: the one beside BUNDLE, of its present graphs or plans]",
)
@BACKEND
@PRECISION
@JSON
def diagnose(bundle: Path, trace_path: Path | None, backend: str, precision: str, as_json: bool) -> None:
    """Say what a trace tells of the exits: calibration errors, failure prediction, agreement, overthinking.

    Temperatures other than 1 were needed (a calibration error above 2 %) and fitted on these rows. No model is run.
    """
    from offramp.commands.traces import stored_trace
    from offramp.trace import load_trace
    from offramp.tuning.diagnostics import diagnose

    found = diagnose(load_trace(trace_path) if trace_path else stored_trace(bundle, backend, precision))
    print_result(as_json, found.document(), lines_from_diagnostics(found))


def lines_from_diagnostics(found: Diagnostics) -> Iterator[str]:
    """The diagnostics as lines of text."""
    yield f"{found.num_rows} rows, {found.num_labelled} with a label"
    for value in found.values:
        known = (
            ""
            if value.error is None
            else f"mean error {value.error:.3f}, RMSE {value.rmse:.3f}, bias {value.bias:+.3f}, "
        )
        ranked = (
            "" if value.sure_rank is None else f"; confidence and being right, rank correlation {value.sure_rank:.2f}"
        )
        yield f"exit {value.exit_index}: {known}{value.deviation:.3f} from full depth{ranked}"
    last = len(found.agreement) - 1
    for k, agreement in enumerate(found.agreement[:-1]):
        yield f"exit {k} answers as exit {last} does on {agreement[last]:.1%} of the rows"
    for point in found.exits:
        a, b, vector = point.unscaled, point.scaled, point.vector
        ranked = "" if b.failure_auroc is None else f", AUROC of failure {b.failure_auroc:.3f}"
        yield (
            f"exit {point.exit_index}: accuracy {point.accuracy:.3f}, ECE {a.ece:.1%}; at temperature "
            f"{b.temperature:.2f}: ECE {b.ece:.1%}, adaptive {b.adaptive_ece:.1%}, class by class "
            f"{b.classwise_ece:.1%}, Brier {b.brier:.3f}, NLL {b.nll:.3f}{ranked}"
        )
        if vector.is_worth_it:
            yield (
                f"  vector scaling would gain {vector.gain:.4f} ± {vector.gain_standard_error:.4f} of NLL on rows that "
                f"it has not seen; the runtime scales by one temperature"
            )
    if found.overthinking:
        o = found.overthinking
        share = "" if o.share_of_errors is None else f" ({o.share_of_errors:.0%} of the end's errors)"
        yield f"overthinking: wasteful {o.wasteful:.1%}, destructive {o.destructive:.1%}{share}"
        yield f"an oracle would be right on {o.oracle_accuracy:.1%} with {o.oracle_depth:.2f} segments on average"
