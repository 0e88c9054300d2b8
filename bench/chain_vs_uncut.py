"""What cutting costs at full depth, and what a row costs that leaves first, in parts of the uncut model.

Targets at full depth: three segments at most 1.02 everywhere, six at most 1.05 at 24 tokens and 1.02 from 64 on.

Physics: the chain computes what the uncut model computes, and per segment on top: one more session.run, the gather
of the carry, an exit head and its score operators, and the runner's own numpy calls. Each is small while it is in
the caches, and none is: the weights of two layers have gone through them since. That is a fixed cost per segment,
whatever the model; copying the hidden state (T x 384 floats) is noise. So the ratio is worst where the model is
fastest: batch 1, short rows. What the compiler saves elsewhere (constant reshape targets, a fusion of ONNX Runtime that
is slower than its parts) is subtracted from it. The first of three equal segments is a third of the work plus the
embedding, plus one such fixed cost.

Measured: MiniLM-L6 (pretrained encoder, random exit heads) with exits after layers 2, 4 and 6, or after all six, cut
and written as a bundle. `uncut` is the graph that was cut, with the final logits as its only output and without what
only other exits need, opened with ONNX Runtime's defaults and the same threads and spinning; `tuned` is the same with
all options of the runtime's engine. Interleaved call by call; `ratio` is a quotient of medians. Sessions are opened
anew `--openings` times, because where weights land in memory moves a ratio by a percent; their median counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from machine import describe_machine
from subject import Inputs, encoder_source, tiny_encoder
from timed import progress

from offramp.bundle import INVERSE_TEMPERATURE, ROWS, Manifest, load_manifest
from offramp.commands.uncut import load_reference, uncut_model
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.models.data import default_encoder_path
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig, encoder_from_pretrained
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.onnxruntime_engine import open_session
from offramp.runtime.timing import interleaved_ms

CUTS = ((2, 4, 6), (1, 2, 3, 4, 5, 6))  # exits after these layers
CASES = tuple((batch, tokens) for batch in (1, 32) for tokens in (8, 24, 64, 128))
TARGETS = {3: dict.fromkeys((8, 24, 64, 128), 1.02), 6: {24: 1.05, 64: 1.02, 128: 1.02}}  # segments -> tokens -> ratio
WARMUP = 5
ROUNDS = {1: 200, 32: 30}  # at least, over all openings
MAX_LENGTH = 128


def make_encoder(exits: tuple[int, ...], quick: bool) -> EarlyExitEncoder:
    """The encoder that is measured; with `quick`, one so small that only the script is shown to work."""
    config = EncoderConfig(exits=exits, early_pooling="mean")  # the cut is measured, not the heads
    if not quick:
        return encoder_from_pretrained(default_encoder_path(), config)
    return tiny_encoder(config, MAX_LENGTH)


def make_inputs(rows: int, length: int) -> Inputs:
    """Token ids without padding; no operator of the encoder looks at what they are."""
    input_ids = 1000 + np.arange(rows * length).reshape(rows, length) % 1000
    return {"input_ids": input_ids, "attention_mask": np.ones((rows, length), np.int64)}


def make_bundle(folder: Path, exits: tuple[int, ...], quick: bool) -> Path:
    """Export the encoder in FP32."""
    source = encoder_source("encoder", make_encoder(exits, quick), make_inputs(4, 24), MAX_LENGTH)
    export_bundle(source, folder / "bundle", ExportOptions(precision="fp32"), progress)
    return folder / "bundle"


def bare_chain(bundle: Path, manifest: Manifest, threads: int) -> Callable[[Inputs], np.ndarray]:
    """The segments' sessions in a plain loop: what is left of the chain when the runner is taken away."""
    one = np.array(1, np.float32)
    steps: list[tuple[onnxruntime.InferenceSession, list[str], list[str]]] = []
    for segment in manifest.segments:
        path = bundle / segment.graphs["fp32"].path
        session = open_session(path.read_bytes(), threads, str(path))
        carried = [spec.name for spec in segment.carry_out]
        steps.append((session, [spec.name for spec in segment.carry_in], [*carried, "logits", "prediction", "scores"]))

    def run(inputs: Inputs) -> np.ndarray:
        rows = np.arange(len(inputs["input_ids"]))
        feed: dict[str, Any] = {INVERSE_TEMPERATURE: one, **inputs}
        carry: list[Any] = []
        for session, takes, gives in steps:
            if takes:
                feed = {INVERSE_TEMPERATURE: one, ROWS: rows, **dict(zip(takes, carry, strict=True))}
            *carry, logits, _, _ = session.run(gives, feed)
        return logits

    return run


def measure_opening(bundle: Path, threads: int, openings: int, quick: bool) -> list[dict[str, float]]:
    """Medians in milliseconds for every case, with sessions opened for this call."""
    manifest = load_manifest(bundle)
    content = uncut_model(load_reference(bundle, manifest), manifest.exits[-1].name).SerializeToString()
    uncut = open_session(content, threads, "the uncut model", left_out=())
    tuned = open_session(content, threads, "the uncut model")
    bare = bare_chain(bundle, manifest, threads)
    leave_first = Policy.thresholds("max_prob", [0.0] + [None] * (len(manifest.segments) - 2))
    found = []
    with (
        Runner.open(bundle, "onnxruntime", Policy.full_depth(), threads) as full,
        Runner.open(bundle, "onnxruntime", leave_first, threads) as first,
    ):
        for rows, length in CASES:
            inputs = make_inputs(rows, length)
            np.testing.assert_array_equal(full.run(inputs).outputs["logits"], tuned.run(None, inputs)[0])
            callables: dict[str, Callable[[], object]] = {
                "uncut": lambda inputs=inputs: uncut.run(None, inputs),
                "tuned": lambda inputs=inputs: tuned.run(None, inputs),
                "chain": lambda inputs=inputs: full.run(inputs),
                "bare": lambda inputs=inputs: bare(inputs),
                "first": lambda inputs=inputs: first.run(inputs),
            }
            rounds = 3 if quick else -(-ROUNDS[rows] // openings)
            times_ms = interleaved_ms(callables, rounds, WARMUP)
            found.append({name: float(np.median(times)) for name, times in times_ms.items()} | {"rounds": rounds})
            progress(f"{len(manifest.segments)} segments, batch {rows}, {length} tokens: {found[-1]}")
    return found


def case_from_openings(segments: int, case: tuple[int, int], openings: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over openings; ratios are taken within an opening."""
    rounds = sum(int(opening["rounds"]) for opening in openings)
    result: dict[str, Any] = {"segments": segments, "batch": case[0], "tokens": case[1], "rounds": rounds}
    result["target"] = TARGETS[segments].get(case[1])
    for name in ("uncut", "tuned", "chain", "bare", "first"):
        result[f"{name}_ms"] = round(float(np.median([opening[name] for opening in openings])), 3)
    for name in ("tuned", "chain", "bare", "first"):
        ratios = [opening[name] / opening["uncut"] for opening in openings]
        result[f"{name}_ratio"] = round(float(np.median(ratios)), 4)
        result[f"{name}_ratio_range"] = [round(min(ratios), 4), round(max(ratios), 4)]
    return result


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--openings", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as ONNX Runtime likes")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows the script, no result")
    options = parser.parse_args()
    openings = 1 if options.quick else options.openings
    machine = describe_machine()
    cases = []
    for exits in CUTS[:1] if options.quick else CUTS:
        with tempfile.TemporaryDirectory(prefix="offramp-bench-") as folder:
            bundle = make_bundle(Path(folder), exits, options.quick)
            found = [measure_opening(bundle, options.threads, openings, options.quick) for _ in range(openings)]
        for index, case in enumerate(CASES):
            cases.append(case_from_openings(len(exits), case, [opening[index] for opening in found]))
    missed = [case for case in cases if case["target"] and case["chain_ratio"] > case["target"]]
    summary = {
        "bench": "chain_vs_uncut",
        "model": "tiny" if options.quick else "MiniLM-L6",
        "threads": options.threads,
        "openings": openings,
        "machine": machine,
        "missed": [[case["segments"], case["batch"], case["tokens"], case["chain_ratio"]] for case in missed],
        "cases": cases,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
