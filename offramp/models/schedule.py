"""What changes from step to step: learning rates, annealed attributes of the model, layers that are skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import OptionError


def learning_rate_scale(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Return the share of the peak rate at a step, in (0, 1]: up in a line, then down in a line."""
    num_warmup = math.ceil(warmup_ratio * num_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return (num_steps - step) / (num_steps - num_warmup)


def annealed(values: Sequence[float], epochs_done: float) -> float:
    """Return the value at a moment of a stage: `values[n]` after n epochs, on a line between, constant afterwards.

    (0, 0, 0.15, 0.3) is arXiv 2510.12856, algorithm 2: nothing in the first of three epochs, then up to 0.3.
    """
    before = min(int(epochs_done), len(values) - 1)
    after = min(before + 1, len(values) - 1)
    return values[before] + (values[after] - values[before]) * (epochs_done - before)


def set_annealed(model: nn.Module, anneal: Mapping[str, Sequence[float]], epochs_done: float) -> None:
    """Set the attributes of the model that `anneal` names; OptionError if it has no such attribute."""
    for name, values in anneal.items():
        if not hasattr(model, name):
            raise OptionError(
                f"anneal: got {name!r}, which {type(model).__name__} has not; name a number that it reads in forward"
            )
        setattr(model, name, annealed(values, epochs_done))


def layer_rates(num_layers: int, rate: float) -> tuple[float, ...]:
    """Return how often every layer is skipped: never the first, `rate` the last, exponentially between.

    LayerSkip, arXiv 2404.16710, section 4.1: p_l = p_max (exp(l ln 2 / (L - 1)) - 1).
    """
    last = max(num_layers - 1, 1)
    return tuple(rate * (math.exp(layer * math.log(2) / last) - 1) for layer in range(num_layers))


@contextmanager
def layers_dropped(model: nn.Module, rate: float) -> Iterator[None]:
    """Let rows skip layers of `model.layers` at random while the block runs and the layer is in train mode.

    Every row draws for itself, as in LayerSkip; a skipped layer hands on what it got. Raises OptionError for a model
    without `layers`.
    """
    if rate == 0.0:
        yield
        return
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise OptionError(f"layer_dropout: {type(model).__name__} has no list of layers; expected 0 for this model")
    hooks = [
        layer.register_forward_hook(_skipping(share))
        for layer, share in zip(layers, layer_rates(len(layers), rate), strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _skipping(rate: float) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not (layer.training and isinstance(output, Tensor) and output.shape == inputs[0].shape):
            return None  # a layer that prunes tokens cannot be skipped
        skipped = torch.rand(len(output)).to(output.device) < rate  # (N,)
        return torch.where(skipped.view(-1, *[1] * (output.ndim - 1)), inputs[0], output)

    return hook
