"""What `offramp sweep` does: all runs of a sweep, step by step, and a table of what came out."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from offramp.commands.sweep_run import TRAIN, Place, check_training, differing, load_record, train_run, training_from
from offramp.commands.sweeps import Sweep, SweepRun, grid_from_text, load_sweep, runs_of, seeds_from
from offramp.errors import OptionError
from offramp.models.options import nearest
from offramp.storage import write_file

TABLE = "table.csv"
STEPS = (TRAIN,)


@dataclass(frozen=True)
class SweepRequest:
    """What the command line says; `seeds` 0 is the sweep's own number, `only` are patterns of names of runs."""

    recipe: str
    seeds: int = 0
    grid: Sequence[str] = ()
    only: Sequence[str] = ()
    steps: Sequence[str] = STEPS
    retrain: bool = False


def run_sweep(
    folder: Path, request: SweepRequest, say: Callable[[str], None] = lambda line: None, progress: bool = False
) -> dict[str, Any]:
    """Do the steps that are asked for, of every run in turn, and write the table of all runs of the sweep.

    Raises OptionError before anything is done for what is not known, and what the steps raise.
    """
    sweep = requested_sweep(request)
    runs = runs_of(sweep)
    chosen = [run for run in runs if not request.only or any(fnmatch(run.name, only) for only in request.only)]
    if not chosen:
        raise OptionError(f"--only {' '.join(request.only)}: none of {', '.join(run.name for run in runs)}")
    for step in request.steps:
        if step not in STEPS:
            raise OptionError(f"--steps: got {step!r}, {nearest(step, STEPS)}")
    places = [Place(folder, run, say, progress, request.retrain) for run in chosen]
    for place in places:  # all of them, before hours are spent on the first
        check_training(place, load_record(place.path, TRAIN), training_from(place))
    if TRAIN in request.steps:
        for number, place in enumerate(places, start=1):
            state = train_run(place)
            say(f"[{number}/{len(places)}] {place.run.name}: train: {state}")
    found = document(folder, sweep, runs)
    write_file(folder / TABLE, csv_from_rows(found["runs"]).encode())
    return found


def requested_sweep(request: SweepRequest) -> Sweep:
    """Return the sweep with what the command line changes."""
    sweep = load_sweep(request.recipe)
    grid = dict(sweep.grid) | dict(grid_from_text(text) for text in request.grid)
    return replace(sweep, seeds=seeds_from(request.seeds) if request.seeds else sweep.seeds, grid=grid)


def document(folder: Path, sweep: Sweep, runs: Sequence[SweepRun]) -> dict[str, Any]:
    """Return what is known of all runs, and mean and standard deviation over seeds."""
    rows = [row_of(Place(folder, run)) for run in runs]
    groups = {
        run.group: [row for row, other in zip(rows, runs, strict=True) if other.group == run.group] for run in runs
    }
    return {
        "sweep": sweep.name,
        "folder": str(folder),
        "runs": rows,
        "groups": {name: over_seeds(members) for name, members in groups.items()},
    }


def row_of(place: Place) -> dict[str, Any]:
    """Return what is known of one run; its figures are there once its training of the same values is done."""
    run = place.run
    row: dict[str, Any] = {"run": run.name, "variant": run.variant, "point": run.point, "seed": run.seed}
    record = load_record(place.path, TRAIN)
    if record is None or record.result is None or differing(record.made_from, training_from(place), run.name):
        return row
    exits = run.recipe.model.get("exits") or range(len(record.result["validation"]))
    row |= {f"validation_{name}": value for name, value in zip(exits, record.result["validation"], strict=False)}
    return row | {"train_seconds": record.result.get("seconds")}


def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return for every figure its mean and standard deviation (0 for one) over the rows that have it, and how many."""
    figures = {name for row in rows for name, value in row.items() if isinstance(value, float)}
    found: dict[str, Any] = {}
    for name in sorted(figures):
        values = [row[name] for row in rows if row.get(name) is not None]
        found[name] = {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0, "runs": len(values)}
    return found


def csv_from_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV, with every column that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def lines_from_sweep(found: dict[str, Any]) -> list[str]:
    """Return the table over seeds, for people."""
    lines = []
    for name, figures in found["groups"].items():
        texts = [f"{figure} {value['mean']:.4g} ± {value['sd']:.2g}" for figure, value in figures.items()]
        lines.append(f"{name}: {', '.join(texts) or 'nothing yet'}")
    return [*lines, f"{found['folder']}/{TABLE}"]
