"""Place: choose which exits of a bundle to keep, and cut it again with those only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from offramp.bundle import load_manifest, read_policy
from offramp.commands.dataset import ROTTEN_TOMATOES, Inputs, open_rows, single_rows
from offramp.commands.exit_costs import cached_costs
from offramp.commands.traces import TraceRequest, trace_for
from offramp.commands.uncut import load_reference
from offramp.errors import OptionError
from offramp.export.export_bundle import ExportOptions, Extras, check_target, export_bundle
from offramp.export.recut import calibration_batches, source_from_bundle, with_exits
from offramp.policy import Policy, Veto
from offramp.runtime import Runner
from offramp.trace import Trace
from offramp.tuning.placement import place
from offramp.tuning.placement_data import Costs, PlacedExit, Placement, PlacementOptions

REPORT = "placement.json"  # below reports/ in the new bundle
_TIMED_ROWS = 48
_CALIBRATION_ROWS = 16  # per batch, as `offramp export` calibrates
_CALIBRATION_BATCHES = 16
_TRUSTED_RESIDUAL = 0.03  # costs that add up worse were measured beside other work

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PlaceRequest:
    """What to place, on which data, and what for. Raises OptionError when made with a negative cost."""

    trace: TraceRequest
    calibration_data: str = ""  # for precisions below FP32; empty: what the bundle's reference kept
    exit_ms: float = math.nan  # what an exit costs a row that passes; NaN: measure
    is_measured_anew: bool = False

    def __post_init__(self) -> None:
        if self.exit_ms < 0:
            raise OptionError(f"--exit-ms: got {self.exit_ms}, expected milliseconds, 0 or more")


@dataclass(frozen=True)
class Placed:
    """A placement, what it was measured on, and the bundle that it is about."""

    placement: Placement
    backend: str
    precision: str
    fingerprint: str  # of the bundle that was placed
    residual: float | None  # predicted ÷ measured without any early exit, less 1; None: costs were given
    left_out: tuple[str, ...]  # conditions of the old policy that a placement does not carry over

    def document(self) -> dict[str, Any]:
        """Everything as one object that `json.dumps` takes."""
        others = {name: value for name, value in asdict(self).items() if name != "placement"}
        return {**self.placement.document(), **others}


def place_bundle(
    bundle: Path, output: Path | None, request: PlaceRequest, options: PlacementOptions, progress: Progress
) -> Placed:
    """Choose the exits of `bundle` under `options`, and write a bundle with these only to `output`, if there is one.

    The new bundle has the precisions of the old one, its policy with the chosen thresholds, no plans and no
    certificate. Raises what reading, measuring, `place` and `export_bundle` raise; then nothing has been written.
    """
    if output:
        if output.resolve() == bundle.resolve():
            raise OptionError(f"place: the new bundle cannot take the place of {bundle}; choose another -o")
        check_target(output)
    manifest = load_manifest(bundle)
    if manifest.is_regression:
        raise OptionError(
            f"place: {bundle} is a regression, and exits are placed by rows that are right or wrong; choose them when "
            f"exporting, and thresholds with `offramp calibrate {bundle}`"
        )
    old = Policy.from_json(read_policy(bundle, manifest))
    opening = request.trace.backend, Policy.full_depth(), request.trace.threads, request.trace.precision
    progress("looking for what every exit says")
    trace = trace_for(bundle, request.trace, say=progress)
    with Runner.open(bundle, *opening) as runner:
        costs, residual = _costs(bundle, runner, trace, request, progress)
        progress("choosing exits")
        placement = place(trace, costs, options, old.temperatures)
        placed = Placed(
            placement, runner.backend, runner.precision, runner.manifest.fingerprint, residual, _left_out(old)
        )
        batches = _calibration(runner, request.calibration_data)
    if output:
        _write(bundle, output, placed, batches, progress)
    return placed


def _costs(
    bundle: Path, runner: Runner, trace: Trace, request: PlaceRequest, progress: Progress
) -> tuple[Costs, float | None]:
    """What a row pays, and how well it adds up: measured, or the segments of the trace and an exit's cost as given."""
    if math.isnan(request.exit_ms):
        asked = request.trace
        rows = _timed_rows(bundle, runner, asked)
        measured = cached_costs(bundle, runner, rows, asked.threads, progress, request.is_measured_anew)
        return measured.costs, measured.residual
    exits_ms = (request.exit_ms,) * (trace.num_exits - 1)
    no_exits_ms = float(trace.costs_ms.sum()) - sum(exits_ms)
    if no_exits_ms <= 0:
        raise OptionError(
            f"--exit-ms: got {request.exit_ms} for each of {len(exits_ms)} exits, expected less than all segments take "
            f"together, which is {trace.costs_ms.sum():.3f}"
        )
    uncut_ms = no_exits_ms if math.isnan(trace.uncut_ms) else trace.uncut_ms
    return Costs(tuple(trace.costs_ms.tolist()), exits_ms, uncut_ms), None


def _timed_rows(bundle: Path, runner: Runner, asked: TraceRequest) -> list[Inputs]:
    """Single rows of the data; where none was named and the model reads no texts, of what it was exported with."""
    if asked.data or runner.manifest.text:
        stream = open_rows(runner, asked.data or ROTTEN_TOMATOES, asked.split, 1, _TIMED_ROWS)
        return [dict(one.inputs) for one in stream]
    return single_rows(calibration_batches(bundle))[:_TIMED_ROWS]


def _left_out(policy: Policy) -> tuple[str, ...]:
    """What the old policy asks beside thresholds and temperatures: it counts exits that may be gone."""
    conditions = {
        "patience": policy.patience > 0,
        "a veto": policy.veto != Veto(),
        "a minimum depth": policy.minimum_depth > 1,
        "policies of sources": bool(policy.sources),
    }
    return tuple(name for name, is_set in conditions.items() if is_set)


def _calibration(runner: Runner, data: str) -> tuple[Inputs, ...]:
    """Batches to lower with, none where the reference's are meant."""
    if not data:
        return ()
    limit = _CALIBRATION_ROWS * _CALIBRATION_BATCHES
    return tuple(dict(batch.inputs) for batch in open_rows(runner, data, "train", _CALIBRATION_ROWS, limit))


def _write(bundle: Path, output: Path, placed: Placed, batches: tuple[Inputs, ...], progress: Progress) -> None:
    """Export the whole graph beside `bundle` again, with the kept exits and the chosen policy."""
    manifest = load_manifest(bundle)
    source = with_exits(source_from_bundle(bundle, manifest, load_reference(bundle, manifest)), placed.placement.kept)
    if batches:
        source = replace(source, example=batches[0], calibration=batches)
    lowered = sorted(set(manifest.segments[0].graphs) - {"fp32"})
    if lowered and len(source.calibration) == 1:
        rows = len(next(iter(source.calibration[0].values())))
        progress(f"lowering with {rows} rows, all that {bundle.name}.reference kept; --calibration-data has more")
    report = (json.dumps(placed.document(), indent=2) + "\n").encode()
    extras = Extras(placed.placement.policy, {REPORT: report})
    export_bundle(source, output, ExportOptions(",".join(lowered) or "fp32"), progress, extras)


def lines_from_placed(placed: Placed) -> list[str]:
    """The choice, the waterfall and the alternatives, as text."""
    found = placed.placement
    early, options = found.kept[:-1], found.options
    what = f"exits {', '.join(map(str, early))} and the final one" if early else "the final exit only"
    if len(found.kept) == len(found.costs.segments_ms):
        what = "all exits"
    bound = f"at most {options.max_worst_case:g}" if options.is_chosen else "given exits, no bound"
    lines = [
        f"keep {what}: {found.expected_ms:.3f} ms expected, with all exits {found.all_exits_ms:.3f}, "
        f"with none {found.no_exits_ms:.3f}, uncut {found.costs.uncut_ms:.3f}",
        f"full depth {found.worst_case:.3f} x the uncut model ({bound}); {found.lost} of {found.num_rows} rows lost "
        f"(at most {found.max_lost}: {options.risk} {options.max_risk:g} could then be certified on as many rows)",
        f"on rows that did not choose, by halves: {found.held_out_ms:.3f} ms, {found.held_out_risk:.2%} lost",
        f"searched {found.combinations:,} choices: "
        + (
            "the optimum over all exits and thresholds" if found.is_complete else "the optimum over these, then refined"
        ),
        f"  {'no early exit':<42}{found.no_exits_ms:>9.3f} ms",
    ]
    lines += [_line_from_exit(one) for one in found.exits]
    lines += [f"  {'expected':<42}{found.expected_ms:>9.3f} ms", "best for every number of early exits:"]
    for one in found.alternatives:
        kept = ", ".join(map(str, one.kept)) or "none"
        beyond = "" if one.is_allowed else ", beyond the bound"
        lines.append(f"  {kept:<30}{one.expected_ms:>9.3f} ms, full depth {one.worst_case:.3f}{beyond}")
    if placed.residual is not None:
        advice = "" if abs(placed.residual) <= _TRUSTED_RESIDUAL else "; measure on a quiet machine (--measure)"
        lines.append(f"costs add up: the chain without early exits is {placed.residual:+.1%} off{advice}")
    if placed.left_out:
        lines.append(f"not carried over from the old policy: {', '.join(placed.left_out)}")
    return lines


def _line_from_exit(found: PlacedExit) -> str:
    sums = f"-{found.saves_ms:.3f} +{found.costs_ms:.3f}"
    if found.is_kept:
        threshold = "closed" if found.threshold is None else f"{found.threshold:.4f}"
        return f"  {f'exit {found.exit_index}: {found.share:.1%} leave at {threshold}':<42}{sums:>16}"
    if found.toggled_ms is None:
        return f"  exit {found.exit_index}: dropped, no threshold was within the bound"
    return f"  {f'exit {found.exit_index}: dropped; with it':<42}{sums:>16} = {found.toggled_ms:.3f} ms"
