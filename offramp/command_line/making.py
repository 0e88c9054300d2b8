"""Commands that make a bundle: export, build-engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from offramp.command_line.options import (
    BUNDLE,
    JSON,
    names_from_text,
    print_result,
    steps_on_stderr,
    whole_numbers_from_text,
)
from offramp.errors import OptionError


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle directory to write.")
@click.option("--exits", default="", help="Outputs that are exits, in order of depth: logits_1,logits_2,…")
@click.option("--learned", default="", help="Outputs with the exits' learned confidences: conf_1,conf_2; - for none.")
@click.option("--retention", default="", help="Outputs with the share of tokens that is left at the exits, likewise.")
@click.option("--opset", default=20, show_default=True, help="ONNX opset to capture at.")
@click.option(
    "--precision",
    default="fp16",
    show_default=True,
    help="fp32, fp16 (for TensorRT), int8 (for CPUs), or several: fp16,int8. FP32 graphs are always written.",
)
@click.option("--atol", default=2e-2, show_default=True, help="Absolute difference allowed between FP16 and FP32.")
@click.option("--rtol", default=1e-2, show_default=True, help="Relative difference allowed between FP16 and FP32.")
@click.option(
    "--calibration-data", default="", help="Real inputs for FP16, INT8: .npz, Polygraphy .json, .csv/.jsonl texts."
)
@click.option("--layers", default="", help="Exits of a decoder: after these numbers of layers, such as 8,15.")
@click.option("--dimension", multiple=True, metavar="NAME=MIN:MAX", help="Range of a dynamic dimension of an .onnx.")
@JSON
def export(model: str, output: Path, exits: str, precision: str, as_json: bool, **options: Any) -> None:
    """Cut MODEL at its exits into a bundle: one verified graph per segment, in FP32 and what --precision says.

    MODEL is a checkpoint directory of `offramp train`, package.module:factory returning (nn.Module, Example), or
    a Llama-like model (a .gguf file or a `transformers` directory; exits by --layers), or
    an .onnx file whose outputs named by --exits are the exits and whose inputs have the rows on axis 0. Exits may have
    a learned confidence, the probability that they are right, and a token retention: a torch model returns them, for
    an .onnx pass --learned and --retention.
    """
    from offramp.bundle import ROW_OUTPUTS
    from offramp.commands.decoders import (
        export_language_model,
        export_llama,
        export_trained,
        is_decoder,
        is_language_model,
        is_trained,
    )
    from offramp.commands.sources import source_from_argument
    from offramp.export.export_bundle import ExportOptions, check_target, export_bundle

    lowering = ExportOptions(precision, options["atol"], options["rtol"])
    check_target(output)
    steps = steps_on_stderr(not as_json)
    if is_decoder(Path(model)):
        layers = whole_numbers_from_text(options["layers"], "--layers") if options["layers"] else ()
        export_it = export_trained if is_trained(Path(model)) else export_llama
        manifest = export_it(Path(model), output, layers, lowering, steps)
        _print_exported(output, manifest.parity["rows"], as_json)
        return
    if is_language_model(Path(model)):
        manifest = export_language_model(Path(model), output, lowering, steps)
        _print_exported(output, manifest.parity["rows"], as_json)
        return
    steps("capturing")
    ranges = _dimension_ranges(options["dimension"])
    row_outputs = {kind: names_from_text(options[kind]) for kind in ROW_OUTPUTS}
    source = source_from_argument(
        model, names_from_text(exits), options["opset"], options["calibration_data"], ranges, row_outputs
    )
    manifest = export_bundle(source, output, lowering, steps)
    _print_exported(output, manifest.parity["rows"], as_json)


def _print_exported(output: Path, rows: int, as_json: bool) -> None:
    from offramp.commands.inspection import describe_bundle

    found = describe_bundle(output)
    lines = [f"{output}: {len(found['segments'])} segments, verified on {rows} rows"]
    print_result(as_json, found, [*lines, f"next: offramp build-engine {output}"])


@click.command("build-engine")
@BUNDLE
@click.option("--backend", type=click.Choice(["tensorrt", "tensorrt-rtx"]), default="tensorrt-rtx", show_default=True)
@click.option("--precision", default="fp16", show_default=True, help="fp16 or fp32.")
@click.option("--min-shapes", default="", metavar="NAME:1x64,…", help="Smallest shapes of the model's inputs.")
@click.option("--opt-shapes", default="", metavar="NAME:1x64,…", help="Shapes to optimise for.")
@click.option("--max-shapes", default="", metavar="NAME:8x64,…", help="Largest shapes.")
@click.option("--workspace", default=0, show_default="no limit", metavar="MiB", help="Scratch memory for the builder.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="File with kernel timings to reuse (tensorrt).")
@click.option("--opt-level", default=3, show_default=True, help="Builder effort, 0 to 5.")
@click.option("--compute-capability", default="", metavar="8.6,8.9", help="GPUs to build for (tensorrt-rtx).")
@click.option("--hardware-compat", is_flag=True, help="Run on Ampere and every later GPU (tensorrt).")
@click.option("--version-compatible", is_flag=True, help="Run on later TensorRT versions too (tensorrt).")
@click.option("--force", is_flag=True, help="Build even where a plan with the same key is there.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and write nothing.")
@JSON
def build_engine(bundle: Path, as_json: bool, **options: Any) -> None:
    """Build one TensorRT engine per segment and per separate head; tensorrt-rtx needs no GPU.

    Each finished plan is recorded at once, so an interrupted build goes on where it stopped.
    """
    from offramp.export.build_engine import BuildOptions, build_engines
    from offramp.export.build_progress import progress_bars
    from offramp.export.profile import shapes_from_text
    from offramp.export.tensorrt_builder import BuilderOptions

    builder = BuilderOptions(
        backend=options["backend"],
        workspace_mib=options["workspace"],
        timing_cache=options["timing_cache"],
        opt_level=options["opt_level"],
        compute_capabilities=names_from_text(options["compute_capability"]),
        hardware_compat=options["hardware_compat"],
        version_compatible=options["version_compatible"],
    )
    build = BuildOptions(
        precision=options["precision"],
        min_shapes=shapes_from_text(options["min_shapes"], "--min-shapes"),
        opt_shapes=shapes_from_text(options["opt_shapes"], "--opt-shapes"),
        max_shapes=shapes_from_text(options["max_shapes"], "--max-shapes"),
        builder=builder,
        force=options["force"],
        dry_run=options["dry_run"],
    )
    with progress_bars(not as_json) as show:
        report = build_engines(bundle, build, show)
    lines = [
        f"{found.name}: {found.action} {found.path}, {found.bytes / 1e6:.1f} MB, "
        f"{found.fp16_share:.0%} of layers in FP16, {found.seconds:.1f} s"
        for found in report.segments
    ]
    print_result(
        as_json, dataclasses.asdict(report), [f"{report.backend} {report.version}, {report.precision}", *lines]
    )


def _dimension_ranges(texts: Iterable[str]) -> dict[str, Any]:
    from offramp.bundle import DimensionSpec

    ranges = {}
    for text in texts:
        name, _, span = text.partition("=")
        low, _, high = span.partition(":")
        if not (name and low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high)):
            raise OptionError(f"--dimension: got {text!r}, expected NAME=MIN:MAX such as sequence=1:128")
        ranges[name] = DimensionSpec(int(low), int(high))
    return ranges
