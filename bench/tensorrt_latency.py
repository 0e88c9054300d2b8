"""What a request costs on a GPU, with CUDA graphs and speculation on and off. Needs a GPU; without one it says so.

Physics: at batch 1 two layers of a small encoder are about 20 kernels of a few microseconds. Launching them one by one
costs the CPU about as long as they run; a graph launches them at once. Between two segments the GPU stands still from
the end of one until the first kernel of the next: the answers travel (some microseconds), the host wakes up, decides
(`runner_overhead.py`) and launches. Speculation hides that where all rows go on, and where they do not it costs the
wasted segment. So: graphs should pay most at batch 1, speculation where most rows go deep, neither at batch 32.

Measured: MiniLM-L6 (pretrained encoder, random exit heads, exits after layers 2, 4 and 6, FP16), or BUNDLE with its
plans; requests where nobody leaves early ("full") and where everybody leaves first ("first"). Interleaved call by call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine

from offramp.bundle import ROWS, Manifest
from offramp.gpu import compute_capability
from offramp.policy import Policy
from offramp.runtime import Runner, TensorRtOptions
from offramp.runtime.backends import installed_version
from offramp.runtime.timing import interleaved_ms, summary

BATCHES, LENGTHS = (1, 8, 32), (24, 128)
EXITS = (2, 4, 6)
MODES = {
    f"{'graphs' if graphs else 'plain'}{' speculating' if speculate else ''}": TensorRtOptions(graphs, speculate)
    for graphs, speculate in itertools.product((False, True), repeat=2)
}
BASE = "plain"
WARMUP = 20  # the second request captures graphs


def make_bundle(folder: Path, quick: bool, backend: str) -> Path:
    """Export the encoder in FP16 and build its plans for the GPU here."""
    import torch
    from chain_vs_uncut import make_encoder, make_inputs

    from offramp.export.build_engine import BuildOptions, build_engines
    from offramp.export.capture import DEFAULT_OPSET, Example
    from offramp.export.export_bundle import ExportOptions, export_bundle
    from offramp.export.source import source_from_model
    from offramp.export.tensorrt_builder import BuilderOptions

    sequence = {1: "sequence"}
    example = Example(
        inputs={name: torch.from_numpy(array) for name, array in make_inputs(4, 24).items()},
        dynamic={"input_ids": sequence, "attention_mask": sequence},
        ranges={"sequence": (1, max(LENGTHS))},
    )
    source = source_from_model("encoder", make_encoder(EXITS, quick), example, DEFAULT_OPSET)
    export_bundle(source, folder / "bundle", ExportOptions(precision="fp16"))
    build_engines(folder / "bundle", BuildOptions(builder=BuilderOptions(backend=backend)))
    return folder / "bundle"


def make_inputs(manifest: Manifest, num_rows: int, length: int) -> dict[str, np.ndarray]:
    """Inputs of the model: every dimension but the rows is `length`, or as near to it as the bundle allows."""
    inputs = {}
    for spec in manifest.inputs:
        sizes = {name: int(np.clip(length, size.min, size.max)) for name, size in manifest.dimensions.items()}
        shape = [size if isinstance(size, int) else (sizes | {ROWS: num_rows})[size] for size in spec.shape]
        inputs[spec.name] = np.ones(shape, spec.dtype)
    return inputs


def measure(bundle: Path, backend: str, repetitions: int) -> list[dict[str, Any]]:
    """Latency in milliseconds, by case and mode."""
    found = []
    with ExitStack() as stack:
        runners = {
            mode: stack.enter_context(Runner.open(bundle, backend, tensorrt=options)) for mode, options in MODES.items()
        }
        manifest = runners[BASE].manifest
        early = len(manifest.segments) - 1
        policies = {"full": Policy.full_depth(), "first": Policy.thresholds("max_prob", [0.0] * early)}
        for (leave, policy), num_rows, length in itertools.product(policies.items(), BATCHES, LENGTHS):
            inputs = make_inputs(manifest, num_rows, length)
            for runner in runners.values():
                runner.policy = policy
            times_ms = interleaved_ms(
                {mode: lambda runner=runner, inputs=inputs: runner.run(inputs) for mode, runner in runners.items()},
                repetitions,
                WARMUP,
            )
            base_ms = float(np.median(times_ms[BASE]))
            for mode, times in times_ms.items():
                case = {"leave": leave, "batch": num_rows, "tokens": length, "mode": mode, **summary(times)}
                found.append(case | {"ratio": float(np.median(times)) / base_ms})
                print(found[-1], file=sys.stderr)
    return found


def main() -> None:
    """Print the cases, and at the end one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "bundle", nargs="?", type=Path, help="a bundle with plans for this GPU; without: one of its own"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few repetitions: shows that it works")
    parser.add_argument("--backend", default="", help="tensorrt or tensorrt-rtx; without: what is installed")
    options = parser.parse_args()
    document: dict[str, Any] = {"bench": "tensorrt_latency", "machine": describe_machine()}
    sm = compute_capability()
    backend = options.backend or next((name for name in ("tensorrt", "tensorrt-rtx") if installed_version(name)), "")
    if not sm or not backend:
        missing = "a GPU" if not sm else "TensorRT"
        print(f"needs {missing}; none here. Nothing was measured.")
        print(json.dumps(document | {"measured": False, "needs": missing}))
        return
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or make_bundle(Path(folder), options.quick, backend)
        cases = measure(bundle, backend, 20 if options.quick else 500)
    document["machine"] = {**describe_machine(), "sm": sm, backend: installed_version(backend)}
    print(json.dumps(document | {"measured": True, "cases": cases}))


if __name__ == "__main__":
    main()
