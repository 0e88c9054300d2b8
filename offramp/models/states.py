"""Hidden states of a frozen decoder on disk: what its exits are trained on, computed once.

One file per part of the texts, written whole or not at all and named by its number, beside a file that says what they
were made of: a run that was killed goes on with the parts that are missing, and states of another model, other texts or
other thresholds are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.errors import DataError
from offramp.models.devices import device_of, products
from offramp.storage import write_file

_ABOUT = "states.json"
_PART = 16  # texts: about 20 MB with 5 exits of width 576 and 128 tokens


@dataclass(frozen=True)
class States:
    """Texts (R, T) and their hidden states at every exit of a decoder, (E, R, T, d) in float16.

    Of early exits as their layers end, of the final one after its normalisation.
    """

    tokens: Tensor
    hidden: Tensor


def record_states(decoder: Any, tokens: NDArray[np.int64], folder: Path, capacity: int = -1) -> States:
    """The states of texts (R, T), read from `folder` where they are there, computed and written where not.

    `capacity` is the index of the thresholds that routers are run with, -1 for none. Raises DataError when the folder
    has states of something else, or a part is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = json.dumps(_about(decoder, tokens, capacity), indent=2, sort_keys=True) + "\n"
    file = folder / _ABOUT
    if file.exists() and file.read_text() != about:
        raise DataError(f"states in {folder} are of another model or other texts; name another folder or remove it")
    write_file(file, about.encode())
    parts = [_part(decoder, tokens, folder, start, capacity) for start in range(0, len(tokens), _PART)]
    return States(torch.from_numpy(tokens), torch.cat(parts, 1))


def _part(decoder: Any, tokens: NDArray[np.int64], folder: Path, start: int, capacity: int) -> Tensor:
    ids = torch.from_numpy(tokens[start : start + _PART])
    return torch.from_numpy(
        kept_array(folder / f"{start:06d}.npy", lambda: hidden_states(decoder, ids, capacity).numpy())
    )


def kept_array(file: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The array in `file`, made and written there if it is not. Raises DataError when it is damaged."""
    if file.exists():
        try:
            found: NDArray[Any] = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as exc:
            raise DataError(f"reading {file}: {exc}; remove this file, it will be made again") from exc
        return found
    made = make()
    stream = io.BytesIO()
    np.save(stream, made)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, stream.getvalue())
    return made


@torch.no_grad()
def hidden_states(decoder: Any, ids: Tensor, capacity: int = -1) -> Tensor:
    """States (E, N, T, d) of texts (N, T) as `States` has them; products in bfloat16 where its device has it."""
    device = device_of(decoder)
    with products(device=device):
        found = _at_exits(decoder, ids.to(device), capacity)
    return torch.stack(found).clamp(-_LARGEST, _LARGEST).half().cpu()


def _at_exits(decoder: Any, ids: Tensor, capacity: int) -> list[Tensor]:
    config = decoder.config
    rows, length = ids.shape
    places, nothing = decoder.whole(rows, length)
    limits = [None] * config.exits[-1] if capacity < 0 else list(decoder.thresholds[capacity].expand(rows, -1).T)
    hidden, found = decoder.embedding(ids), []
    for number, (layer, limit) in enumerate(zip(decoder.layers, limits, strict=True), 1):
        hidden, _ = layer(hidden, hidden, places, nothing, limit)
        if number == config.exits[-1]:
            found.append(decoder.exits[-1].norm(hidden))
        elif number in config.exits:
            found.append(hidden)
    return found


_LARGEST = 65504.0  # of float16


def _about(decoder: nn.Module, tokens: NDArray[np.int64], capacity: int) -> dict[str, Any]:
    """What states depend on: texts, layers, routers and thresholds, and where the exits are."""
    digest = hashlib.sha256(np.ascontiguousarray(tokens).tobytes())
    for name, tensor in decoder.state_dict().items():
        if not name.startswith("exits.") and (capacity >= 0 or ("router" not in name and name != "thresholds")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    exits: Sequence[int] = decoder.config.exits  # type: ignore[union-attr, assignment]
    return {"sha256": digest.hexdigest(), "shape": list(tokens.shape), "exits": list(exits), "capacity": capacity}
