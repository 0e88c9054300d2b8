"""A decoder with exits after some of its layers: Llama-like ones (RoPE, grouped heads, SwiGLU) or ResNet-BK blocks.

An exit is a normalisation, an optional gate (how sure, asked before the vocabulary is) and a vocabulary head. What a
layer remembers of every position, its states, keys and values say, are plain inputs and outputs, so that whoever runs
a part of the layers can keep them. Layers after the first exit compute queries, FFN and head for *active* positions
only; positions that have left keep their hidden state, from which deeper layers still make keys and values (CALM,
arXiv 2207.07061, section 3.3). `resolvent_block.py` says what becomes of them in the other kind of block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import OptionError
from offramp.models.adapters import DraftVocabulary
from offramp.models.resolvent_block import Experts, ResolventLayer, Sites
from offramp.models.routers import EVERYBODY, feed_where

# Added to the scores of positions that must not be seen: finite for FP16 (models/encoder.py says why).
MASKED_SCORE = -1e4

Block = Literal["transformer", "resnet-bk"]


class StateShape(NamedTuple):
    """One thing that a layer remembers: tensors (N, heads, P, width), a vector per head and position."""

    name: str
    heads: int
    width: int


@dataclass(frozen=True)
class DecoderConfig:
    """Dimensions of a decoder and where its exits are.

    `exits` are numbers of layers in increasing order; layers above the last one are dropped. `gated`: every exit but
    the final one has a gate. `tied`: the heads are the embedding table; else each exit has its own. A ResNet-BK block
    has `num_experts` of which each position asks `top_k`, and no heads. With `capacities` a router per layer says whose
    FFN runs, and a shortcut stands in for it elsewhere; there are thresholds for these shares of all (routers.py).
    Exits before the final one may have `own_layers`, which nobody else passes, and a `draft_vocabulary`, the tokens
    that they know (0: all; adapters.py).
    Raises OptionError.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    exits: tuple[int, ...]
    max_positions: int = 2048
    head_width: int = 0  # 0: width / heads
    norm_eps: float = 1e-5
    gated: bool = False
    tied: bool = True
    block: Block = "transformer"
    num_experts: int = 4
    top_k: int = 1
    dropout: float = 0.0
    capacities: tuple[float, ...] = ()
    own_layers: int = 0
    draft_vocabulary: int = 0

    def __post_init__(self) -> None:
        increasing = all(low < high for low, high in zip((0, *self.exits), self.exits, strict=False))
        if not self.exits or not increasing or self.exits[-1] > self.layers:
            raise OptionError(
                f"exits: got {self.exits}, expected numbers of layers, increasing, from 1 to {self.layers}"
            )
        if self.heads % self.kv_heads or (not self.head_width and self.width % self.heads):
            raise OptionError(
                f"decoder: got {self.heads} heads, {self.kv_heads} of keys and values, width {self.width}; expected "
                f"multiples of each other"
            )
        if self.block not in get_args(Block) or not 1 <= self.top_k <= self.num_experts or not 0 <= self.dropout < 1:
            raise OptionError(
                f"decoder: got block {self.block!r}, top_k {self.top_k} of {self.num_experts} experts, dropout "
                f"{self.dropout}; expected one of {', '.join(get_args(Block))}, at least 1 of them, a number in [0, 1)"
            )
        if any(not 0 < share <= 1 for share in self.capacities):
            raise OptionError(f"capacities: got {self.capacities}, expected shares of FFNs in (0, 1]")
        if self.own_layers < 0 or not 0 <= self.draft_vocabulary <= self.vocabulary:
            raise OptionError(
                f"decoder: got own_layers {self.own_layers}, draft_vocabulary {self.draft_vocabulary}; expected 0 or "
                f"more, and at most {self.vocabulary} tokens"
            )

    @property
    def num_classes(self) -> int:
        """The numbers that every exit answers with."""
        return self.vocabulary

    @property
    def states(self) -> tuple[StateShape, ...]:
        """What every layer remembers of a position."""
        if self.block == "resnet-bk":
            return (StateShape("resolvent", 1, 2),)
        return StateShape("key", self.kv_heads, self.head_size), StateShape("value", self.kv_heads, self.head_size)

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_width or self.width // self.heads

    @property
    def num_remembering(self) -> int:
        """How many layers have states, those of exits included."""
        return self.exits[-1] + self.own_layers * (len(self.exits) - 1)


class ExitSaid(NamedTuple):
    """What one exit says about the T positions of a chunk; it means something for those active until there."""

    logits: Tensor  # (N, T, V)
    hidden: Tensor  # (N, T, d): what its vocabulary head reads
    gate: Tensor | None  # (N, T) in [0, 1]


class Said(NamedTuple):
    """What a decoder says about a chunk of T new positions in each of N rows."""

    exits: list[ExitSaid]
    # Per layer, its states of the new positions, (N, heads, T, width) each; layers of an exit behind those before it.
    present: list[tuple[Tensor, ...]]


class Places(NamedTuple):
    """Where the positions of a chunk are, as the layers of one segment need it. Q = A x heads per key/value head."""

    active: tuple[Tensor, Tensor] | None  # row (N, 1) and position (N, A) of the active ones; None: all
    query_turn: tuple[Tensor, Tensor]  # cosines, sines: (N, A, 1, 1, D)
    key_turn: tuple[Tensor, Tensor]  # (N, T, 1, D)
    mask: Tensor  # (N, 1, Q, P + T): 0 or MASKED_SCORE


class RmsNorm(nn.Module):
    """Division by the root mean square, times a weight (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        # a quotient, because ONNX Runtime then makes one operator of it
        return self.weight * (hidden / (hidden.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())


class DecoderLayer(nn.Module):
    """Attention and FFN of one layer; queries are scaled by head width ** -0.5 in their weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, head = config.width, config.head_size
        self.kv_heads, self.group = config.kv_heads, config.heads // config.kv_heads
        self.attention_norm = RmsNorm(width, config.norm_eps)
        self.query = nn.Linear(width, config.heads * head, bias=False)
        self.key = nn.Linear(width, config.kv_heads * head, bias=False)
        self.value = nn.Linear(width, config.kv_heads * head, bias=False)
        self.out = nn.Linear(config.heads * head, width, bias=False)
        self.ffn_norm = RmsNorm(width, config.norm_eps)
        self.gate = nn.Linear(width, config.ffn, bias=False)
        self.up = nn.Linear(width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.router = nn.Linear(width, 1) if config.capacities else None
        self.shortcut = nn.Linear(width, width) if config.capacities else None
        if self.shortcut is not None:  # nothing, until it is fitted
            nn.init.zeros_(self.shortcut.weight)
            nn.init.zeros_(self.shortcut.bias)

    def forward(
        self,
        active: Tensor,
        chunk: Tensor,
        places: Places,
        past: tuple[Tensor, ...],
        threshold: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """From the active positions (N, A, d) before the layer to those after it, and the chunk's keys and values.

        `chunk` (N, T, d) holds the hidden states at the last exit; active ones have gone on since. `past` has keys and
        values (N, K, P, D). The FFN runs where the router's score reaches `threshold` (N,), the shortcut elsewhere;
        without a threshold it runs everywhere.
        """
        active, made = self.attend(active, chunk, places, past)
        normed = self.ffn_norm(active)
        if threshold is None or self.router is None or self.shortcut is None:
            return active + self.feed(normed), made
        chosen = self.router(normed)[..., 0] >= threshold[:, None]  # (N, A)
        return feed_where(active, normed, chosen, self.feed, self.shortcut), made

    def attend(
        self, active: Tensor, chunk: Tensor, places: Places, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `forward` does before the FFN."""
        normed = self.attention_norm(active if places.active is None else chunk.index_put(places.active, active))
        keys = turned(self._heads(self.key(normed)), places.key_turn).transpose(1, 2)  # (N, K, T, D)
        values = self._heads(self.value(normed)).transpose(1, 2)
        queries = self.query(normed if places.active is None else normed[places.active])
        return active + self.dropout(self.out(self._attended(queries, keys, values, places, past))), (keys, values)

    def feed(self, normed: Tensor) -> Tensor:
        """The FFN of normalised states (…, d)."""
        fed: Tensor = self.dropout(self.down(functional.silu(self.gate(normed)) * self.up(normed)))
        return fed

    def _heads(self, projected: Tensor) -> Tensor:
        """(N, T, K x D) to (N, T, K, D)."""
        return projected.view(*projected.shape[:2], self.kv_heads, -1)

    def _attended(
        self, queries: Tensor, keys: Tensor, values: Tensor, places: Places, past: tuple[Tensor, ...]
    ) -> Tensor:
        """Attention of queries (N, A, H x D) over past and new positions, without joining these two: (N, A, H x D).

        Joining would copy all keys and values for every token. Heads that share keys are rows of one product.
        """
        rows, length = queries.shape[:2]
        split = turned(queries.view(rows, length, self.kv_heads, self.group, -1), places.query_turn)  # (N, A, K, G, D)
        together = split.transpose(1, 2).flatten(2, 3)  # (N, K, A x G, D)
        scores = torch.cat([together @ past[0].transpose(2, 3), together @ keys.transpose(2, 3)], -1)
        weights = (scores + places.mask).softmax(-1)  # (N, K, A x G, P + T)
        number = past[0].shape[2]
        mixed = weights[..., :number] @ past[1] + weights[..., number:] @ values  # (N, K, A x G, D)
        apart = mixed.view(rows, self.kv_heads, length, self.group, -1).transpose(1, 2)  # (N, A, K, G, D)
        return apart.flatten(2)


class DecoderExit(nn.Module):
    """What stands at an exit: its own layers, normalisation, gate and vocabulary."""

    def __init__(self, config: DecoderConfig, is_final: bool) -> None:
        super().__init__()
        own = 0 if is_final else config.own_layers
        known = 0 if is_final else config.draft_vocabulary
        self.layers = nn.ModuleList(_layer(replace(config, capacities=())) for _ in range(own))
        self.norm = RmsNorm(config.width, config.norm_eps)
        self.gate = nn.Linear(config.width, 1) if config.gated and not is_final else None
        has_own_head = known > 0 or not config.tied
        self.head = nn.Linear(config.width, known or config.vocabulary, bias=False) if has_own_head else None
        self.draft = DraftVocabulary(config.vocabulary, known) if known else None


class EarlyExitDecoder(nn.Module):
    """Decoder whose forward says what every exit says, and the states of the new positions."""

    cosines: Tensor
    sines: Tensor
    thresholds: Tensor | None  # (capacities, L): what routers must reach, for each of config.capacities

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.exits[-1]))
        self.exits = nn.ModuleList(DecoderExit(config, at == config.exits[-1]) for at in config.exits)
        shape = len(config.capacities), config.exits[-1]
        self.register_buffer("thresholds", torch.full(shape, EVERYBODY) if config.capacities else None)
        self.set_turns(torch.outer(torch.arange(config.max_positions), _frequencies(config.head_size)))

    def set_turns(self, angles: Tensor, scale: float = 1.0) -> None:
        """Rotate position p by `angles[p]` (P, D / 2); `scale` multiplies the result (RoPE scaling)."""
        sines = angles.sin()
        self.register_buffer("cosines", (angles.cos() * scale).repeat(1, 2).float(), persistent=False)
        self.register_buffer("sines", (torch.cat([-sines, sines], -1) * scale).float(), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        past_length: Tensor | None = None,
        active: Sequence[Tensor] | None = None,
        past: Sequence[tuple[Tensor, ...]] = (),
        threshold: Tensor | None = None,
    ) -> Said:
        """Read a chunk of new tokens input_ids (N, T), which follow past_length (N,) positions; without it, none.

        `active` has one (N, A) per exit but the final one: which of the T positions go on from there, ascending; None:
        all. `past` has per layer its states (N, heads, P, width), P >= past_length; what lies behind past_length is not
        seen. Chunks are padded at their end: nobody sees what comes later. `threshold` (N, L) is what routers must
        reach for an FFN to run; without it all do.
        """
        if past_length is None:
            past_length, past = torch.zeros_like(input_ids[:, 0]), self._nothing(len(input_ids))
        shape = input_ids.shape[1], past[0][0].shape[2]
        hidden = self.dropout(self.embedding(input_ids))  # (N, T, d)
        present: list[tuple[Tensor, ...]] = []
        said, depth = Said([], present), 0
        limits: Sequence[tuple[Tensor, ...]] = [()] * self.config.exits[-1]
        if threshold is not None:
            limits = [(limit,) for limit in threshold.unbind(1)]
        for index, (until, leave) in enumerate(zip(self.config.exits, self.exits, strict=True)):
            places = self.places(past_length, shape, active[index - 1] if index and active else None)
            now = hidden if places.active is None else hidden[places.active]  # (N, A, d)
            for layer, limit in zip(self.layers[depth:until], limits[depth:until], strict=True):
                now, made = layer(now, hidden, places, past[len(present)], *limit)
                present.append(made)
            depth = until
            hidden = now if places.active is None else hidden.index_put(places.active, now)
            assert isinstance(leave, DecoderExit)
            shown = hidden  # (N, T, d): what the exit looks at
            for layer in leave.layers:
                now, made = layer(now, shown, places, past[len(present)])
                present.append(made)
                shown = now if places.active is None else shown.index_put(places.active, now)
            said.exits.append(self.said(leave, shown))
        return said

    def _nothing(self, rows: int) -> list[tuple[Tensor, ...]]:
        """A past of one position that nobody sees: an operator on no positions at all is a case that nobody tests."""
        weight = self.embedding.weight
        empty = tuple(weight.new_zeros(rows, state.heads, 1, state.width) for state in self.config.states)
        return [empty] * self.config.num_remembering

    def places(self, past_length: Tensor, shape: tuple[int, int], active: Tensor | None) -> Places | Sites:
        """What the layers of a segment need to know; `shape` is T, P."""
        index = None
        if active is not None:
            index = torch.arange(active.shape[0], device=active.device)[:, None], active
        if self.config.block == "resnet-bk":
            return Sites(index, past_length)
        chunk, number = shape
        group = self.config.heads // self.config.kv_heads
        steps = torch.arange(chunk, device=past_length.device)  # (T,)
        last = self.config.max_positions - 1  # only padding lies beyond
        positions = (past_length[:, None] + steps).clamp(max=last)  # (N, T)
        key_turn = tuple(functional.embedding(positions, table)[:, :, None] for table in (self.cosines, self.sines))
        asking = steps[None]
        query_turn = tuple(table[:, :, None] for table in key_turn)
        if active is not None:
            asking, placed = active, (past_length[:, None] + active).clamp(max=last)  # (N, A)
            query_turn = tuple(
                functional.embedding(placed, table)[:, :, None, None] for table in (self.cosines, self.sines)
            )
        asking = asking.repeat_interleave(group, 1)  # (N, Q)
        is_past = torch.arange(number, device=steps.device) < past_length[:, None]  # (N, P)
        is_past = is_past[:, None].expand(-1, asking.shape[1], -1)
        is_before = (steps <= asking[:, :, None]).expand(is_past.shape[0], -1, -1)  # (N, Q, T)
        seen = torch.cat([is_past, is_before], -1)[:, None]
        mask = torch.where(seen, 0.0, MASKED_SCORE)
        return Places(index, (query_turn[0], query_turn[1]), (key_turn[0], key_turn[1]), mask)

    def whole(self, rows: int, length: int) -> tuple[Places | Sites, tuple[Tensor, ...]]:
        """What a layer needs to read texts as a whole, `rows` of `length` tokens: their places, and no past."""
        nothing_before = self.embedding.weight.new_zeros(rows, dtype=torch.int64)
        return self.places(nothing_before, (length, 1), None), self._nothing(rows)[0]

    def vocabulary(self, leave: DecoderExit) -> Tensor:
        """The table (tokens that it knows, d) that an exit answers with: its own, or the embedding's."""
        return self.embedding.weight if leave.head is None else leave.head.weight

    def said(self, leave: DecoderExit, hidden: Tensor) -> ExitSaid:
        """What an exit says about hidden states (N, T, d) behind its layers."""
        normed = leave.norm(hidden)
        logits = functional.linear(normed, self.vocabulary(leave))
        gate = None if leave.gate is None else leave.gate(normed)[..., 0].sigmoid()
        return ExitSaid(logits if leave.draft is None else leave.draft(logits), normed, gate)


def _layer(config: DecoderConfig) -> nn.Module:
    if config.block == "resnet-bk":
        experts = Experts(config.width, config.ffn, config.num_experts, config.top_k)
        return ResolventLayer(config.width, experts, config.dropout)
    return DecoderLayer(config)


def turned(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the two halves of the last axis; the sines have the sign."""
    first, second = heads.chunk(2, -1)
    return heads * turn[0] + torch.cat([second, first], -1) * turn[1]


def _frequencies(width: int, base: float = 10_000.0) -> Tensor:
    return base ** -(torch.arange(0, width, 2).double() / width)
