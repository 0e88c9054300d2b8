"""Commands that look at a bundle or this machine: inspect, verify, report, doctor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from offramp.command_line.options import (
    BACKEND,
    BUNDLE,
    JSON,
    PRECISION,
    print_result,
)
from offramp.errors import OptionError


@click.command()
@BUNDLE
@JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what is in a bundle: segments, what they carry, files, and plans with their headers read back."""
    from offramp.commands.inspection import describe_bundle, lines_from_description

    description = describe_bundle(bundle)
    print_result(as_json, description, lines_from_description(description))


@click.command()
@BUNDLE
@JSON
def verify(bundle: Path, as_json: bool) -> None:
    """Check every file's hash, and the segments against the whole graph beside the bundle."""
    from offramp.commands.verification import verify_bundle

    parity = verify_bundle(bundle)
    lines = [f"{bundle}: all files as exported; chain equals the whole graph on {parity.rows} rows"]
    lines += [f"bit-equal: {parity.chain_bit_equal}, with rows leaving: {parity.compacted_bit_equal}"]
    print_result(as_json, parity.figures(), lines)


@click.command()
@BUNDLE
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The page to write: one .html file, no other.")
@click.option("--trace", type=click.Path(path_type=Path), help="The trace to report on.  [default: beside the bundle]")
@click.option("--bench", "benchmark", type=click.Path(path_type=Path), help="What `offramp bench --json` printed.")
@click.option("--examples", default="", help="The trace's data: lets its texts in. rotten-tomatoes, .csv or .jsonl.")
@click.option("--split", type=click.Choice(["validation", "test"]), default="validation", help="Of rotten-tomatoes.")
@BACKEND
@PRECISION
@JSON
def report(bundle: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Write a page about a bundle under its policy: accuracy against time, exits, risk, certificate, confidence.

    It reads the trace beside the bundle and runs no model. Texts of the data stay out unless --examples lets them in.
    """
    from offramp.commands.reporting import ReportRequest, report_bundle
    from offramp.report.words import headline

    if not output and not as_json:
        raise OptionError("report: got neither `-o PAGE.html` nor `--json`, expected one of them, or both")
    found = report_bundle(bundle, ReportRequest(**options), output)
    lines = [headline(found), found.certificate.statement, f"next: open {output}"]
    print_result(as_json, dataclasses.asdict(found), lines)


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Say what is installed here, which backends work, and why the others do not."""
    from offramp.commands.doctor import diagnose

    findings = diagnose()
    lines = [f"{'ok ' if found.works else 'no '} {found.subject:<24} {found.detail}" for found in findings]
    print_result(as_json, [dataclasses.asdict(found) for found in findings], lines)
