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
only other exits need, opened with ONNX Runtime's defaults and the same threads and spinning; `tuned` is the same opened
with all options of the runtime's engine. Interleaved call by call; `ratio` is a quotient of medians. Sessions are opened
anew `--openings` times, because where weights land in memory moves a ratio by a percent; the median over openings counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from machine import describe_machine
from onnx import ModelProto
from transformers import BertConfig, BertModel

from offramp.bundle import INVERSE_TEMPERATURE, ROWS, Manifest, load_manifest
from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.export_bundle import ExportOptions, export_bundle, reference_path
from offramp.export.graph import GraphView
from offramp.export.source import source_from_model
from offramp.models.data import default_encoder_path
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig, encoder_from_pretrained
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.onnxruntime_engine import _session_options, open_session  # compared things are opened alike
from offramp.runtime.timing import interleaved_ms

CUTS = ((2, 4, 6), (1, 2, 3, 4, 5, 6))  # exits after these layers
CASES = tuple((batch, tokens) for batch in (1, 32) for tokens in (8, 24, 64, 128))
TARGETS = {3: dict.fromkeys((8, 24, 64, 128), 1.02), 6: {24: 1.05, 64: 1.02, 128: 1.02}}  # segments -> tokens -> ratio
WARMUP = 5
ROUNDS = {1: 200, 32: 30}  # at least, over all openings

Inputs = dict[str, np.ndarray]


def make_encoder(exits: tuple[int, ...], quick: bool) -> EarlyExitEncoder:
    """The encoder that is measured; with `quick`, one so small that only the script is shown to work."""
    config = EncoderConfig(exits=exits, early_pooling="mean")  # the cut is measured, not the heads
    if not quick:
        return encoder_from_pretrained(default_encoder_path(), config)
    torch.manual_seed(0)
    small = BertConfig(
        vocab_size=3000,
        hidden_size=32,
        num_hidden_layers=exits[-1],
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    return EarlyExitEncoder(BertModel(small, add_pooling_layer=False), config).eval()


def make_inputs(rows: int, length: int) -> Inputs:
    """Token ids without padding; no operator of the encoder looks at what they are."""
    input_ids = 1000 + np.arange(rows * length).reshape(rows, length) % 1000
    return {"input_ids": input_ids, "attention_mask": np.ones((rows, length), np.int64)}


def make_bundle(folder: Path, exits: tuple[int, ...], quick: bool) -> Path:
    """Export the encoder in FP32."""
    sequence = {1: "sequence"}
    example = Example(
        inputs={name: torch.from_numpy(array) for name, array in make_inputs(4, 24).items()},
        dynamic={"input_ids": sequence, "attention_mask": sequence},
        ranges={"sequence": (1, 128)},
    )
    source = source_from_model("encoder", make_encoder(exits, quick), example, DEFAULT_OPSET)
    export_bundle(source, folder / "bundle", ExportOptions(precision="fp32"), progress)
    return folder / "bundle"


def uncut_from_whole(whole: ModelProto) -> ModelProto:
    """`whole` with its last output only, and without what other outputs need."""
    view = GraphView(whole)
    final = view.output_names[-1]
    kept = view.upstream([final], view.reads)
    read = {name for index in kept for name in view.reads[index]}
    uncut = ModelProto()
    uncut.CopyFrom(whole)
    del uncut.graph.node[:], uncut.graph.output[:], uncut.graph.initializer[:]
    uncut.graph.node.extend(node for index, node in enumerate(view.nodes) if index in kept)
    uncut.graph.output.extend(value for value in whole.graph.output if value.name == final)
    uncut.graph.initializer.extend(tensor for name, tensor in view.initializers.items() if name in read)
    onnx.checker.check_model(uncut)
    return uncut


def open_usual(content: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A session with all of ONNX Runtime's optimisations, and the threads and spinning of the runtime's engine."""
    return onnxruntime.InferenceSession(content, _session_options(threads), providers=["CPUExecutionProvider"])


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
    content = uncut_from_whole(onnx.load(reference_path(bundle) / "whole.onnx")).SerializeToString()
    uncut, tuned = open_usual(content, threads), open_session(content, threads, "the uncut model")
    manifest = load_manifest(bundle)
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


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
    for exits in CUTS:
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
