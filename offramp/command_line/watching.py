"""Commands that look at what a monitor has seen: monitor."""

from __future__ import annotations

import json
from pathlib import Path

import click

from offramp.command_line.options import JSON, print_result


@click.command()
@click.argument("snapshots", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--prometheus", is_flag=True, help="Print Prometheus's text format.")
@JSON
def monitor(snapshots: tuple[Path, ...], prometheus: bool, as_json: bool) -> None:
    """Add up SNAPSHOTS, one file per process (`offramp run --monitor`), and show them."""
    from offramp.commands.monitoring import load_snapshots
    from offramp.runtime.monitor_metrics import exposition
    from offramp.runtime.monitor_snapshot import lines_from_snapshot

    snapshot = load_snapshots(snapshots)
    if prometheus:
        click.echo(exposition(snapshot), nl=False)
    else:
        print_result(as_json, json.loads(snapshot.to_json()), lines_from_snapshot(snapshot))
