"""A decoder as one graph: names of its inputs and outputs, what they are for, and real inputs to look at it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import onnx_ir.passes.common
import torch
from onnx import ModelProto
from torch import Tensor, nn

from offramp.bundle import LEARNED, DecoderSpec
from offramp.errors import CaptureError, OptionError
from offramp.export.capture import Example, _exported, _Flat
from offramp.export.chain import Arrays, open_session
from offramp.export.roles import Roles
from offramp.export.source import ModelSource, input_specs

INPUT_IDS, PAST_LENGTH, ACTIVE, ROUTER_THRESHOLD = "input_ids", "past_length", "active_", "router_threshold"
PAST_OF = "past_"  # before the name of a state
CHUNK, PAST = "chunk", "past"
_EXAMPLE_ROWS, _EXAMPLE_CHUNK, _EXAMPLE_PAST = 3, 6, 8
_ATOL = _RTOL = 1e-2  # graph against model, as export/capture.py


class DecoderModel(Protocol):
    """What can be captured: an EarlyExitDecoder of offramp.models, or a module with the same forward and config.

    `config` has exits (numbers of layers), gated, max_positions, states (name, heads and width of what a layer
    remembers of a position), num_remembering (layers that do, those of exits included) and capacities; `thresholds`
    (capacities, layers) is what its routers must reach.
    """

    @property
    def config(self) -> Any: ...

    @property
    def thresholds(self) -> Any: ...


@dataclass(frozen=True)
class DecoderSource:
    """A decoder's graph and what its tensors are for; `tokenizer` holds the bytes of a tokenizer.json, or none."""

    model: ModelSource
    roles: Roles
    decoder: DecoderSpec
    tokenizer: bytes = b""


@dataclass(frozen=True)
class DecoderLimits:
    """The largest shapes a bundle is made for. Raises OptionError."""

    rows: int = 32
    chunk: int = 512  # new positions in one call
    positions: int = 2048

    def __post_init__(self) -> None:
        if min(self.rows, self.chunk, self.positions) < 2:
            raise OptionError(f"decoder limits: got {self}, expected at least 2 of everything")


def source_from_decoder(
    name: str,
    model: DecoderModel,
    texts: Sequence[Sequence[int]],
    limits: DecoderLimits = DecoderLimits(),
    opset: int = 20,
) -> DecoderSource:
    """Capture `model`; `texts` are token ids of real texts, at least 2 of at least 12 tokens, to verify with.

    Raises CaptureError or OptionError.
    """
    if len(texts) < 2 or min(map(len, texts)) < 2 * _EXAMPLE_CHUNK:
        raise OptionError(f"decoder: expected 2 texts or more of at least {2 * _EXAMPLE_CHUNK} tokens to verify with")
    most = min(limits.positions, model.config.max_positions)
    ranges = {CHUNK: (1, min(limits.chunk, most)), PAST: (1, most)}
    example = _example(model, texts, ranges, limits.rows)
    graph = _captured(model, example, opset)
    inputs = input_specs(graph, ())
    names = [spec.name for spec in inputs]
    states = {name: PAST_OF + name for name in _states(model)}
    exits = range(1, len(model.config.exits) + 1)
    gates = {f"logits_{k}": {LEARNED: f"learned_{k}"} for k in exits if model.config.gated and k < len(exits)}
    source = ModelSource(
        name=name,
        graph=graph,
        exits=tuple(f"logits_{k}" for k in exits),
        inputs=inputs,
        dimensions=example.dimensions(),
        example=example.arrays(),
        calibration=_batches(graph, states, model, texts),
        row_outputs=gates,
    )
    late = tuple(name for name in names if name != INPUT_IDS)
    roles = Roles(gates, late, states, {f"logits_{k}": f"hidden_{k}" for k in exits})
    active = tuple(name for name in names if name.startswith(ACTIVE))
    spec = DecoderSpec(INPUT_IDS, PAST_LENGTH, active, CHUNK, PAST, most)
    return DecoderSource(source, roles, replace(spec, **_routing(model)))


def _routing(model: DecoderModel) -> dict[str, Any]:
    """What a bundle says about routers: nothing of a decoder without."""
    if not model.config.capacities:
        return {}
    rows = [tuple(float(value) for value in row) for row in model.thresholds]
    shares = [f"{share:g}" for share in model.config.capacities]
    return {"router_threshold": ROUTER_THRESHOLD, "capacities": dict(zip(shares, rows, strict=True))}


class _FlatDecoder(_Flat):
    """A decoder called with its inputs in order, which returns a flat tuple of tensors."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        model: Any = self.model
        num_exits = len(model.config.exits)
        ids, lengths, *rest = inputs
        threshold = (rest.pop(0),) if model.config.capacities else ()
        size = len(model.config.states)
        past = [tuple(rest[start : start + size]) for start in range(num_exits - 1, len(rest), size)]
        said = self.model(ids, lengths, rest[: num_exits - 1], past, *threshold)
        answers = [tensor for leave in said.exits for tensor in leave if tensor is not None]
        return (*answers, *(tensor for layer in said.present for tensor in layer))


def _states(model: DecoderModel) -> list[str]:
    layers = range(model.config.num_remembering)
    return [f"{state.name}_{layer}" for layer in layers for state in model.config.states]


def _output_names(model: DecoderModel) -> list[str]:
    names = []
    for k, until in enumerate(model.config.exits, 1):
        is_gated = model.config.gated and until != model.config.exits[-1]
        names += [f"logits_{k}", f"hidden_{k}"] + ([f"learned_{k}"] if is_gated else [])
    return names + _states(model)


def _example(
    model: DecoderModel, texts: Sequence[Sequence[int]], ranges: Mapping[str, tuple[int, int]], max_rows: int
) -> Example:
    """Inputs to capture and probe with. All active positions are 0, which is one at every length of the chunk."""
    config, random = model.config, torch.Generator().manual_seed(0)
    rows = [texts[row % len(texts)][row : row + _EXAMPLE_CHUNK] for row in range(_EXAMPLE_ROWS)]
    inputs: dict[str, Tensor] = {
        INPUT_IDS: torch.tensor(rows),
        PAST_LENGTH: torch.tensor([_EXAMPLE_PAST, 0, _EXAMPLE_PAST // 2]),
    }
    if config.capacities:
        inputs[ROUTER_THRESHOLD] = _middle_thresholds(model, _EXAMPLE_ROWS)
    dynamic: dict[str, dict[int, str]] = {INPUT_IDS: {1: CHUNK}}
    spans = dict(ranges)
    for k in range(1, len(config.exits)):
        inputs[f"{ACTIVE}{k}"] = torch.zeros(_EXAMPLE_ROWS, 2, dtype=torch.int64)
        dynamic[f"{ACTIVE}{k}"] = {1: f"{ACTIVE}{k}"}
        spans[f"{ACTIVE}{k}"] = ranges[CHUNK]
    for layer in range(config.num_remembering):
        for state in config.states:
            name = f"{PAST_OF}{state.name}_{layer}"
            inputs[name] = torch.randn(_EXAMPLE_ROWS, state.heads, _EXAMPLE_PAST, state.width, generator=random)
            dynamic[name] = {2: PAST}
    return Example(inputs, dynamic, spans, max_rows)


def _middle_thresholds(model: DecoderModel, rows: int) -> Tensor:
    """Thresholds that let some FFNs run and others not, (rows, layers)."""
    middle: Tensor = model.thresholds[len(model.thresholds) // 2]
    return middle.detach().repeat(rows, 1)


def _captured(model: DecoderModel, example: Example, opset: int) -> ModelProto:
    """The graph, compared with the model on the example and on one row with one new position."""
    flat = _FlatDecoder(cast(nn.Module, model).eval(), tuple(example.inputs))
    names = _output_names(model)
    program = _exported(flat, example, names, opset)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # source paths and code lines
    graph = program.model_proto
    session = open_session(graph)
    for rows, chunk in ((_EXAMPLE_ROWS, _EXAMPLE_CHUNK), (1, 1)):
        feed = {name: tensor[:rows] for name, tensor in example.inputs.items()}
        feed[INPUT_IDS] = feed[INPUT_IDS][:, :chunk]
        with torch.no_grad():
            expected = flat(*feed.values())
        got = session.run(names, {name: tensor.numpy() for name, tensor in feed.items()})
        for name, wanted, said in zip(names, expected, got, strict=True):
            if said.shape != wanted.shape or not np.allclose(said, wanted.numpy(), _RTOL, _ATOL):
                raise CaptureError(
                    f"capturing the decoder: {name} of the exported graph differs from the model for {rows} rows and "
                    f"{chunk} new positions; please report this model"
                )
    return graph


def _batches(
    graph: ModelProto, states: Mapping[str, str], model: DecoderModel, texts: Sequence[Sequence[int]]
) -> tuple[Arrays, ...]:
    """Real inputs: the second half of each text, with the states that the graph made of the first.

    Rows are ragged, every second position is active, the last one always.
    """
    session = open_session(graph)
    length = min(map(len, texts))
    half = length // 2
    ids = np.array([text[:length] for text in texts], np.int64)
    config, rows = model.config, len(ids)
    empty = [np.zeros((rows, state.heads, 1, state.width), np.float32) for state in config.states]
    everything = np.tile(np.arange(half), (rows, 1))
    first: Arrays = {INPUT_IDS: ids[:, :half], PAST_LENGTH: np.zeros(rows, np.int64)}
    first |= dict(zip(states.values(), empty * config.num_remembering, strict=True))
    routing = {ROUTER_THRESHOLD: _middle_thresholds(model, rows).numpy()} if config.capacities else {}
    first |= routing
    active = [f"{ACTIVE}{k}" for k in range(1, len(config.exits))]
    first |= dict.fromkeys(active, everything)
    made = dict(zip(states.values(), session.run(list(states), first), strict=True))
    lengths = half - np.arange(rows) % 3
    second: Arrays = {INPUT_IDS: ids[:, half : 2 * half], PAST_LENGTH: lengths, **made, **routing}
    second |= dict.fromkeys(active, everything[:, (half - 1) % 2 :: 2].copy())
    return (second,)
