"""The command line: parse, call one function, print. Heavy imports happen inside the commands.

Environment variables are read here only; errors that offramp raises on purpose end as one message.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import click

from offramp.errors import BuildError, DataError, InputError, OfframpError, OptionError

_USAGE_ERRORS = (OptionError, InputError, DataError)
_CANCELLED = 130  # what a shell expects after Ctrl-C


class _Group(click.Group):
    """Turns offramp's errors into a message and an exit code: 2 for the caller's mistakes, 1 for the rest."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OfframpError as exc:
            cancelled = isinstance(exc, BuildError) and "cancelled" in str(exc)
            _fail(exc, _CANCELLED if cancelled else 2 if isinstance(exc, _USAGE_ERRORS) else 1)


def _fail(exc: OfframpError, code: int) -> NoReturn:
    click.echo(f"error: {exc}", err=True)
    raise click.exceptions.Exit(code) from exc


BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text.")
BACKEND = click.option("--backend", default="auto", show_default=True, help="What runs the segments.")
THREADS = click.option("--threads", default=0, show_default="the backend's choice", help="Threads per segment.")
DATA = click.option(
    "--data",
    default="rotten-tomatoes",
    show_default=True,
    help="A .csv or .jsonl file (text, label), an .npz of inputs and labels, or rotten-tomatoes.",
)
POOLING = click.Choice(["window", "mean", "cls"])  # window: a small network over every token and its neighbours


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="offramp")
def main() -> None:
    """Put early-exit neural networks into production.

    \b
    offramp train -o checkpoint                 train a classifier with exits
    offramp export checkpoint -o bundle         cut it at the exits, lower to FP16, verify
    offramp build-engine bundle                 one TensorRT engine per segment
    offramp calibrate bundle                    temperatures and thresholds
    offramp run bundle < texts.txt              answer, each row at the first sure exit
    """


@main.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Checkpoint directory to write.")
@click.option("--data", default="rotten-tomatoes", show_default=True, help="rotten-tomatoes, or a .csv/.jsonl file.")
@click.option("--encoder", default="", help="Directory of a pretrained BertModel.  [default: MiniLM-L6]")
@click.option(
    "--exits",
    default="0,2,4,6",
    show_default=True,
    help="Exits after these layers (0: the embeddings); the last is final.",
)
@click.option("--pooling", type=POOLING, default="mean", show_default=True, help="What the final exit reads.")
@click.option("--early-pooling", type=POOLING, default="window", show_default=True, help="What the other exits read.")
@click.option("--unlabelled", default="", help="imdb, or a .csv/.jsonl file.  [default: imdb with rotten-tomatoes]")
@click.option("--epochs", default=2, show_default=True)
@click.option(
    "--distil-epochs",
    default=1,
    show_default=True,
    help="Then train the early exits alone, on labelled texts and on what the final exit answers to unlabelled ones.",
)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--encoder-lr", default=1e-4, show_default=True)
@click.option("--head-lr", default=1e-3, show_default=True)
@click.option("--early-weight", default=0.3, show_default=True, help="Loss weight of early exits; the final one has 1.")
@click.option("--max-length", default=128, show_default=True, help="Longer texts are cut to this many tokens.")
@click.option("--seed", default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in OUTPUT, with its options.")
@JSON
def train(output: Path, resume: bool, as_json: bool, **options: Any) -> None:
    """Train an encoder classifier with exits: all exits together (joint weighted loss), then the early ones alone."""
    # Read when torch is imported: spinning threads cost 3 to 6 times the time beside any other work (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from offramp.commands.training import TrainRequest, train_checkpoint

    report = train_checkpoint(output, TrainRequest(**options), resume, progress=not as_json)
    exits = [f"{accuracy:.3f}" for accuracy in report.validation_accuracy]
    text = f"{output}: validation accuracy per exit {' '.join(exits)}, {report.seconds:.0f} s"
    _print(as_json, dataclasses.asdict(report), [text, f"next: offramp export {output} -o BUNDLE"])


@main.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle directory to write.")
@click.option("--exits", default="", help="Outputs that are exits, in order of depth: logits_1,logits_2,…")
@click.option("--opset", default=20, show_default=True, help="ONNX opset to capture at.")
@click.option("--precision", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True)
@click.option("--atol", default=2e-2, show_default=True, help="Absolute difference allowed between FP16 and FP32.")
@click.option("--rtol", default=1e-2, show_default=True, help="Relative difference allowed between FP16 and FP32.")
@click.option("--calibration-data", default="", help="Real inputs for FP16: .npz, Polygraphy .json, .csv/.jsonl texts.")
@click.option("--dimension", multiple=True, metavar="NAME=MIN:MAX", help="Range of a dynamic dimension of an .onnx.")
@JSON
def export(model: str, output: Path, exits: str, precision: str, as_json: bool, **options: Any) -> None:
    """Cut MODEL at its exits into a bundle: one verified graph per segment, in FP32 and FP16.

    MODEL is a checkpoint directory of `offramp train`, package.module:factory returning (nn.Module, Example), or
    an .onnx file whose outputs named by --exits are the exits and whose inputs have the rows on axis 0.
    """
    from offramp.commands.sources import source_from_argument
    from offramp.export.export_bundle import ExportOptions, check_target, export_bundle

    lowering = ExportOptions(precision, options["atol"], options["rtol"])
    check_target(output)
    steps = _steps(not as_json)
    steps("capturing")
    ranges = _dimension_ranges(options["dimension"])
    source = source_from_argument(model, _names(exits), options["opset"], options["calibration_data"], ranges)
    manifest = export_bundle(source, output, lowering, steps)
    from offramp.commands.inspection import describe_bundle

    lines = [f"{output}: {len(manifest.segments)} segments, verified on {manifest.parity['rows']} rows"]
    _print(as_json, describe_bundle(output), [*lines, f"next: offramp build-engine {output}"])


@main.command("build-engine")
@BUNDLE
@click.option("--backend", type=click.Choice(["tensorrt", "tensorrt-rtx"]), default="tensorrt-rtx", show_default=True)
@click.option("--precision", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True)
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
    """Build one TensorRT engine per segment; tensorrt-rtx needs no GPU.

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
        compute_capabilities=_names(options["compute_capability"]),
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
        f"segment {found.segment}: {found.action} {found.path}, {found.bytes / 1e6:.1f} MB, "
        f"{found.fp16_share:.0%} of layers in FP16, {found.seconds:.1f} s"
        for found in report.segments
    ]
    _print(as_json, dataclasses.asdict(report), [f"{report.backend} {report.version}, {report.precision}", *lines])


@main.command()
@BUNDLE
@DATA
@click.option("--score", type=click.Choice(["max_prob", "margin", "entropy"]), default="max_prob", show_default=True)
@click.option("--max-drop", default=0.01, show_default=True, help="Accuracy that may be lost, as a fraction.")
@click.option("--target-speedup", default=1.0, help="Instead: one threshold for all exits that is this much faster.")
@click.option("--consistency", is_flag=True, help="No labels: bound answers that differ from full depth instead.")
@click.option("--trace", "trace_path", type=click.Path(path_type=Path), help="Also write the recorded trace here.")
@BACKEND
@THREADS
@JSON
def calibrate(bundle: Path, data: str, as_json: bool, **options: Any) -> None:
    """Choose temperatures and the fastest thresholds within --max-drop, from a trace of the real engines.

    The drop is the one seen on this data, without a statistical certificate.
    """
    from offramp.bundle import replace_policy
    from offramp.commands.dataset import load_dataset
    from offramp.runtime import Runner
    from offramp.trace import save_trace
    from offramp.tuning.calibrate import CalibrateOptions, calibrate

    chosen = CalibrateOptions(
        options["score"],
        options["max_drop"],
        "full_depth" if options["consistency"] else "label",
        target_speedup=options["target_speedup"],
    )
    with Runner.open(bundle, **_picked(options, "backend", "threads")) as runner:
        dataset = load_dataset(runner, data, "validation")
        trace = runner.record(dataset.batches, dataset.labels, progress=not as_json)
    calibration = calibrate(trace, chosen)
    if options["trace_path"]:
        save_trace(options["trace_path"], trace)
    replace_policy(bundle, calibration.policy.to_json().encode())
    report = calibration.report
    lines = [
        f"exit {found.exit_index}: threshold {_or_closed(found.threshold)}, temperature {found.temperature:.2f}, "
        f"{found.share:.1%} of rows leave"
        for found in report.exits
    ]
    lines += [f"mean depth {report.mean_depth:.2f} segments, accuracy drop {report.drop:.4f} on {report.num_rows} rows"]
    _print(as_json, calibration.document(), [*lines, f"next: offramp run {bundle}"])


@main.command()
@BUNDLE
@click.argument("data", default="-")
@click.option("--policy", "policy_path", type=click.Path(exists=True, path_type=Path), help="A policy.json to use.")
@click.option("--full-depth", is_flag=True, help="Close all exits.")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(min=1), help="Rows per request.")
@BACKEND
@THREADS
def run(bundle: Path, data: str, policy_path: Path | None, full_depth: bool, batch_size: int, **options: Any) -> None:
    """Answer DATA (texts, one per line; an .npz of inputs; - for stdin): one JSON object per row on stdout."""
    from offramp.commands.answers import answers
    from offramp.policy import Policy
    from offramp.runtime import Runner

    policy = Policy.from_json(policy_path.read_bytes()) if policy_path else None
    with Runner.open(bundle, policy=Policy.full_depth() if full_depth else policy, **options) as runner:
        for answer in answers(runner, data, batch_size):
            click.echo(json.dumps(answer))


@main.command()
@BUNDLE
@DATA
@click.option("--requests", default=300, show_default=True, type=click.IntRange(min=1), help="Requests to time.")
@BACKEND
@THREADS
@JSON
def bench(bundle: Path, data: str, requests: int, as_json: bool, **options: Any) -> None:
    """Time the bundle against the uncut model and its own full depth, one row per request, interleaved."""
    from offramp.commands.benchmark import bench_bundle

    measured = bench_bundle(bundle, data, requests, **options)
    lines = [
        f"{name:<12} p50 {found.p50_ms:7.2f} ms  p95 {found.p95_ms:7.2f} ms  mean {found.mean_ms:7.2f} ms"
        + (f"  accuracy {found.accuracy:.3f}" if found.accuracy is not None else "")
        for name, found in measured.items()
    ]
    _print(as_json, {name: dataclasses.asdict(found) for name, found in measured.items()}, lines)


@main.command()
@BUNDLE
@JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what is in a bundle: segments, what they carry, files, and plans with their headers read back."""
    from offramp.commands.inspection import describe_bundle, lines_from_description

    description = describe_bundle(bundle)
    _print(as_json, description, lines_from_description(description))


@main.command()
@BUNDLE
@JSON
def verify(bundle: Path, as_json: bool) -> None:
    """Check every file's hash, and the segments against the whole graph beside the bundle."""
    from offramp.commands.verification import verify_bundle

    parity = verify_bundle(bundle)
    lines = [f"{bundle}: all files as exported; chain equals the whole graph on {parity.rows} rows"]
    lines += [f"bit-equal: {parity.chain_bit_equal}, with rows leaving: {parity.compacted_bit_equal}"]
    _print(as_json, parity.figures(), lines)


@main.command()
@JSON
def doctor(as_json: bool) -> None:
    """Say what is installed here, which backends work, and why the others do not."""
    from offramp.commands.doctor import diagnose

    findings = diagnose()
    lines = [f"{'ok ' if found.works else 'no '} {found.subject:<24} {found.detail}" for found in findings]
    _print(as_json, [dataclasses.asdict(found) for found in findings], lines)


def _print(as_json: bool, document: Any, lines: Iterable[str]) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=2, default=str))
    else:
        for line in lines:
            click.echo(line)


def _steps(shown: bool) -> Callable[[str], None]:
    """A function that says on stderr what is being done."""
    return (lambda step: click.echo(f"{step} …", err=True)) if shown else (lambda _: None)


def _names(text: str) -> tuple[str, ...]:
    """Names from a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _picked(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}


def _or_closed(threshold: float | None) -> str:
    return "closed" if threshold is None else f"{threshold:.4f}"


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


if __name__ == "__main__":
    sys.exit(main())
