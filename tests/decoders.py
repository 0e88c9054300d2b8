"""A tiny Llama with fixed weights, its decoder with exits, and slow references that read as what they mean."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.export.decoder_source import DecoderLimits, DecoderSource, source_from_decoder
from offramp.models.decoder import DecoderConfig, EarlyExitDecoder
from offramp.models.frozen import Additions, decoder_with
from offramp.models.language_model import fresh_language_model
from offramp.models.llama import decoder_from_llama

VOCABULARY, LAYERS, POSITIONS, CHUNK, ROWS = 211, 3, 96, 24, 6
EXITS = (1, 2, 3)
PROMPTS = tuple(
    [(7 * n + 3 * at * at + 11) % VOCABULARY for at in range(length)] for n, length in enumerate((3, 9, 1, 30, 5))
)


@cache
def llama(tied: bool = True) -> LlamaForCausalLM:
    """Weights large enough that its answers differ from token to token."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=tied,
            initializer_range=0.25,
        )
        return LlamaForCausalLM(config).eval()


@cache
def decoder() -> EarlyExitDecoder:
    """The same with exits after every layer and gates."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return decoder_from_llama(llama(), EXITS, gated=True)


@cache
def resolvent_decoder() -> EarlyExitDecoder:
    """One of ResNet-BK blocks with the same exits and gates; its weights make the past matter."""
    config = DecoderConfig(
        VOCABULARY, 32, LAYERS, 1, 1, 16, EXITS, POSITIONS, gated=True, block="resnet-bk", num_experts=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = fresh_language_model(config).decoder
        for name, weight in model.named_parameters():
            if "norm" not in name and "bias" not in name:
                torch.nn.init.normal_(weight, std=0.5)
    return model


@cache
def source() -> DecoderSource:
    return source_of(decoder())


def source_of(model: EarlyExitDecoder) -> DecoderSource:
    texts = [[(13 * n + 5 * at * at) % VOCABULARY for at in range(16)] for n in range(4)]
    return source_from_decoder("tiny", model, texts, DecoderLimits(ROWS, CHUNK, POSITIONS))


CAPACITIES = (0.9, 0.6, 0.3)


@cache
@torch.no_grad()
def adaptive() -> EarlyExitDecoder:
    """Routers with thresholds, shortcuts, exits with a layer of their own, gates, 60 tokens that early exits know."""
    tokens = tuple((11 * n + 4) % VOCABULARY for n in range(60))
    model = decoder_with(decoder_from_llama(llama()), Additions(EXITS, True, CAPACITIES, 1, tokens), seed=3)
    generator = torch.Generator().manual_seed(9)
    for layer in model.layers:
        layer.shortcut.weight.normal_(std=0.1, generator=generator)
        layer.shortcut.bias.normal_(std=0.3, generator=generator)
    model.thresholds.copy_(torch.tensor([[-0.4, -0.5, -0.3], [0.0, 0.1, -0.1], [0.5, 0.3, 0.4]]))
    return model


@cache
@torch.no_grad()
def routed_greedy(prompt: tuple[int, ...], num_tokens: int, thresholds: tuple[float, ...]) -> list[int]:
    """Full depth of the adaptive decoder, one position after another, an FFN where its router says so."""
    model, text = adaptive(), list(prompt)
    caches: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(LAYERS)]
    for place in range(len(prompt) + num_tokens - 1):
        hidden = model.embedding(torch.tensor([[text[place]]]))
        for layer, cached, threshold in zip(model.layers, caches, thresholds, strict=True):
            hidden = _attention(layer, hidden, cached, place)
            normed = layer.ffn_norm(hidden)
            if layer.router(normed).item() >= threshold:
                hidden = hidden + layer.down(torch.nn.functional.silu(layer.gate(normed)) * layer.up(normed))
            else:
                hidden = hidden + normed @ layer.shortcut.weight.T + layer.shortcut.bias
        if place >= len(prompt) - 1:
            text.append(int(model.said(model.exits[-1], hidden).logits.argmax()))
    return text[len(prompt) :]


@torch.no_grad()
def greedy(prompt: list[int], num_tokens: int) -> list[int]:
    """Full depth, without any cache."""
    ids = torch.tensor([prompt])
    for _ in range(num_tokens):
        ids = torch.cat([ids, llama()(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


@torch.no_grad()
def keys_and_values(tokens: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every layer at full depth: (heads, positions, width) each."""
    cached = llama()(torch.tensor([tokens]), use_cache=True).past_key_values
    return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cached.layers]


@cache
@torch.no_grad()
def leaving(
    prompt: tuple[int, ...], num_tokens: int, gates: tuple[float, ...], mode: str
) -> tuple[list[int], list[int]]:
    """Tokens and exits of greedy generation that leaves where a gate is at least its threshold, position by position.

    "deferred": a token's answer is its early one, but keys and values are those of full depth. "copy": layers it skips
    make keys and values from its hidden state at the exit; the prompt goes to full depth.
    """
    model, depth = decoder(), 0
    caches: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(LAYERS)]
    text, exits = list(prompt), []
    for place in range(len(prompt) + num_tokens - 1):
        hidden = model.embedding(torch.tensor([[text[place]]]))
        answer, left = None, None
        for depth, (layer, leave) in enumerate(zip(model.layers, model.exits, strict=True)):
            through = _one_position(layer, hidden, caches[depth], place)
            if left is None or mode == "deferred":
                hidden = through
            if left is None:
                said = model.said(leave, hidden)
                is_open = depth < LAYERS - 1 and (mode == "deferred" or place >= len(prompt))
                if depth == LAYERS - 1 or (is_open and said.gate.item() >= gates[depth]):
                    answer, left = int(said.logits.argmax()), depth
        if place >= len(prompt) - 1:
            text.append(answer)
            exits.append(left)
    return text[len(prompt) :], exits


@torch.no_grad()
def scored(tokens: list[int], gates: tuple[float, ...]) -> tuple[list[float], list[int]]:
    """Log probability of every token but the first, and the exit that gave it, position by position.

    A position leaves where its gate is at least its threshold; the layers that it skips make their keys and values from
    its hidden state there.
    """
    model, log_probs, exits = decoder(), [], []
    caches: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(LAYERS)]
    for place, (token, following) in enumerate(itertools.pairwise(tokens)):
        hidden, left = model.embedding(torch.tensor([[token]])), None
        for depth, (layer, leave) in enumerate(zip(model.layers, model.exits, strict=True)):
            through = _one_position(layer, hidden, caches[depth], place)
            if left is None:
                hidden = through
                said = model.said(leave, hidden)
                if depth == LAYERS - 1 or said.gate.item() >= gates[depth]:
                    left = depth
                    log_probs.append(float(said.logits[0, 0].log_softmax(-1)[following]))
                    exits.append(left)
    return log_probs, exits


def _one_position(layer, hidden, cache, place):
    """One layer on one position; adds its keys and values to the cache."""
    after = _attention(layer, hidden, cache, place)
    return after + layer.feed(layer.ffn_norm(after))


def _attention(layer, hidden, cache, place):
    past = tuple(torch.cat([pair[part] for pair in cache], 2) if cache else torch.zeros(1, 2, 1, 8) for part in (0, 1))
    places = decoder().places(torch.tensor([place]), (1, past[0].shape[2]), None)
    after, made = layer.attend(hidden, hidden, places, past)
    cache.append(made)
    return after


def export_to(path: Path, model: DecoderSource | None = None) -> Path:
    from offramp.export.export_decoder import export_decoder

    export_decoder(model or source(), path / "bundle")
    return path / "bundle"


@torch.no_grad()
def adaptive_leaving(
    prompt: list[int], num_tokens: int, gates: tuple[float, ...], thresholds: torch.Tensor
) -> tuple[list[int], list[int]]:
    """Tokens and exits of the adaptive decoder without any cache: the whole text is read again for every token."""
    model, text, exits = adaptive(), list(prompt), []
    none = [(torch.zeros(1, 2, 1, 8),) * 2] * model.config.num_remembering
    for _ in range(num_tokens):
        active = [torch.arange(len(text))[None]] * (len(EXITS) - 1)
        said = model(torch.tensor([text]), torch.zeros(1, dtype=torch.int64), active, none, thresholds[None]).exits
        index = next((k for k, limit in enumerate(gates) if said[k].gate[0, -1] >= limit), len(gates))
        text.append(int(said[index].logits[0, -1].argmax()))
        exits.append(index)
    return text[len(prompt) :], exits
