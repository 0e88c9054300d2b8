"""Commands that choose exits: place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from offramp.command_line.options import (
    BACKEND,
    BUNDLE,
    JSON,
    PRECISION,
    SCORE,
    THREADS,
    names_from_text,
    picked,
    print_result,
    steps_on_stderr,
)
from offramp.errors import OptionError


@click.command("place")
@BUNDLE
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle directory to write.")
@click.option("--data", default="", help="Record a trace of this data.  [default: the trace that is there]")
@click.option("--max-risk", default=0.01, show_default=True, help="Share of the rows that may be lost.")
@click.option("--confidence", default=0.95, show_default=True, help="Of the certificate that is to follow.")
@click.option(
    "--risk",
    type=click.Choice(["consistency", "accuracy_gap"]),
    default="consistency",
    show_default=True,
    help="A row is lost where full depth says otherwise, or where it is right and the exit is not.",
)
@click.option("--max-worst-case", default=1.05, show_default=True, help="Full depth ÷ uncut model; inf for no bound.")
@SCORE
@click.option("--keep", default="", metavar="1,3|none", help="Keep these exits, whatever they cost.")
@click.option("--exit-ms", type=float, default=math.nan, show_default="measured", help="What passing an exit costs.")
@click.option("--measure", is_flag=True, help="Measure the costs again, also where this was done before.")
@click.option("--calibration-data", default="", help="Real inputs for FP16 and INT8.  [default: the bundle's own]")
@click.option("--dry-run", is_flag=True, help="Say what would be chosen, and write nothing.")
@BACKEND
@PRECISION
@THREADS
@JSON
def place(bundle: Path, output: Path | None, keep: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Choose which exits of BUNDLE to keep, and their thresholds, and cut it again with those only.

    The least expected latency of a row, from what every exit says about the data and what exits and segments cost on
    this machine, under a bound on the rows lost and one on full depth. The new bundle has engines of its own: build
    its plans, and calibrate it, before it answers anybody.
    """
    from offramp.commands.placing import PlaceRequest, lines_from_placed, place_bundle
    from offramp.commands.traces import TraceRequest
    from offramp.tuning.placement_data import PlacementOptions

    if not (output or dry_run):
        raise OptionError("place: pass -o PLACED, the bundle to write, or --dry-run")
    chosen = PlacementOptions(
        **picked(options, "score", "risk", "max_risk", "confidence", "max_worst_case"),
        is_chosen=not keep,
        keep=_exits_from_text(keep),
    )
    request = PlaceRequest(
        TraceRequest(**picked(options, "data", "backend", "precision", "threads")),
        **picked(options, "calibration_data", "exit_ms"),
        is_measured_anew=options["measure"],
    )
    written = None if dry_run else output
    placed = place_bundle(bundle, written, request, chosen, steps_on_stderr(not as_json))
    lines = lines_from_placed(placed)
    if written:
        plans = "" if placed.backend == "onnxruntime" else f"offramp build-engine {written}; "
        lines.append(f"next: {plans}offramp calibrate {written}: its engines are others, and nothing is certified yet")
    print_result(as_json, placed.document(), lines)


def _exits_from_text(text: str) -> tuple[int, ...]:
    names = () if text == "none" else names_from_text(text)
    if not all(name.isdecimal() for name in names):
        raise OptionError(f"--keep: got {text!r}, expected positions of exits such as 1,3, or none")
    return tuple(int(name) for name in names)
