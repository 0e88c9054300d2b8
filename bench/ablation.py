"""What each of EAT's three levers gives on the clock, alone and together: pruning, window attention, exits.

Physics: of a layer's time on a CPU most goes into products with weights, which grow with the tokens; attention's own
products grow with their square and are a tenth of it at 128 tokens, a quarter at 512. Pruning (30 % after layers 2 and
4) leaves 1, 0.7 and 0.49 of the tokens to the three pairs of layers: 0.73 of the work at most, less some thirty small
operators. Window attention takes the square out of attention, so it can only pay where texts are long. An exit saves
the layers behind it for the rows that leave, whatever the length. So the gains of pruning and exits should nearly
multiply, and window attention adds what attention costs in long texts.

Measured: MiniLM-L6, pretrained, random exit heads, exits after layer 4 and the last one (arXiv 2510.12856). Which
rows leave is not what these heads are for: exits are simulated by `--leaving`, a share of requests that run under a
policy by which everybody leaves at layer 4; the others run under one by which nobody does. Texts without padding, one
row a request (or `--rows`). `dense` is the uncut model without any lever, opened with ONNX Runtime's defaults and the
same threads; all are interleaved, request by request. `speedup` is a quotient of mean times; `gains` are those over
the chain without any lever, of each alone, of all together, and what they would be together if gains multiplied.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from chain_vs_uncut import make_inputs
from machine import describe_machine
from subject import Inputs, encoder_source, tiny_encoder
from timed import progress
from torch import nn

from offramp.bundle import load_manifest
from offramp.commands.uncut import load_reference, uncut_model
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.models.data import default_encoder_path
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig, encoder_from_pretrained
from offramp.models.pruning import Pruning
from offramp.models.window_attention import blocks_pay
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.onnxruntime_engine import open_session
from offramp.runtime.timing import interleaved_ms
from offramp.storage import write_file

LENGTHS = (32, 128, 256, 512)
WINDOW = 32
EXITS = (4, 6)
ROUNDS = {32: 200, 128: 100, 256: 60, 512: 40}  # of one opening
WARMUP = 5

LEAVING = "leaving"
POLICY = Policy(sources={LEAVING: Policy.thresholds("max_prob", [0.0])})  # all others go to the end

Lever = tuple[bool, bool]  # pruning, window attention


def make_encoder(config: EncoderConfig, quick: bool) -> EarlyExitEncoder:
    """The encoder that is measured; with `quick`, one so small that only the script is shown to work."""
    if not quick:
        return encoder_from_pretrained(default_encoder_path(), config)
    encoder = tiny_encoder(config, max(LENGTHS))
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):  # behind an even one all tokens have one norm, and rounding chooses
            nn.init.uniform_(module.weight, 0.5, 2.0)
    return encoder


def make_bundle(folder: Path, config: EncoderConfig, quick: bool) -> Path:
    """Export the encoder in FP32, for texts of up to 512 tokens; one that is in `folder` already is taken."""
    pruned, blocks = "pruned" if config.pruning else "whole", "-blocks" if config.in_blocks else ""
    path = folder / f"{pruned}-{'window' if config.window else 'dense'}{blocks}"
    if (path / "manifest.json").is_file():
        return path
    progress(f"exporting {path.name}")
    source = encoder_source(path.name, make_encoder(config, quick), make_inputs(4, 64), max(LENGTHS))
    manifest = export_bundle(source, path, ExportOptions(precision="fp32"), progress)
    assert manifest.parity["chain_bit_equal"]
    return path


def config_of(lever: Lever, length: int) -> EncoderConfig:
    """What is switched on; window attention in blocks where these are faster, else under a mask."""
    pruned, windowed = lever
    return EncoderConfig(
        exits=EXITS,
        pruning=Pruning() if pruned else None,
        window=WINDOW if windowed else 0,
        in_blocks=windowed and blocks_pay(length),
    )


class Leaving:
    """Answers one request again and again; `share` of the calls are of the source whose rows leave at layer 4."""

    def __init__(self, runner: Runner, inputs: Inputs, share: float) -> None:
        self.runner, self.inputs, self.share = runner, inputs, share
        self.calls = 0

    def __call__(self) -> None:
        leaves = int((self.calls + 1) * self.share) > int(self.calls * self.share)
        self.runner.run(self.inputs, source=LEAVING if leaves else "")
        self.calls += 1


def levers_of(options: argparse.Namespace) -> list[Lever]:
    """All combinations of pruning and window attention; the two ends where only the script is to be shown."""
    return [(False, False), (True, True)] if options.quick else list(itertools.product((False, True), repeat=2))


def name_of(lever: Lever, exits: bool) -> str:
    """The levers that are on, as in "pruning+exits"."""
    on = [name for name, flag in zip(("pruning", "window", "exits"), (*lever, exits), strict=True) if flag]
    return "+".join(on) or "none"


def measure_length(
    bundles: dict[EncoderConfig, Path], length: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Mean and median milliseconds of every combination of levers, and of the uncut dense model, at one length."""
    inputs = make_inputs(options.rows, length)
    dense = bundles[config_of((False, False), length)]
    manifest = load_manifest(dense)
    content = uncut_model(load_reference(dense, manifest), manifest.exits[-1].name).SerializeToString()
    uncut = open_session(content, options.threads, "the uncut model", left_out=())
    runners = {
        lever: Runner.open(bundles[config_of(lever, length)], "onnxruntime", POLICY, options.threads)
        for lever in levers_of(options)
    }
    callables: dict[str, Callable[[], object]] = {"dense": lambda: uncut.run(None, inputs)}
    for lever, runner in runners.items():
        for exits in (False, True):
            callables[name_of(lever, exits)] = Leaving(runner, inputs, options.leaving if exits else 0.0)
    try:
        times_ms = interleaved_ms(callables, 4 if options.quick else ROUNDS[length], WARMUP)
    finally:
        for runner in runners.values():
            runner.close()
    found: dict[str, dict[str, float]] = {}
    for name, times in times_ms.items():
        mean, base = float(times.mean()), float(times_ms["dense"].mean())
        found[name] = {
            "mean_ms": round(mean, 3),
            "p50_ms": round(float(np.median(times)), 3),
            "speedup": round(base / mean, 3),
            "rounds": len(times),
        }
    return found


def together_of(case: dict[str, Any]) -> dict[str, float]:
    """Return what each lever gives alone over none of them, what all give, and what they would if gains multiplied."""
    base = case["none"]["mean_ms"]
    alone = {name: base / case[name]["mean_ms"] for name in ("pruning", "window", "exits") if name in case}
    found = {**alone, "together": base / case["pruning+window+exits"]["mean_ms"]}
    if len(alone) == 3:
        found["product_of_alone"] = float(np.prod(list(alone.values())))
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--leaving", type=float, default=0.6, help="share of requests that leave after layer 4")
    parser.add_argument("--rows", type=int, default=1, help="rows of a request")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as ONNX Runtime likes")
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), default=LENGTHS)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows the script, no result")
    parser.add_argument("--bundles", type=Path, help="keep what is exported here, and take what is here already")
    parser.add_argument("--output", type=Path, help="also write this JSON file")
    options = parser.parse_args()
    options.lengths = options.lengths[:1] if options.quick else options.lengths
    machine = describe_machine()
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="offramp-bench-") as temporary:
        folder = options.bundles if options.bundles and not options.quick else Path(temporary)
        configs = {config_of(lever, length) for length in options.lengths for lever in levers_of(options)}
        bundles = {config: make_bundle(folder, config, options.quick) for config in configs}
        for length in options.lengths:
            case = {"tokens": length, "in_blocks": blocks_pay(length)} | measure_length(bundles, length, options)
            cases.append(case | {"gains": together_of(case)})
            progress(json.dumps(cases[-1]))
    summary = {
        "bench": "ablation",
        "model": "tiny" if options.quick else "MiniLM-L6",
        "exits": list(EXITS),
        "leaving": options.leaving,
        "rows": options.rows,
        "threads": options.threads,
        "machine": machine,
        "cases": cases,
    }
    if options.output:
        write_file(options.output, (json.dumps(summary, indent=1) + "\n").encode())
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
