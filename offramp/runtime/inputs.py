"""Checks of a request before anything runs: names, types, shapes, values. It converts nothing but subclasses.

Short integer inputs are looked at as Python lists: beside segments that have emptied the caches, a numpy reduction
costs 20 us and `max` of a list of 24 numbers 3 (docs/log.md).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import ROWS, DimensionSpec, InputSpec, Manifest
from offramp.errors import InputError

_dtype = cache(np.dtype)
_SHORT = 512  # numbers; a list of more is no longer quicker
_UNLIMITED = DimensionSpec(1, sys.maxsize)  # of a dimension without a range; no axis but the rows is empty


def checked_inputs(inputs: Mapping[str, Any], manifest: Manifest) -> tuple[dict[str, NDArray[Any]], int]:
    """The arrays of a request by name, and its number of rows N >= 0.

    Raises InputError, naming the input, unless every one is there, has the manifest's dtype, rank and
    dimensions, agrees with the others on the symbolic ones, and holds values in range. More rows than the
    manifest's maximum are fine: the runner splits them.
    """
    arrays, num_rows = checked_arrays(inputs, manifest)
    check_values(arrays, num_rows, manifest)
    return arrays, num_rows


def checked_arrays(inputs: Mapping[str, Any], manifest: Manifest) -> tuple[dict[str, NDArray[Any]], int]:
    """As `checked_inputs`, without a look at the values."""
    _check_names(inputs, manifest.inputs)
    arrays: dict[str, NDArray[Any]] = {}
    sizes: dict[str, int] = {}  # symbolic dimension -> its size in this request
    for spec in manifest.inputs:
        array = _array_from_value(spec, inputs[spec.name])
        _bind_dimensions(spec, array.shape, sizes, manifest)
        arrays[spec.name] = array
    return arrays, sizes[ROWS]


def check_values(arrays: Mapping[str, NDArray[Any]], num_rows: int, manifest: Manifest) -> None:
    """Raise InputError, naming the input and the row, unless all values of the `num_rows` rows are in range."""
    if num_rows:
        for spec in manifest.inputs:
            _check_values(spec, arrays[spec.name])


def _check_names(inputs: Mapping[str, Any], specs: tuple[InputSpec, ...]) -> None:
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"request: got {type(inputs).__name__}, expected a dict from input name to numpy array: "
            f"{', '.join(spec.name for spec in specs)}"
        )
    if len(inputs) == len(specs) and all(spec.name in inputs for spec in specs):
        return
    expected = {spec.name for spec in specs}
    missing, unexpected = sorted(expected - inputs.keys()), sorted(map(str, inputs.keys() - expected))
    raise InputError(
        f"request: missing {', '.join(missing) or 'nothing'}; unexpected "
        f"{', '.join(unexpected) or 'nothing'}; expected exactly {', '.join(spec.name for spec in specs)}"
    )


def _array_from_value(spec: InputSpec, value: Any) -> NDArray[Any]:
    if not isinstance(value, np.ndarray):
        raise InputError(
            f"input {spec.name!r}: got {type(value).__name__}, expected a numpy array; "
            f"pass `np.asarray({spec.name}, np.{spec.dtype})`"
        )
    if value.dtype != _dtype(spec.dtype):
        raise InputError(
            f"input {spec.name!r}: got dtype {value.dtype}, expected {spec.dtype}; "
            f"pass `{spec.name}.astype(np.{spec.dtype})`"
        )
    return value if type(value) is np.ndarray else np.asarray(value)


def _bind_dimensions(spec: InputSpec, shape: tuple[int, ...], sizes: dict[str, int], manifest: Manifest) -> None:
    """Check `shape` against the spec, and add its symbolic dimensions to `sizes`."""
    if len(shape) != len(spec.shape):
        raise InputError(f"input {spec.name!r}: got shape {shape}, expected {len(spec.shape)} axes {_drawn(spec)}")
    for axis, (size, dimension) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(dimension, int):
            if size != dimension:
                raise InputError(
                    f"input {spec.name!r}: got shape {shape}, expected {_drawn(spec)}: "
                    f"axis {axis} is {size}, not {dimension}"
                )
        elif sizes.setdefault(dimension, size) != size:
            raise InputError(
                f"input {spec.name!r}: got shape {shape}, expected {_drawn(spec)}: its {dimension!r} is "
                f"{size}, that of an input before it {sizes[dimension]}; pad or cut them to the same size"
            )
        elif dimension != ROWS:
            _check_range(spec, dimension, size, manifest.dimensions.get(dimension, _UNLIMITED))


def _check_range(spec: InputSpec, dimension: str, size: int, limits: DimensionSpec) -> None:
    if size > limits.max:
        raise InputError(
            f"input {spec.name!r}: its {dimension!r} is {size}, too long for this bundle, which takes "
            f"{limits.min} to {limits.max}; cut it, or export with a larger maximum"
        )
    if size < limits.min:
        raise InputError(
            f"input {spec.name!r}: its {dimension!r} is {size}, too short for this bundle, which takes "
            f"{limits.min} to {limits.max}; pad it"
        )


def _is_short_and_right(spec: InputSpec, array: NDArray[Any]) -> bool:
    """Say quickly whether a short integer array is in range; False means: look closely."""
    if array.size > _SHORT or not array.size or array.dtype.kind != "i" or spec.minimum is None or spec.maximum is None:
        return False
    values = array.ravel().tolist()
    if not (spec.minimum <= min(values) and max(values) <= spec.maximum):
        return False
    return not spec.is_mask or (array.ndim == 2 and all(1 in row for row in array.tolist()))


def _check_values(spec: InputSpec, array: NDArray[Any]) -> None:
    """`array` has at least one row."""
    if _is_short_and_right(spec, array):
        return
    if spec.is_mask:
        _check_mask(spec, array)
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all():
            row = _first_row(~np.isfinite(array))
            raise InputError(
                f"input {spec.name!r}: row {row} holds NaN or infinity, expected finite numbers; "
                f"look for a division by zero where it was made"
            )
    elif spec.minimum is not None and array.min() < spec.minimum:
        raise _range_error(spec, array, array < spec.minimum)
    elif spec.maximum is not None and array.max() > spec.maximum:
        raise _range_error(spec, array, array > spec.maximum)


def _check_mask(spec: InputSpec, array: NDArray[Any]) -> None:
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        row = _first_row(wrong)
        raise InputError(
            f"input {spec.name!r}: row {row} holds {array[wrong][0]}, expected only 0 (padding) and 1 (keep)"
        )
    kept = array.reshape(len(array), -1).any(axis=1)  # (N,)
    if not kept.all():
        raise InputError(
            f"input {spec.name!r}: row {_first_row(~kept)} is all 0, expected at least one 1 in every row; "
            f"leave out empty rows"
        )


def _range_error(spec: InputSpec, array: NDArray[Any], wrong: NDArray[np.bool_]) -> InputError:
    low, high = ("any" if limit is None else limit for limit in (spec.minimum, spec.maximum))
    return InputError(
        f"input {spec.name!r}: row {_first_row(wrong)} holds {array[wrong][0]}, expected {low} to {high}; "
        f"was it made by this bundle's tokenizer?"
    )


def _first_row(wrong: Any) -> int:
    return int(np.argwhere(wrong)[0][0])


def _drawn(spec: InputSpec) -> str:
    """The shape as one writes it: (rows, sequence)."""
    return f"({', '.join(map(str, spec.shape))})"
