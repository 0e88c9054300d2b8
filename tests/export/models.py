"""Small multi-exit models with fixed weights, for the cut: none of them resembles the demo's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from offramp.export.capture import Example


def with_fixed_weights(model: nn.Module) -> nn.Module:
    """The model in eval(), every parameter a sine of its own frequency: fixed, not random, and never symmetric."""
    for position, parameter in enumerate(model.parameters()):
        places = torch.arange(parameter.numel(), dtype=torch.float64)
        scale = 1 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.1
        values = torch.sin(places * (1.7 + 0.13 * position) + position) * scale
        parameter.data.copy_(values.reshape(parameter.shape).float() + (parameter.ndim == 1) * 0.5)
    return model.eval()


class ResidualCNN(nn.Module):
    """Exits inside residual connections: after the first convolution of a block, before the skip is added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.second = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        x = torch.relu(self.stem(pixels))
        logits = []
        for first, second, head in zip(self.first, self.second, self.heads, strict=True):
            inner = torch.relu(first(x))
            logits.append(head(inner.mean((2, 3))))
            x = torch.relu(second(inner) + x)
        return tuple(logits)


class TwoStreams(nn.Module):
    """Two streams that only meet at the exits: both must be carried."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.right = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(13, 4) for _ in range(3))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        logits = []
        for left, right, head in zip(self.left, self.right, self.heads, strict=True):
            first, second = torch.tanh(left(first)), torch.tanh(right(second))
            logits.append(head(torch.cat([first, second], 1)))
        return tuple(logits)


class SharedWeights(nn.Module):
    """One layer and one head, used again and again (as ALBERT does): their weights stand on both sides of a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        logits = []
        for _ in range(3):
            features = functional.gelu(self.layer(features)) + features
            logits.append(self.head(features))
        return tuple(logits)


class PrunedBert(nn.Module):
    """A `transformers` BertModel whose sequence gets shorter after each exit; its masks are broadcast by itself.

    Keeps the first token and the ceil(0.7 (t - 1)) others with the largest norm, padding going first (EAT,
    arXiv 2510.12856, Algorithm 1).
    """

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
        bert = BertModel(config, add_pooling_layer=False)
        self.embeddings, self.layers = bert.embeddings, bert.encoder.layer
        self.heads = nn.ModuleList(nn.Linear(16, 2) for _ in self.layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        x = self.embeddings(input_ids)
        logits = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            rows, length, _ = x.shape
            kept = attention_mask[:, None, None, :].expand(rows, 1, length, length)  # broadcast, as many models do
            x = layer(x, (1.0 - kept.float()) * -1e4)
            logits.append(head(x[:, 0]))
            x, attention_mask = self.shorten(x, attention_mask)
        return tuple(logits)

    def shorten(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rows, length, width = x.shape
        keep = (7 * (length - 1) + 9) // 10
        importance = x[:, 1:].norm(dim=-1) * mask[:, 1:]
        chosen = importance.topk(keep, dim=1).indices.sort(dim=1).values + 1
        chosen = torch.cat([torch.zeros(rows, 1, dtype=chosen.dtype), chosen], 1)
        return x.gather(1, chosen[:, :, None].expand(rows, keep + 1, width)), mask.gather(1, chosen)


class TimeMajor(nn.Module):
    """Hidden states with time first, (T, N, d), as nn.LSTM and nn.TransformerEncoder have them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(2))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        x = features.transpose(0, 1)
        logits = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = torch.tanh(layer(x))
            logits.append(head(x.mean(0)))
        return tuple(logits)


class Windowed(nn.Module):
    """Windows folded into the row axis, (4 N, T / 4, d), and still so where the exits are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(2))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        rows, length, width = features.shape
        x = features.reshape(rows * 4, length // 4, width)
        logits = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = torch.tanh(layer(x)) + x.mean(1, keepdim=True)
            logits.append(head(x.reshape(rows, length, width).mean(1)))
        return tuple(logits)


class StridedCNN(nn.Module):
    """Height and width change independently and shrink; `pool` is how a map becomes one row."""

    def __init__(self, pool: nn.Module, pooled: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.depthwise = nn.ModuleList(nn.Conv2d(4, 4, 3, stride, 1, groups=4) for stride in (1, 2))
        self.pool = pool
        self.heads = nn.ModuleList(nn.Linear(pooled, 3) for _ in range(2))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(pixels)
        logits = []
        for layer, head in zip(self.depthwise, self.heads, strict=True):
            x = functional.hardswish(layer(x))
            logits.append(head(self.pool(x).flatten(1)))
        return tuple(logits)


class ByKeyword(nn.Module):
    """A wrapper as users write it around a `transformers` model with its own masks: forward takes **inputs."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleList(nn.Linear(16, 2) for _ in range(2))

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        hidden = self.bert(**inputs, output_hidden_states=True).hidden_states[1:]
        return tuple(head(x[:, 0]) for head, x in zip(self.heads, hidden, strict=True))


class OddOutputs(nn.Module):
    """Integers and floats in, one input that nobody reads, one that only the last exit reads; logits in FP16."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 4), nn.Linear(8, 8)
        self.late, self.head = nn.Linear(11, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.tensor([0.5, 2.0, 1.0, 3.0]))

    def forward(self, dense: Tensor, code: Tensor, late: Tensor, unused: Tensor) -> list[Tensor]:
        x = torch.tanh(self.layer(torch.cat([dense * self.scale, self.table(code)], 1)))
        first = self.head(x)
        x = torch.tanh(self.late(torch.cat([x, late], 1)))
        return [first.half(), first.half() * 2, self.head(x).half()]


class BatchNormalised(nn.Module):
    """An exit whose answer depends on the other rows: it subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(2))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return tuple(head(features - features.mean(0, keepdim=True)) for head in self.heads)


class Pooled(nn.Module):
    """Layers over tokens, pooled by `pool` from the states (N, T, d) and the mask (N, T) to a row (N, d)."""

    def __init__(self, pool: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.pool, self.table = pool, nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        x, logits = self.table(input_ids), []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = torch.tanh(layer(x)) + x
            logits.append(head(self.pool(x, attention_mask)))
        return tuple(logits)


class Said(NamedTuple):
    """What a model with learned confidences says at an exit."""

    logits: Tensor  # (N, C)
    learned: Tensor | None  # (N,) or (N, 1) in [0, 1]


class Confident(nn.Module):
    """A residual network whose exits say how likely they are right, where `has_learned`; the second as a column."""

    def __init__(self, has_learned: tuple[bool, ...]) -> None:
        super().__init__()
        self.has_learned = has_learned
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in has_learned)
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in has_learned)
        self.confidences = nn.ModuleList(nn.Linear(9, 1) for _ in has_learned)

    def forward(self, features: Tensor) -> tuple[Said | Tensor, ...]:
        x, exits = features, []
        for k, (layer, head, confidence) in enumerate(zip(self.layers, self.heads, self.confidences, strict=True)):
            x = torch.tanh(layer(x)) + x
            logits = head(x)
            learned = torch.sigmoid(confidence(torch.cat([x, logits], 1)) * 4 - 4)
            exits.append(Said(logits, learned if k == 1 else learned[:, 0]) if self.has_learned[k] else logits)
        return tuple(exits)


def confident(has_learned: tuple[bool, ...] = (True, True, True)) -> tuple[nn.Module, Example]:
    return with_fixed_weights(Confident(has_learned)), Example({"features": waves(24, 6)}, max_rows=16)


def pooled(pool: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, Example]:
    return with_fixed_weights(Pooled(pool)), pruned_bert()[1]


def waves(*shape: int) -> Tensor:
    """Fixed float inputs, every row different."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float32) * 0.37).reshape(shape)


def residual_cnn() -> tuple[nn.Module, Example]:
    return with_fixed_weights(ResidualCNN()), Example({"pixels": waves(6, 1, 8, 8)})


def two_streams() -> tuple[nn.Module, Example]:
    return with_fixed_weights(TwoStreams()), Example({"first": waves(6, 8), "second": waves(6, 5) * 2})


def shared_weights() -> tuple[nn.Module, Example]:
    return with_fixed_weights(SharedWeights()), Example({"features": waves(6, 6)})


def pruned_bert() -> tuple[nn.Module, Example]:
    ids = torch.arange(6 * 20).reshape(6, 20) * 7 % 50
    mask = (torch.arange(20)[None] < torch.tensor([20, 14, 9, 20, 3, 17])[:, None]).long()
    sequence = {1: "sequence"}
    return with_fixed_weights(PrunedBert()), Example(
        inputs={"input_ids": ids, "attention_mask": mask},
        dynamic={"input_ids": sequence, "attention_mask": sequence},
        ranges={"sequence": (2, 64)},
    )


def time_major() -> tuple[nn.Module, Example]:
    return with_fixed_weights(TimeMajor()), Example({"features": waves(6, 4, 6)})


def windowed() -> tuple[nn.Module, Example]:
    return with_fixed_weights(Windowed()), Example({"features": waves(6, 8, 6)})


def strided_cnn(pool: nn.Module | None = None, pooled: int = 4) -> tuple[nn.Module, Example]:
    model = with_fixed_weights(StridedCNN(pool or nn.AdaptiveAvgPool2d(1), pooled))
    axes, ranges = {"pixels": {2: "height", 3: "width"}}, {"height": (8, 64), "width": (8, 64)}
    return model, Example({"pixels": waves(4, 1, 16, 16)}, axes, ranges)


def by_keyword() -> tuple[nn.Module, Example]:
    _, example = pruned_bert()
    return with_fixed_weights(ByKeyword()), example


def odd_outputs() -> tuple[nn.Module, Example]:
    inputs = {"dense": waves(5, 4), "code": torch.tensor([1, 3, 8, 0, 2]), "late": waves(5, 3), "unused": waves(5, 2)}
    return with_fixed_weights(OddOutputs()), Example({name: inputs[name] for name in sorted(inputs)})


def batch_normalised() -> tuple[nn.Module, Example]:
    return with_fixed_weights(BatchNormalised()), Example({"features": waves(6, 6)})


class LateBias(nn.Module):
    """Two exits; `shift` (N, 4) is read after the first one only, `scale` (N,) by both, and both may be late."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.mix, self.heads = nn.Linear(4, 8), nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        factor = (scale * 2 + 1)[:, None]
        hidden = self.first(x).relu() * factor
        deeper = self.second(hidden + self.mix(shift)).relu() * factor
        return self.heads[0](hidden), self.heads[1](deeper)


def late_bias() -> tuple[nn.Module, Example]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (4, 6), "scale": (4,), "shift": (4, 4)}
    return LateBias(), Example({name: torch.rand(*shape, generator=generator) for name, shape in shapes.items()})
