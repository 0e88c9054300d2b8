"""Options that several commands share, and how they print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from offramp.bundle import LEARNED, SCORES
from offramp.errors import OptionError

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text.")
BACKEND = click.option("--backend", default="auto", show_default=True, help="What runs the segments.")
PRECISION = click.option(
    "--precision", default="auto", show_default=True, help="Which graphs run: fp32, or int8 or fp16 if exported."
)
THREADS = click.option("--threads", default=0, show_default="the backend's choice", help="Threads per segment.")
SCORE = click.option(
    "--score",
    type=click.Choice([*SCORES, LEARNED]),
    default="max_prob",
    show_default=True,
    help="What exits are sure by.",
)
DATA = click.option(
    "--data",
    default="rotten-tomatoes",
    show_default=True,
    help="A .csv or .jsonl file (text, label, source), a .txt, an .npz of inputs and labels, rotten-tomatoes or imdb.",
)


def print_result(as_json: bool, document: Any, lines: Iterable[str]) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=2, default=str))
    else:
        for line in lines:
            click.echo(line)


def steps_on_stderr(shown: bool) -> Callable[[str], None]:
    """A function that says on stderr what is being done."""
    return (lambda step: click.echo(f"{step} …", err=True)) if shown else (lambda _: None)


def names_from_text(text: str) -> tuple[str, ...]:
    """Names from a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def whole_numbers_from_text(text: str, option: str) -> tuple[int, ...]:
    """Positive whole numbers from a comma-separated list."""
    names = names_from_text(text)
    if not names or not all(name.isdecimal() and int(name) for name in names):
        raise OptionError(f"{option}: got {text!r}, expected positive whole numbers such as 1,8,32")
    return tuple(int(name) for name in names)


def picked(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}
