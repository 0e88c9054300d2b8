"""Commands that answer with a bundle: run, bench."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from offramp.command_line.options import (
    BACKEND,
    BUNDLE,
    DATA,
    JSON,
    PRECISION,
    THREADS,
    print_result,
    steps_on_stderr,
    whole_numbers_from_text,
)


@click.command()
@BUNDLE
@click.argument("data", default="-")
@click.option("--policy", "policy_path", type=click.Path(exists=True, path_type=Path), help="A policy.json to use.")
@click.option("--full-depth", is_flag=True, help="Close all exits.")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(min=1), help="Rows per request.")
@click.option("--monitor", "monitor_path", type=click.Path(path_type=Path), help="Watch, and keep a snapshot here.")
@BACKEND
@PRECISION
@THREADS
def run(bundle: Path, data: str, policy_path: Path | None, full_depth: bool, batch_size: int, **options: Any) -> None:
    """Answer DATA (texts, one per line; an .npz of inputs; - for stdin): one JSON object per row on stdout."""
    from offramp.commands.answers import answers
    from offramp.commands.monitoring import monitored
    from offramp.policy import Policy
    from offramp.runtime import Runner

    policy = Policy.from_json(policy_path.read_bytes()) if policy_path else None
    monitor_path: Path | None = options.pop("monitor_path")
    with ExitStack() as stack:
        runner = Runner.open(bundle, policy=Policy.full_depth() if full_depth else policy, **options)
        stack.enter_context(runner)
        if monitor_path is not None:
            stack.enter_context(monitored(runner, monitor_path, lambda line: click.echo(line, err=True)))
        for answer in answers(runner, data, batch_size):
            click.echo(json.dumps(answer))


@click.command()
@BUNDLE
@DATA
@click.option("--requests", default=300, show_default=True, type=click.IntRange(min=1), help="Rows to time, per size.")
@click.option("--batch-sizes", default="1,8,32", show_default=True, help="Rows per request.")
@BACKEND
@PRECISION
@THREADS
@JSON
def bench(bundle: Path, data: str, requests: int, batch_sizes: str, as_json: bool, **options: Any) -> None:
    """Time the bundle against the uncut model, that model cut off at each exit, and its own full depth, interleaved."""
    from rich.console import Console

    from offramp.commands.benchmark import BenchOptions, bench_bundle, tables_from_measured

    sizes = whole_numbers_from_text(batch_sizes, "--batch-sizes")
    measured = bench_bundle(bundle, data, BenchOptions(requests, sizes, **options), steps_on_stderr(True))
    if as_json:
        figures = {name: {size: dataclasses.asdict(m) for size, m in by.items()} for name, by in measured.items()}
        print_result(True, figures, [])
    else:
        Console(width=110).print(*tables_from_measured(measured), sep="\n")
