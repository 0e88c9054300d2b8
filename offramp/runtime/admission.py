"""What a pool lets in: how much at once, and requests of which shapes may share a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import ROWS, Manifest
from offramp.errors import OptionError
from offramp.runtime.waiting import Shapes

if TYPE_CHECKING:
    from offramp.runtime.costs import BatchCosts
    from offramp.runtime.runner import Runner


@dataclass(frozen=True)
class Admission:
    """What a pool lets in, and how. Raises OptionError when it makes no sense.

    At most `max_rows` rows are in the pool, waiting or running; a request beyond that is refused at once. Dimensions
    of the model's masks are padded to multiples of `pad_to`, so that rows of nearly the same length share batches;
    it changes no answer where padding changes none, and costs what the padding costs.
    """

    max_rows: int = 1024
    pad_to: int = 1

    def __post_init__(self) -> None:
        for name, number in (("max_rows", self.max_rows), ("pad_to", self.pad_to)):
            if not isinstance(number, int) or number < 1:
                raise OptionError(f"pool: got {name}={number!r}, expected a whole number, 1 or more")


def padded_row_shapes(
    inputs: Mapping[str, NDArray[Any]], manifest: Manifest, pad_to: int
) -> tuple[dict[str, tuple[int, ...]], int]:
    """The shape of a row of every input, padded, and its size: the product of its symbolic dimensions.

    Dimensions of masks grow to the next multiple of `pad_to`, or to the bundle's maximum where that is less.
    """
    masked = {name for spec in manifest.inputs if spec.is_mask for name in spec.shape if isinstance(name, str)}
    sizes: dict[str, int] = {}
    shapes = {}
    for spec in manifest.inputs:
        row = []
        for name, length in list(zip(spec.shape, inputs[spec.name].shape, strict=True))[1:]:
            padded = length
            if name in masked:
                limits = manifest.dimensions.get(str(name))
                padded = max(length, min(-(-length // pad_to) * pad_to, limits.max if limits else length + pad_to))
            if isinstance(name, str):
                sizes[name] = padded
            row.append(padded)
        shapes[spec.name] = tuple(row)
    return shapes, prod(size for name, size in sizes.items() if name != ROWS)


def plain_shapes(inputs: Mapping[str, Any], dtypes: list[tuple[str, np.dtype[Any]]]) -> Shapes:
    """The shapes of the inputs where names and types are as they should; () where one must look closer."""
    if type(inputs) is not dict or len(inputs) != len(dtypes):
        return ()
    shapes = []
    for name, dtype in dtypes:
        array = inputs.get(name)
        if type(array) is not np.ndarray or array.dtype != dtype:
            return ()
        shapes.append(array.shape)
    return tuple(shapes)


def check_options(runner: Runner, max_batch: int, max_wait_ms: float, workers: int, costs: BatchCosts | None) -> None:
    """Raise OptionError unless the options of a pool over `runner` make sense."""
    for name, number in (("max_batch", max_batch), ("workers", workers)):
        if not isinstance(number, int) or number < 1:
            raise OptionError(f"pool: got {name}={number!r}, expected a whole number, 1 or more")
    if workers > 1 and not all(engine.keeps_carries for engine in runner.engines):
        raise OptionError(
            f"pool: got workers={workers}, expected 1: engines on {runner.backend} run one batch at a time"
        )
    if not 0 <= max_wait_ms < inf:
        raise OptionError(f"pool: got max_wait_ms={max_wait_ms!r}, expected 0 or a positive number")
    if costs is not None and len(costs.ms) != len(runner.engines):
        raise OptionError(
            f"pool: got costs of {len(costs.ms)} segments, the runner has {len(runner.engines)}; measure them on it"
        )
