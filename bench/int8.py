"""What INT8 is worth: the full-depth chain in FP32 and INT8 against the uncut model in FP32. Target: 2 times at 1 x 24.

Physics: a product with VNNI does 4 multiplications where FP32 does one, and reads a quarter of the weights. On one core
the products of MiniLM are 78 % of its time in FP32, at every length, and run 3.6 times faster in INT8; the rest
(normalisation, GELU, attention, 60 operators' launches) stays. So at most 1 / (0.22 + 0.78 / 3.6) = 2.3, unless the
rest is made faster, too: LayerNormalization without its fusion with the addition before it (docs/log.md) is.

Measured: MiniLM-L6 (pretrained encoder, random exit heads) with exits after layers 2, 4 and 6, or `--bundle`. `uncut`
is the whole graph with the final logits only, opened as the engine opens segments; `uncut_plain` the same with ONNX
Runtime's own optimisations, that fusion included. All calls interleaved; ratios of medians. `error` is the RMS of what
INT8 changes in the final logits ÷ their RMS.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chain_vs_uncut import make_encoder, make_inputs
from machine import describe_machine

from offramp.bundle import load_manifest
from offramp.commands.uncut import load_reference, uncut_model
from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import source_from_model
from offramp.export.verify import relative_error
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.onnxruntime_engine import open_session
from offramp.runtime.timing import Clock, interleaved_ms

CASES = ((1, 8), (1, 24), (1, 128), (32, 24))  # (batch, tokens)
WARMUP = 5


def make_bundle(folder: Path, quick: bool) -> Path:
    """Export the encoder in FP32 and INT8."""
    sequence = {1: "sequence"}
    example = Example(
        inputs={name: torch.from_numpy(array) for name, array in make_inputs(4, 24).items()},
        dynamic={"input_ids": sequence, "attention_mask": sequence},
        ranges={"sequence": (1, 128)},
    )
    source = source_from_model("encoder", make_encoder((2, 4, 6), quick), example, DEFAULT_OPSET)
    export_bundle(source, folder / "bundle", ExportOptions(precision="int8"), progress)
    return folder / "bundle"


def measure(bundle: Path, threads: int, seconds: float, clock: Clock) -> list[dict[str, Any]]:
    """Medians in milliseconds, ratios to the uncut model and the error of INT8, for every case."""
    manifest = load_manifest(bundle)
    whole = uncut_model(load_reference(bundle, manifest), manifest.exits[-1].name).SerializeToString()
    uncut = open_session(whole, threads, "uncut")
    plain = open_session(whole, threads, "uncut", left_out=())
    found = []
    with (
        Runner.open(bundle, "onnxruntime", Policy.full_depth(), threads, "fp32") as fp32,
        Runner.open(bundle, "onnxruntime", Policy.full_depth(), threads, "int8") as int8,
    ):
        for rows, length in CASES:
            inputs = make_inputs(rows, length)
            error = relative_error([int8.run(inputs).outputs["logits"]], [fp32.run(inputs).outputs["logits"]])
            callables: dict[str, Callable[[], object]] = {
                "uncut": lambda inputs=inputs: uncut.run(None, inputs),
                "uncut_plain": lambda inputs=inputs: plain.run(None, inputs),
                "fp32": lambda inputs=inputs: fp32.run(inputs),
                "int8": lambda inputs=inputs: int8.run(inputs),
            }
            rounds = num_rounds(callables, seconds)
            times_ms = interleaved_ms(callables, rounds, WARMUP, clock)
            medians = {name: float(np.median(times)) for name, times in times_ms.items()}
            found.append(
                {"batch": rows, "tokens": length, "rounds": rounds, "error": round(error, 4)}
                | {f"{name}_ms": round(median, 3) for name, median in medians.items()}
                | {f"uncut_by_{name}": round(medians["uncut"] / medians[name], 3) for name in ("fp32", "int8")}
                | {"uncut_plain_by_int8": round(medians["uncut_plain"] / medians["int8"], 3)}
            )
            progress(str(found[-1]))
    return found


def num_rounds(callables: dict[str, Callable[[], object]], seconds: float) -> int:
    """As many rounds as fit in `seconds`, within limits."""
    start = time.perf_counter()
    for call in callables.values():
        call()
    return int(np.clip(seconds / (time.perf_counter() - start), 9, 400))


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="measure this bundle of texts, exported with int8")
    parser.add_argument("--seconds", type=float, default=15.0, help="per case")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as ONNX Runtime likes")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its CPU time: for a machine that is busy")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows the script, no result")
    options = parser.parse_args()
    machine = describe_machine()
    threads = 1 if options.cpu_time else options.threads
    clock = time.thread_time_ns if options.cpu_time else time.perf_counter_ns
    with tempfile.TemporaryDirectory(prefix="offramp-bench-") as folder:
        bundle = options.bundle or make_bundle(Path(folder), options.quick)
        cases = measure(bundle, threads, 0.05 if options.quick else options.seconds, clock)
    summary = {
        "bench": "int8",
        "model": str(options.bundle.name) if options.bundle else "tiny" if options.quick else "MiniLM-L6",
        "threads": threads,
        "clock": "CPU time" if options.cpu_time else "wall",
        "machine": machine,
        "target": 2.0,
        "cases": cases,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
