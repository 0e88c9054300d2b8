"""Optimization profiles: what the caller may ask for and how it reaches the later segments."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import make_bundle

from offramp.bundle import DimensionSpec, Manifest, load_manifest
from offramp.errors import BundleError, OptionError
from offramp.export.profile import (
    Range,
    profile_from_ranges,
    ranges_from_shapes,
    segment_ranges,
    shapes_from_text,
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    """Rows 1 to 8, sequence 2 to 64."""
    return load_manifest(make_bundle(tmp_path_factory.mktemp("bundle"), [{}, {}]))


def ranges(manifest: Manifest, low: str = "", opt: str = "", high: str = "") -> dict[str, Range]:
    options = {"--min-shapes": low, "--opt-shapes": opt, "--max-shapes": high}
    return ranges_from_shapes(manifest, *(shapes_from_text(text, name) for name, text in options.items()))


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("", {}),
        ("input_ids:1x64", {"input_ids": (1, 64)}),
        ("a:1x64, b:8", {"a": (1, 64), "b": (8,)}),
        ("scope/x:0:2x3", {"scope/x:0": (2, 3)}),
    ],
)
def test_shapes_from_text(text: str, shapes: dict):
    assert shapes_from_text(text, "--min-shapes") == shapes


@pytest.mark.parametrize(
    "text", ["input_ids", "input_ids:", "input_ids:1x", "a:[1,16]", ":1x2", "a:1X2", "a:-1x2", "a:1x2,a:1x2"]
)
def test_shapes_that_make_no_sense(text: str):
    with pytest.raises(OptionError, match="--opt-shapes"):
        shapes_from_text(text, "--opt-shapes")


def test_defaults_are_the_range_of_the_bundle(manifest):
    assert ranges(manifest) == {"rows": Range(1, 1, 8), "sequence": Range(2, 11, 64)}  # 11: sqrt(2 * 64)


def test_shapes_of_one_input_hold_for_every_tensor_with_the_dimension(manifest):
    asked = ranges(manifest, "input_ids:2x4", "attention_mask:4x16", "input_ids:8x32")
    assert asked == {"rows": Range(2, 4, 8), "sequence": Range(4, 16, 32)}


def test_the_default_optimum_stays_between_the_bounds_asked_for(manifest):
    assert ranges(manifest, "input_ids:3x40")["rows"] == Range(3, 3, 8)
    assert ranges(manifest, high="input_ids:1x2") == {"rows": Range(1, 1, 1), "sequence": Range(2, 2, 2)}


@pytest.mark.parametrize(
    ("low", "opt", "high", "said"),
    [
        ("ids:1x64", "", "", r"--min-shapes: unknown input 'ids', the model has input_ids, attention_mask"),
        ("", "input_ids:64", "", r"--opt-shapes: 'input_ids' got 1 dimensions, expected 2 \(rowsxsequence\)"),
        ("", "", "input_ids:1x65", r"--max-shapes: axis 1 of 'input_ids' is 65, .* 2 to 64"),
        ("input_ids:0x4", "", "", r"--min-shapes: axis 0 of 'input_ids' is 0, .* 1 to 8"),
        ("input_ids:1x4,attention_mask:1x8", "", "", r"axis 1 of 'attention_mask' is 8, expected 4"),
        (
            "input_ids:1x32",
            "input_ids:1x16",
            "",
            r"'sequence' has min 32, opt 16, max 64; expected min <= opt",
        ),
        ("", "input_ids:8x8", "input_ids:4x8", r"'rows' has min 1, opt 8, max 4"),
        ("input_ids:4x4", "", "input_ids:2x8", r"'rows' has min 4, opt \d, max 2"),
    ],
)
def test_shapes_that_do_not_fit(manifest, low: str, opt: str, high: str, said: str):
    with pytest.raises(OptionError, match=said):
        ranges(manifest, low, opt, high)


def test_a_fixed_axis_has_one_size(manifest):
    spec = replace(manifest.inputs[0], name="image", shape=("rows", 3))
    with pytest.raises(OptionError, match=r"axis 1 of 'image' is 4, expected 3"):
        ranges(replace(manifest, inputs=(spec,)), "image:1x4")


def test_after_an_exit_one_row_may_be_left(manifest):
    asked = ranges(manifest, "input_ids:4x8", "input_ids:6x8", "input_ids:8x8")
    rows = [segment_ranges(asked, index) for index in range(3)]
    assert [r["rows"] for r in rows] == [Range(4, 6, 8), Range(1, 6, 8), Range(1, 6, 8)]
    assert [r.get("previous_rows") for r in rows] == [None, Range(4, 6, 8), Range(1, 6, 8)]


def test_a_derived_dimension_keeps_its_bounds_and_scales_its_optimum(manifest):
    derived = replace(manifest, dimensions={"dim_3": DimensionSpec(1, 32), **manifest.dimensions})
    asked = ranges(derived, opt="input_ids:8x33", high="input_ids:8x40")
    assert asked["dim_3"] == Range(1, 16, 32)  # 33 is half-way from 2 to 64


def test_profile_names_every_dynamic_input(manifest):
    inputs = {"rows": ("rows",), "carry": ("previous_rows", "sequence", 32), "inverse_temperature": ()}
    assert profile_from_ranges(inputs, segment_ranges(ranges(manifest), 1)) == {
        "rows": ((1,), (1,), (8,)),
        "carry": ((1, 2, 32), (1, 11, 32), (8, 64, 32)),
    }


def test_a_dimension_nobody_knows_is_an_error(manifest):
    with pytest.raises(BundleError, match=r"'carry' has the dimension 'width'.*rows, sequence"):
        profile_from_ranges({"carry": ("rows", "width")}, ranges(manifest))


@given(
    rows=st.lists(st.integers(1, 8), min_size=3, max_size=3).map(sorted),
    lengths=st.lists(st.integers(2, 64), min_size=3, max_size=3).map(sorted),
    given_options=st.sets(st.integers(0, 2)),
)
def test_every_profile_is_ordered_and_as_asked(manifest, rows, lengths, given_options):
    shapes = [{"input_ids": (rows[i], lengths[i])} if i in given_options else {} for i in range(3)]
    resolved = ranges_from_shapes(manifest, *shapes)
    for name, sizes in (("rows", rows), ("sequence", lengths)):
        spec, size = manifest.dimensions[name], resolved[name]
        assert spec.min <= size.min <= size.opt <= size.max <= spec.max
        assert all((size.min, size.opt, size.max)[i] == sizes[i] for i in given_options)
