"""Commands that tune a bundle: calibrate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from offramp.bundle import LEARNED, SCORES, load_manifest
from offramp.certificate import RISKS
from offramp.command_line.options import (
    BACKEND,
    BUNDLE,
    JSON,
    PRECISION,
    THREADS,
    picked,
    print_result,
    steps_on_stderr,
)


@click.command()
@BUNDLE
@click.option(
    "--data",
    default="",
    show_default="the trace beside the bundle; rotten-tomatoes where there is none",
    help="Record this first: a .csv or .jsonl file (text, label), an .npz of inputs and labels, or rotten-tomatoes.",
)
@click.option("--trace", "trace_path", type=click.Path(path_type=Path), help="Use this trace, of the same engines.")
@click.option(
    "--score",
    type=click.Choice([*SCORES, LEARNED]),
    default=None,
    show_default="max_prob; learned for a regression",
    help="What exits are sure by.",
)
@click.option("--max-risk", default=0.01, show_default=True, help="What the risk is certified to be at most.")
@click.option("--confidence", default=0.95, show_default=True, help="Of the certificate.")
@click.option(
    "--risk", type=click.Choice(list(RISKS)), default=None, show_default="consistency; deviation for a regression"
)
@click.option(
    "--value-range",
    default=1.0,
    show_default=True,
    help="Of a regression: larger distances count as this one, and --max-risk is a share of it.",
)
@click.option("--class", "class_name", default="", help="The class of --risk missed_detection.")
@click.option("--patience", default=0, show_default=True, help="Exits in a row that must agree.")
@click.option("--minimum-depth", default=1, show_default=True, help="Segments before anybody leaves.")
@click.option("--veto-margin", default=0.0, show_default=True, help="Margins below this keep a row in.")
@click.option("--veto", multiple=True, type=click.Choice(["previous", "mean"]), help="Who must agree, or a row stays.")
@click.option("--one-threshold", is_flag=True, help="The same threshold at all exits, tested on all rows.")
@click.option(
    "--by-source",
    type=click.Choice(["simultaneous", "each"]),
    is_flag=False,
    flag_value="simultaneous",
    default=None,
    help="A policy and a statement per source, all true at once (simultaneous), or each by itself.",
)
@click.option("--unknown-source", type=click.Choice(["full-depth", "strictest"]), default="full-depth")
@click.option("--seed", default=0, show_default=True, help="Of the split into learning and testing.")
@click.option("--compare", is_flag=True, help="Show what naive thresholds would do on the same rows.")
@click.option("--max-drop", type=float, help="Uncertified instead: accuracy (or mean error) lost on these rows.")
@click.option("--target-speedup", type=float, help="Uncertified instead: one threshold that is this much faster.")
@click.option("--consistency", is_flag=True, help="With --max-drop: answers that differ from full depth, no labels.")
@BACKEND
@PRECISION
@THREADS
@JSON
def calibrate(bundle: Path, as_json: bool, **options: Any) -> None:
    """Choose temperatures and thresholds, with a certificate: --risk is at most --max-risk, with --confidence.

    The certificate is for the engines that made the trace, so calibrate with the --backend and --precision that will
    run. With --max-drop or --target-speedup nothing is certified, and a certificate that is there goes.
    """
    from offramp.commands.calibration import (
        calibrate_bundle,
        certify_bundle,
        class_index,
        lines_from_calibrated,
        trace_to_calibrate,
    )
    from offramp.commands.traces import TraceRequest

    is_regression = load_manifest(bundle).is_regression
    options["score"] = options["score"] or (LEARNED if is_regression else "max_prob")
    options["risk"] = options["risk"] or ("deviation" if is_regression else "consistency")
    uncertified, base, certified = _chosen(options)
    if options["class_name"]:
        certified = dataclasses.replace(certified, class_index=class_index(bundle, options["class_name"]))
    request = TraceRequest(**picked(options, "data", "backend", "precision", "threads"))
    trace = trace_to_calibrate(bundle, request, options["trace_path"], not as_json, steps_on_stderr(not as_json))
    if uncertified is not None:
        found = calibrate_bundle(bundle, trace, uncertified)
    else:
        found = certify_bundle(bundle, trace, base, certified, options["compare"])
    command = "run" if trace.has_logits else "generate"
    run_it = f"next: offramp {command} {bundle}" + (
        f" --precision {options['precision']}" if options["precision"] not in ("auto", "fp32") else ""
    )
    print_result(as_json, found.document(), [*lines_from_calibrated(found), run_it])


def _chosen(options: dict[str, Any]) -> Any:
    """(options without a certificate or None, the base policy, options with one), all checked before any work."""
    from offramp.errors import OptionError
    from offramp.policy import Policy, Veto
    from offramp.tuning.calibrate import CalibrateOptions
    from offramp.tuning.certify import CertifyOptions

    veto = Veto(options["veto_margin"], "previous" in options["veto"], "mean" in options["veto"])
    base = Policy(options["score"], patience=options["patience"], veto=veto, minimum_depth=options["minimum_depth"])
    certified = CertifyOptions(
        **picked(options, "max_risk", "confidence", "risk", "seed", "value_range"),
        per_exit=not options["one_threshold"],
        sources=options["by_source"] or "together",
        strictest_for_unknown=options["unknown_source"] == "strictest",
    )
    if (options["risk"] == "missed_detection") != bool(options["class_name"]):
        raise OptionError("calibrate: --risk missed_detection needs a --class, and no other risk takes one")
    named = [name for name in ("max_drop", "target_speedup") if options[name] is not None]
    if not named:
        if options["consistency"]:
            raise OptionError("calibrate: --consistency goes with --max-drop; certified it is --risk consistency")
        return None, base, certified
    if len(named) > 1 or base != Policy(options["score"]):
        raise OptionError(
            "calibrate: --max-drop and --target-speedup exclude each other, and take no --patience, --minimum-depth, "
            "--veto or --veto-margin"
        )
    given = {name: options[name] for name in named}
    reference = "full_depth" if options["consistency"] else "label"
    return CalibrateOptions(options["score"], reference=reference, **given), base, certified  # type: ignore[arg-type]
