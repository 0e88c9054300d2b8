"""Commands that look at a bundle or this machine: inspect, verify, doctor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from offramp.command_line.options import (
    BUNDLE,
    JSON,
    print_result,
)


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
@JSON
def doctor(as_json: bool) -> None:
    """Say what is installed here, which backends work, and why the others do not."""
    from offramp.commands.doctor import diagnose

    findings = diagnose()
    lines = [f"{'ok ' if found.works else 'no '} {found.subject:<24} {found.detail}" for found in findings]
    print_result(as_json, [dataclasses.asdict(found) for found in findings], lines)
