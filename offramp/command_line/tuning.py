"""Commands that tune a bundle: calibrate."""

from __future__ import annotations

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
    or_closed,
    picked,
    print_result,
)

_SCORES = ["max_prob", "margin", "entropy", "learned"]


@click.command()
@BUNDLE
@DATA
@click.option("--score", type=click.Choice(_SCORES), default="max_prob", show_default=True)
@click.option("--max-drop", default=0.01, show_default=True, help="Accuracy that may be lost, as a fraction.")
@click.option("--target-speedup", default=1.0, help="Instead: one threshold for all exits that is this much faster.")
@click.option("--consistency", is_flag=True, help="No labels: bound answers that differ from full depth instead.")
@click.option("--trace", "trace_path", type=click.Path(path_type=Path), help="Also write the recorded trace here.")
@BACKEND
@PRECISION
@THREADS
@JSON
def calibrate(bundle: Path, data: str, as_json: bool, **options: Any) -> None:
    """Choose temperatures and the fastest thresholds within --max-drop, from a trace of the real engines.

    Calibrate with the --precision that will run: scores differ between them. The drop is the one seen on this data,
    without a statistical certificate.
    """
    from offramp.bundle import replace_policy
    from offramp.commands.dataset import load_dataset
    from offramp.runtime import Runner
    from offramp.trace import save_trace
    from offramp.tuning.calibrate import CalibrateOptions, calibrate
    from offramp.tuning.thresholds import check_score

    chosen = CalibrateOptions(
        options["score"],
        options["max_drop"],
        "full_depth" if options["consistency"] else "label",
        target_speedup=options["target_speedup"],
    )
    with Runner.open(bundle, **picked(options, "backend", "precision", "threads")) as runner:
        check_score(chosen.score, [bool(spec.learned) for spec in runner.manifest.exits])
        dataset = load_dataset(runner, data, "validation")
        trace = runner.record(dataset.batches, dataset.labels, progress=not as_json)
    calibration = calibrate(trace, chosen)
    if options["trace_path"]:
        save_trace(options["trace_path"], trace)
    replace_policy(bundle, calibration.policy.to_json().encode())
    report = calibration.report
    lines = [
        f"exit {found.exit_index}: threshold {or_closed(found.threshold)}, temperature {found.temperature:.2f}, "
        f"{found.share:.1%} of rows leave"
        for found in report.exits
    ]
    lines += [f"mean depth {report.mean_depth:.2f} segments, accuracy drop {report.drop:.4f} on {report.num_rows} rows"]
    run_it = f"next: offramp run {bundle}" + (
        f" --precision {options['precision']}" if options["precision"] != "fp32" else ""
    )
    print_result(as_json, calibration.document(), [*lines, run_it])
