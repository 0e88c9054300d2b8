"""Headers of plans, and why a plan cannot run here: all without TensorRT and without a GPU."""

import struct
from dataclasses import replace
from typing import Any

import pytest

from offramp.bundle import DimensionSpec, FileRecord, InputSpec, Manifest, PlanRecord, file_record
from offramp.errors import PlanError
from offramp.plan import (
    PlanHeader,
    check_plan_header,
    choose_plans,
    is_same_version,
    narrowed,
    plan_header,
    plan_obstacle,
)
from offramp.runtime.fake import fake_manifest

# First bytes of a plan that TensorRT-RTX 1.7.1.116 wrote.
REAL = bytes.fromhex("76747274000000000200000000000000a47e1300000000000107017476747274")


def content(tag: int, version: tuple[int, ...]) -> bytes:
    return struct.pack("<I", tag) + bytes(20) + bytes(version) + bytes(100)


def record(**changes: object) -> PlanRecord:
    plan = PlanRecord(
        file=file_record("segments/00/plans/k.plan", REAL),
        key="k",
        backend="tensorrt",
        precision="fp16",
        version="11.4.0.106",
        targets=("8.6",),
        profile={},
        fp16_share=1.0,
        seconds=0.0,
    )
    return replace(plan, **changes)


def test_header_of_a_real_plan():
    assert plan_header(REAL) == PlanHeader("tensorrt-rtx", "1.7.1.116")


def test_header_of_a_tensorrt_plan():
    assert plan_header(content(0x74727466, (11, 4, 0, 106))) == PlanHeader("tensorrt", "11.4.0.106")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "got 0 bytes"),
        (REAL[:27], "got 27 bytes"),
        (content(0x46544C54, (1, 2, 3, 4)), "got tag 0x46544c54"),
        (REAL[::-1], "got tag"),
        (b"\x08\x0a\x12" + bytes(100), "got tag"),  # an ONNX file
    ],
)
def test_what_is_no_plan_is_refused(data: bytes, said: str):
    with pytest.raises(PlanError, match=said) as caught:
        plan_header(data)
    assert "offramp build-engine" in str(caught.value)


@pytest.mark.parametrize(
    ("header", "version", "same"),
    [
        ("1.7.1.116", "1.7.1.116", True),
        ("1.7.1.116", "1.7.1.115", False),
        ("10.13.3.9", "10.13.3.9.post1", True),
        ("11.4.0.44", "11.4.0.300", True),  # one byte a part: 300 - 256
        ("11.4.0.106", "11.4.0.106+", True),
        ("11.4.0.106", "10.4.0.106", False),
    ],
)
def test_versions_compare_a_byte_a_part(header: str, version: str, same: bool):
    assert is_same_version(header, version) is same


def test_record_and_header_must_agree():
    check_plan_header(REAL, record(backend="tensorrt-rtx", version="1.7.1.116"))
    for wrong in (record(version="1.7.1.116"), record(backend="tensorrt-rtx", version="1.6.0.1")):
        with pytest.raises(PlanError, match=r"TensorRT-RTX 1\.7\.1\.116") as caught:
            check_plan_header(REAL, wrong)
        assert wrong.version in str(caught.value)
        assert "--force" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "version", "sm"),
    [
        ({}, "11.4.0.106", "8.6"),
        ({"targets": ("7.5", "8.6")}, "11.4.0.106", "8.6"),
        ({"targets": ("8.0+",)}, "11.4.0.106", "9.0"),
        ({"targets": ("8.0+",)}, "11.4.0.106", "12.0"),
        ({"version": "11.4.0.106+"}, "11.4.0.106", "8.6"),
        ({"version": "11.4.0.106+"}, "11.10.0.2", "8.6"),
    ],
)
def test_plans_that_run_here(changes: dict, version: str, sm: str):
    assert plan_obstacle(record(**changes), version, sm) == ""


@pytest.mark.parametrize(
    ("changes", "version", "sm", "said"),
    [
        ({}, "", "8.6", "TensorRT, which is not installed; run `pip install 'offramp[tensorrt]'`"),
        ({}, "11.4.0.106", "", "needs an NVIDIA GPU (SM 8.6)"),
        (
            {},
            "11.4.0.106",
            "9.0",
            "for SM 8.6, this machine has 11.4.0.106 and SM 9.0; run `offramp build-eng",
        ),
        ({}, "11.4.0.107", "8.6", "by TensorRT 11.4.0.106 for"),
        ({"version": "11.4.0.106+"}, "11.3.0.200", "8.6", "this machine has 11.3.0.200"),
        ({"targets": ("8.0", "12.0+")}, "11.4.0.106", "8.6", "for SM 8.0, 12.0+"),
        (
            {"backend": "tensorrt-rtx", "version": "1.7.1.116", "targets": ("8.0", "12.0+")},
            "1.7.1.116",
            "9.0",
            "TensorRT-RTX does not run on GPUs of SM 9.0, only on 7.5, 8.0, 8.6, 8.9, 12.0+; run `pip",
        ),
        ({"backend": "hal"}, "11.4.0.106", "8.6", "'hal', which this offramp does not know"),
    ],
)
def test_plans_that_cannot_run_here(changes: dict, version: str, sm: str, said: str):
    assert said in plan_obstacle(record(**changes), version, sm)


def manifest_with(*plans_by_segment: tuple[PlanRecord, ...]) -> Manifest:
    """A manifest of as many segments, with these plans."""
    manifest = fake_manifest(
        len(plans_by_segment), 2, (InputSpec("x", "float32", ("rows", "width"), None, None, False),)
    )
    segments = tuple(replace(s, plans=plans) for s, plans in zip(manifest.segments, plans_by_segment, strict=True))
    return replace(
        manifest, segments=segments, dimensions={"rows": DimensionSpec(1, 64), "width": DimensionSpec(2, 512)}
    )


def profiled(precision: str, rows: int, width: int, **changes: Any) -> PlanRecord:
    """A plan that runs here on up to (rows, width)."""
    record = PlanRecord(FileRecord("p", 1, ""), "k", "tensorrt", precision, "11.4.0.1", ("8.6",), {}, 0.0, 0.0)
    return replace(record, profile={"x": ((1, 4), (1, 8), (rows, width))}, **changes)


def test_the_plan_that_reaches_furthest_is_chosen_of_equals_the_last() -> None:
    small, large = profiled("fp16", 8, 16), profiled("fp16", 8, 64)
    newer = replace(large, key="newer")
    foreign = profiled("fp16", 64, 512, targets=("9.0",))
    manifest = manifest_with((small, large, newer, foreign))
    assert choose_plans(manifest, "tensorrt", "auto", "11.4.0.1", "8.6") == (newer,)
    assert choose_plans(manifest, "tensorrt", "auto", "11.4.0.1", "9.0") == (foreign,)


def test_all_segments_get_one_precision() -> None:
    half, single = profiled("fp16", 8, 16), profiled("fp32", 8, 16)
    assert choose_plans(manifest_with((half, single), (half, single)), "tensorrt", "auto", "11.4.0.1", "8.6") == (
        half,
        half,
    )
    mixed = manifest_with((half, single), (single,))
    assert choose_plans(mixed, "tensorrt", "auto", "11.4.0.1", "8.6") == (single, single)
    with pytest.raises(PlanError, match=r"segment 1: there is no fp16 plan .*--backend tensorrt --precision fp16"):
        choose_plans(mixed, "tensorrt", "fp16", "11.4.0.1", "8.6")


def test_a_plan_that_is_there_but_does_not_run_is_spoken_of_first() -> None:
    with pytest.raises(PlanError, match=r"segment 0: plan was built by TensorRT 11.4.0.1 for SM 8.6, .* SM 9.0"):
        choose_plans(manifest_with((profiled("fp32", 8, 16),)), "tensorrt", "auto", "11.4.0.1", "9.0")


def test_the_dimensions_are_what_all_plans_can_run() -> None:
    plan = profiled("fp16", 8, 300)
    fitted = narrowed(manifest_with((plan,)), (plan,))
    assert fitted.dimensions == {"rows": DimensionSpec(1, 8), "width": DimensionSpec(4, 300)}
    beyond = replace(plan, profile={"x": ((1, 600), (1, 600), (8, 600))})
    with pytest.raises(PlanError, match="no size of width in common"):
        narrowed(manifest_with((beyond,)), (beyond,))
