"""The command that sweeps a grid."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from offramp.command_line.options import JSON, names_from_text, print_result

STEPS = ("train", "export", "trace", "calibrate", "bench")


def _listed(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the sweeps and leave."""
    if not wanted or context.resilient_parsing:
        return
    from offramp.commands.sweeps import load_sweep, sweep_names

    for name in sweep_names():
        click.echo(f"{name:36}{load_sweep(name).summary}")
    context.exit()


@click.command()
@click.argument("recipe")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_listed, help="List the sweeps.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the sweep.")
@click.option("--seeds", type=click.IntRange(min=1), help="How many, from 0 on; a sweep's file has its own number.")
@click.option("--grid", multiple=True, metavar="NAME=V1,V2", help="Values to try: stage.encoder_lr=2e-5,5e-5")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only these runs, such as 'eat/*' or '*/seed-0'.")
@click.option("--steps", default=",".join(STEPS), show_default=True, help="What to do.")
@click.option("--retrain", is_flag=True, help="Train again what was trained with other values.")
@JSON
def sweep(recipe: str, output: Path, as_json: bool, **options: Any) -> None:
    """Train, export, calibrate and time a grid of RECIPE: a sweep that --list shows, a recipe, or a .toml file.

    What is done already is not done again: after a kill, the same command goes on. Several processes may work on one
    folder; a run that another one is at is left to it.
    """
    # Read when torch is imported: spinning threads cost 3 to 6 times the time beside any other work (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from offramp.commands.sweep import TABLE, SweepRequest, run_sweep, table_from_sweep

    request = SweepRequest(
        recipe,
        options["seeds"] or 0,
        options["grid"],
        options["only"],
        names_from_text(options["steps"]),
        options["retrain"],
    )
    found = run_sweep(output, request, lambda line: click.echo(line, err=True), progress=not as_json)
    if not as_json:
        Console(width=120).print(table_from_sweep(found))
    print_result(as_json, found, [str(output / TABLE)])
