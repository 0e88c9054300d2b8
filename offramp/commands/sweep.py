"""What `offramp sweep` does: all runs of a sweep, step by step, and a table of what came out."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from offramp.commands.sweep_bench import BENCH, bench_seed, benched
from offramp.commands.sweep_run import (
    TRAIN,
    Place,
    State,
    check_training,
    differing,
    load_record,
    train_run,
    training_from,
)
from offramp.commands.sweep_steps import CALIBRATE, EXPORT, TRACE, calibrate_run, export_run, trace_run
from offramp.commands.sweeps import Measure, Sweep, SweepRun, grid_from_text, load_sweep, runs_of, seeds_from
from offramp.errors import OptionError
from offramp.models.options import nearest
from offramp.storage import write_file

TABLE = "table.csv"
_STEPS = {EXPORT: export_run, TRACE: trace_run, CALIBRATE: calibrate_run}
STEPS = (TRAIN, *_STEPS, BENCH)
# Figures of the table for people; the file has all of them.
_SHOWN = {
    "validation": "validation",
    "accuracy": "accuracy",
    "error": "error",  # mean absolute, of a regression
    "mean_ms_1": "mean ms",
    "p50_ms_1": "p50",
    "rows_per_s_32": "rows/s at 32",
    "mean_depth": "mean depth",
    "retention": "retention",
}


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
    if request.retrain and TRAIN not in request.steps:
        raise OptionError(f"--retrain: got --steps {','.join(request.steps)}, expected {TRAIN} among them")
    places = [Place(folder, run, say, progress, request.retrain) for run in chosen]
    for place in places:  # all of them, before hours are spent on the first
        check_training(place, load_record(place.path, TRAIN), training_from(place))
    for step in (step for step in STEPS if step in request.steps):
        todo = work_of(step, folder, places, sweep.measure)
        for number, (name, work) in enumerate(todo, start=1):
            say(f"{step} {number}/{len(todo)}, {name}: {work()}")
    found = document(folder, sweep, runs)
    write_file(folder / TABLE, csv_from_rows(found["runs"]).encode())
    return found


def work_of(
    step: str, folder: Path, places: Sequence[Place], measure: Measure
) -> list[tuple[str, Callable[[], State]]]:
    """Return what a step comes to: what it is done to, by name, and how; timing is by seed, the others by run."""
    if step == BENCH:
        seeds: dict[str, list[Place]] = {}
        for place in places:
            seeds.setdefault(f"{place.run.point} seed {place.run.seed}".strip(), []).append(place)
        return [(name, partial(bench_seed, folder, members, measure)) for name, members in seeds.items()]
    if step == TRAIN:
        return [(place.run.name, partial(train_run, place)) for place in places]
    return [(place.run.name, partial(_STEPS[step], place, measure)) for place in places]


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
    validation = record.result["validation"]
    exits = run.recipe.model.get("exits") or range(len(validation))
    row |= {f"validation_{name}": value for name, value in zip(exits, validation, strict=False)}
    row["validation"] = validation[-1]  # of the final exit
    row["train_seconds"] = record.result.get("seconds")
    return row | benched(place)


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


def table_from_sweep(found: dict[str, Any]) -> Any:
    """Return the table over seeds, for a rich console: columns that any of the runs has, speeds against the first."""
    from rich.table import Table

    groups: dict[str, dict[str, Any]] = found["groups"]
    names = {name for figures in groups.values() for name in figures}
    shown = {figure: title for figure, title in _SHOWN.items() if figure in names}
    table = Table("", "seeds", *shown.values(), *(["speed p50"] if "p50_ms_1" in names else []))
    base = next(iter(groups.values()), {}).get("p50_ms_1")
    for name, figures in groups.items():
        cells = [_cell(figures.get(figure)) for figure in shown]
        if "p50_ms_1" in names:
            own = figures.get("p50_ms_1")
            cells.append(f"{base['mean'] / own['mean']:.2f}x" if own and base else "")
        table.add_row(name, str(max((figure["runs"] for figure in figures.values()), default=0)), *cells)
    return table


def _cell(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else f"{figure['mean']:.4g} ± {figure['sd']:.2g}"
