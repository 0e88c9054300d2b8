"""Optimization profiles: the shapes a plan accepts, from the manifest's ranges and what the caller asked for.

Shapes are given for the model's inputs and reach the later segments through the names of their dimensions.
No TensorRT here and no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from offramp.bundle import PREVIOUS_ROWS, ROWS, Dimension, DimensionSpec, Manifest
from offramp.errors import BundleError, OptionError

# A head answers at most so many positions at once: logits of 1,024 over a vocabulary of 49,152 take 200 MB.
_HEAD_POSITIONS = 1024

Shapes = dict[str, tuple[int, ...]]
Profile = dict[str, tuple[tuple[int, ...], ...]]  # input name -> (min, opt, max) shapes


@dataclass(frozen=True)
class Range:
    """What TensorRT asks of a dimension: the smallest, the one to be fastest at, the largest."""

    min: int
    opt: int
    max: int


def shapes_from_text(text: str, option: str) -> Shapes:
    """Shapes from trtexec's spelling, "input_ids:1x64,attention_mask:1x64". Raises OptionError."""
    shapes: Shapes = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(.+):(\d+(?:x\d+)*)", part.strip())
        if match is None:
            raise OptionError(f"{option} {text}: got {part!r}, expected NAME:1x64[,NAME:1x64]")
        name = match[1]
        if name in shapes:
            raise OptionError(f"{option} {text}: input {name!r} is given twice")
        shapes[name] = tuple(int(size) for size in match[2].split("x"))
    return shapes


def ranges_from_shapes(manifest: Manifest, low: Shapes, opt: Shapes, high: Shapes) -> dict[str, Range]:
    """The range of every symbolic dimension of the manifest. Raises OptionError.

    A dimension that no shape names keeps the manifest's bounds. Its optimum is 1 for rows and the geometric
    mean of the bounds for the model's other dimensions; a dimension that is derived from those lies as far
    between its bounds as they do on average.
    """
    lowest = _sizes_from_shapes(manifest, low, "--min-shapes")
    usual = _sizes_from_shapes(manifest, opt, "--opt-shapes")
    highest = _sizes_from_shapes(manifest, high, "--max-shapes")
    of_model = {size for spec in manifest.inputs for size in spec.shape}
    ranges: dict[str, Range] = {}
    for name in sorted(manifest.dimensions, key=lambda name: name not in of_model):  # derived ones last
        spec = manifest.dimensions[name]
        bounds = DimensionSpec(lowest.get(name, spec.min), highest.get(name, spec.max))
        share = None if name in of_model else _mean_position(manifest, ranges)
        best = usual.get(name, _default_optimum(name, bounds, spec, share))
        if not bounds.min <= best <= bounds.max:
            raise OptionError(
                f"optimization profile: dimension {name!r} has min {bounds.min}, opt {best}, max "
                f"{bounds.max}; expected min <= opt <= max; change --min-, --opt- or --max-shapes"
            )
        ranges[name] = Range(bounds.min, best, bounds.max)
    return ranges


def segment_ranges(ranges: Mapping[str, Range], index: int) -> dict[str, Range]:
    """The ranges as segment `index` sees them: after the first exit, any number of rows may be left."""
    rows = ranges.get(ROWS, Range(1, 1, 1))
    survivors = Range(1, rows.opt, rows.max)
    if index == 0:
        return dict(ranges)
    return {**ranges, ROWS: survivors, PREVIOUS_ROWS: rows if index == 1 else survivors}


def head_ranges(manifest: Manifest, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges as a separate head sees them: positions of all rows, from one to as many as one call may bring.

    To be fastest at is one position per row: what generation asks for.
    """
    rows = ranges.get(ROWS, Range(1, 1, 1))
    chunk = ranges.get(manifest.decoder.chunk, Range(1, 1, 1)) if manifest.decoder else Range(1, 1, 1)
    return {ROWS: Range(1, rows.opt, min(rows.max * chunk.max, max(_HEAD_POSITIONS, rows.max)))}


def profile_from_ranges(inputs: Mapping[str, tuple[Dimension, ...]], ranges: Mapping[str, Range]) -> Profile:
    """The profile of a graph with these inputs; inputs whose shape is fixed need none. Raises BundleError."""
    profile: Profile = {}
    for name, shape in inputs.items():
        if all(isinstance(size, int) for size in shape):
            continue
        resolved = [_resolve(size, ranges, name) for size in shape]
        profile[name] = (
            tuple(size.min for size in resolved),
            tuple(size.opt for size in resolved),
            tuple(size.max for size in resolved),
        )
    return profile


def _resolve(size: Dimension, ranges: Mapping[str, Range], name: str) -> Range:
    if isinstance(size, int):
        return Range(size, size, size)
    if size not in ranges:
        raise BundleError(
            f"optimization profile: input {name!r} has the dimension {size!r}, the manifest knows "
            f"{', '.join(sorted(ranges))}; export the bundle again"
        )
    return ranges[size]


def _default_optimum(name: str, bounds: DimensionSpec, spec: DimensionSpec, share: float | None) -> int:
    """The size to be fastest at when nobody says; `share` is how far a derived dimension lies in `spec`."""
    if name == ROWS:
        size = 1
    elif share is None:
        size = round(math.sqrt(max(bounds.min, 1) * bounds.max))
    else:
        size = round(spec.min + share * (spec.max - spec.min))
    return min(max(size, bounds.min), bounds.max)


def _mean_position(manifest: Manifest, ranges: Mapping[str, Range]) -> float:
    """How far the optima of the model's own dimensions lie between the manifest's bounds, in [0, 1]."""
    model_names = {size for spec in manifest.inputs for size in spec.shape} - {ROWS}
    positions = [
        (size.opt - spec.min) / (spec.max - spec.min)
        for name, size in ranges.items()
        if name in model_names and (spec := manifest.dimensions[name]).max > spec.min
    ]
    return sum(positions) / len(positions) if positions else 0.5


def _sizes_from_shapes(manifest: Manifest, shapes: Shapes, option: str) -> dict[str, int]:
    """The size that `shapes` gives to each symbolic dimension."""
    specs = {spec.name: spec.shape for spec in manifest.inputs}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in specs:
            raise OptionError(f"{option}: unknown input {name!r}, the model has {', '.join(specs)}")
        if len(shape) != len(specs[name]):
            wanted = "x".join(str(size) for size in specs[name])
            raise OptionError(f"{option}: {name!r} got {len(shape)} dimensions, expected {len(specs[name])} ({wanted})")
        for axis, (size, dimension) in enumerate(zip(shape, specs[name], strict=True)):
            where = f"{option}: axis {axis} of {name!r}"
            known = sizes.get(dimension) if isinstance(dimension, str) else dimension
            if known is not None and size != known:
                raise OptionError(f"{where} is {size}, expected {known}, as elsewhere for {dimension!r}")
            if isinstance(dimension, str):
                _check_range(size, manifest.dimensions.get(dimension), where)
                sizes[dimension] = size
    return sizes


def _check_range(size: int, spec: DimensionSpec | None, where: str) -> None:
    if spec is not None and not spec.min <= size <= spec.max:
        raise OptionError(f"{where} is {size}, the bundle was exported for {spec.min} to {spec.max}")
