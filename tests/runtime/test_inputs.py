"""Every bad request is refused before anything runs, by an error that names the input and the cure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny

from offramp.bundle import DimensionSpec, InputSpec, Manifest
from offramp.errors import InputError
from offramp.runtime import Runner
from offramp.runtime.fake import fake_manifest
from offramp.runtime.inputs import checked_inputs


def manifest_of(*specs: InputSpec, **dimensions: DimensionSpec) -> Manifest:
    manifest = fake_manifest(1, 2, specs)
    return replace(manifest, dimensions={**manifest.dimensions, **dimensions})


TEXT = manifest_of(*tiny.INPUTS, sequence=DimensionSpec(2, 12))
PIXELS = manifest_of(
    InputSpec("image", "float32", ("rows", 3, "height", "height"), None, None, False),
    InputSpec("level", "uint8", ("rows",), 1, None, False),
    InputSpec("kept", "bool", ("rows", "height"), None, None, True),
)


def text(**changes: Any) -> dict[str, Any]:
    good = {"ids": np.full((3, 4), 5), "mask": np.ones((3, 4), np.int64)}
    return {**good, **changes}


def pixels(**changes: Any) -> dict[str, Any]:
    good = {
        "image": np.zeros((2, 3, 5, 5), np.float32),
        "level": np.ones(2, np.uint8),
        "kept": np.ones((2, 5), np.bool_),
    }
    return {**good, **changes}


def with_value(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


IDS, MASK = text()["ids"], text()["mask"]
IMAGE, LEVEL, KEPT = pixels().values()

BAD = {
    "not a dict": (TEXT, IDS, ["request", "ndarray", "ids, mask"]),
    "missing": (TEXT, {"ids": IDS}, ["missing mask", "unexpected nothing"]),
    "unexpected": (TEXT, text(token_type_ids=IDS), ["missing nothing", "unexpected token_type_ids"]),
    "both": (TEXT, {"input_ids": IDS, "mask": MASK}, ["missing ids", "unexpected input_ids", "ids, mask"]),
    "odd key": (TEXT, {**text(), 7: IDS}, ["unexpected 7"]),
    "list": (TEXT, text(ids=IDS.tolist()), ["'ids'", "got list", "np.asarray(ids, np.int64)"]),
    "None": (TEXT, text(mask=None), ["'mask'", "got NoneType"]),
    "int32": (TEXT, text(ids=IDS.astype(np.int32)), ["'ids'", "got dtype int32", "ids.astype(np.int64)"]),
    "big endian": (TEXT, text(ids=IDS.astype(">i8")), ["'ids'", ">i8", "astype"]),
    "float mask": (TEXT, text(mask=MASK.astype(np.float32)), ["'mask'", "mask.astype(np.int64)"]),
    "object": (TEXT, text(ids=np.array([["a"]], object)), ["'ids'", "object"]),
    "rank": (TEXT, text(ids=IDS[0]), ["'ids'", "got shape (4,)", "2 axes (rows, sequence)"]),
    "scalar": (TEXT, text(ids=np.array(5)), ["'ids'", "got shape ()"]),
    "rows differ": (TEXT, text(mask=MASK[:2]), ["'mask'", "'rows' is 2", "3; pad or cut"]),
    "lengths differ": (TEXT, text(mask=MASK[:, :3]), ["'mask'", "'sequence' is 3", "4; pad or cut"]),
    "too long": (
        TEXT,
        {"ids": np.zeros((1, 13), np.int64), "mask": np.ones((1, 13), np.int64)},
        ["'ids'", "'sequence' is 13, too long", "2 to 12"],
    ),
    "too short": (TEXT, text(ids=IDS[:, :1], mask=MASK[:, :1]), ["'ids'", "too short", "pad it"]),
    "no tokens": (TEXT, text(ids=IDS[:, :0], mask=MASK[:, :0]), ["'ids'", "too short"]),
    "no tokens, no rows": (TEXT, text(ids=IDS[:0, :0], mask=MASK[:0, :0]), ["'ids'", "too short"]),
    "token -1": (TEXT, text(ids=with_value(IDS, (1, 2), -1)), ["'ids'", "row 1 holds -1", "0 to 15"]),
    "token 16": (TEXT, text(ids=with_value(IDS, (2, 0), 16)), ["'ids'", "row 2 holds 16", "0 to 15"]),
    "mask 2": (TEXT, text(mask=with_value(MASK, (1, 0), 2)), ["'mask'", "row 1 holds 2", "only 0"]),
    "mask -1": (TEXT, text(mask=with_value(MASK, (0, 3), -1)), ["'mask'", "row 0 holds -1"]),
    "all masked": (
        TEXT,
        text(mask=with_value(MASK, (1,), 0)),
        ["'mask'", "row 1 is all 0", "one 1"],
    ),
    "NaN": (PIXELS, pixels(image=with_value(IMAGE, (1, 0, 0, 0), np.nan)), ["'image'", "row 1 holds NaN"]),
    "-inf": (
        PIXELS,
        pixels(image=with_value(IMAGE, (0, 2, 4, 4), -np.inf)),
        ["'image'", "row 0 holds"],
    ),
    "channels": (PIXELS, pixels(image=IMAGE[:, :1]), ["'image'", "(rows, 3, height, height)", "axis 1 is 1"]),
    "not square": (PIXELS, pixels(image=IMAGE[:, :, :, :4]), ["'image'", "'height' is 4"]),
    "empty axis": (PIXELS, pixels(image=IMAGE[:, :, :0, :0], kept=KEPT[:, :0]), ["'image'", "too short"]),
    "below minimum": (PIXELS, pixels(level=np.zeros(2, np.uint8)), ["'level'", "holds 0", "1 to any"]),
    "bool mask": (PIXELS, pixels(kept=with_value(KEPT, (1,), False)), ["'kept'", "row 1 is all 0"]),
}


@pytest.mark.parametrize(("manifest", "inputs", "parts"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(manifest: Manifest, inputs: Any, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        checked_inputs(inputs, manifest)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("good", [text(), text(mask=with_value(MASK, (0, 3), 0))])
def test_good_input_comes_back_as_it_is(good: dict[str, Any]) -> None:
    arrays, num_rows = checked_inputs(good, TEXT)
    assert num_rows == 3
    assert all(arrays[name] is good[name] for name in good)


def test_good_pixels() -> None:
    assert checked_inputs(pixels(), PIXELS)[1] == 2


def test_no_rows_is_good() -> None:
    inputs = {"ids": np.zeros((0, 4), np.int64), "mask": np.zeros((0, 4), np.int64)}
    assert checked_inputs(inputs, TEXT)[1] == 0


def test_more_rows_than_the_maximum_is_good() -> None:
    inputs = {"ids": np.zeros((100, 4), np.int64), "mask": np.ones((100, 4), np.int64)}
    assert checked_inputs(inputs, TEXT)[1] == 100


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "column-major": np.asfortranarray,
    "strided": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
    "read-only": lambda array: np.broadcast_to(array, array.shape),
    "subclass": lambda array: array.view(np.memmap),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layout_does_not_matter(shared_runner: Runner, layout: Callable[[np.ndarray], np.ndarray]) -> None:
    inputs = tiny.request(tiny.sentences(5))
    laid_out = {name: layout(array) for name, array in inputs.items()}
    tiny.assert_same(shared_runner.run(laid_out), shared_runner.run(inputs))


def test_nothing_runs_on_bad_input(shared_runner: Runner) -> None:
    """ONNX Runtime would take -1 for the last token."""
    with pytest.raises(InputError, match="holds -1"):
        shared_runner.run(tiny.request([[1, -1]]))
    with pytest.raises(InputError, match="holds -1"):
        shared_runner.record([tiny.request([[1, -1]])])
