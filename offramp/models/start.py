"""A model that begins with what another one has learned: its layers, and the heads of exits after the same layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import OptionError

_HEADS = "heads."


@torch.no_grad()
def start_from(model: nn.Module, taught: nn.Module) -> int:
    """Copy into `model` all weights that `taught` has under the same name and in the same shape; how many tensors.

    Heads have the numbers of their exits, so they are found by depth. What `model` has besides stays as it is.
    Raises OptionError when nothing fits.
    """
    learned = {_by_depth(name, taught): value for name, value in taught.state_dict().items()}
    copied = 0
    for name, value in model.state_dict().items():
        source = learned.get(_by_depth(name, model))
        if isinstance(source, Tensor) and source.shape == value.shape:
            value.copy_(source)
            copied += 1
    if not copied:
        raise OptionError(
            f"starting from a teacher: a {type(taught).__name__} has no weights that fit into a "
            f"{type(model).__name__}; set run.from_teacher to false"
        )
    return copied


def _by_depth(name: str, model: Any) -> str:
    """`name` with the depth of the exit in place of its number, where it is of an exit's head."""
    exits = getattr(getattr(model, "config", None), "exits", None)
    if exits is None or not name.startswith(_HEADS):
        return name
    number, dot, rest = name.removeprefix(_HEADS).partition(".")
    return f"{_HEADS}{exits[int(number)]}{dot}{rest}" if number.isdigit() and int(number) < len(exits) else name
