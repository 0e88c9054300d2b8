"""What a TensorRT plan says about itself, read without TensorRT and without a GPU. Standard library only.

It answers who built a plan and why it cannot run here; it never deserializes one.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace

from offramp.bundle import ROWS, DimensionSpec, Manifest, PlanRecord
from offramp.errors import PlanError

# Layout of the header: read in trtexec's printPlanVersion, checked on real TensorRT-RTX plans (docs/log.md).
_TAGS = {0x74727466: "tensorrt", 0x74727476: "tensorrt-rtx"}
_HEADER_BYTES = 28
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_REBUILD = "run `offramp build-engine BUNDLE`"
RTX_GPUS = ("7.5", "8.0", "8.6", "8.9", "12.0+")  # not Hopper: its 1.7.1 refuses plans on an H100 (docs/log.md)


@dataclass(frozen=True)
class PlanHeader:
    """Which TensorRT wrote a plan: backend and version, as "1.7.1.116"."""

    backend: str
    version: str


def plan_header(content: bytes) -> PlanHeader:
    """Read the header of a plan. Raises PlanError when `content` is not a plan."""
    if len(content) < _HEADER_BYTES:
        raise PlanError(
            f"reading the header of a plan: got {len(content)} bytes, expected at least {_HEADER_BYTES}; {_REBUILD}"
        )
    (tag,) = struct.unpack_from("<I", content)
    if tag not in _TAGS:
        known = " or ".join(f"{value:#010x} ({_TITLES[name]})" for value, name in _TAGS.items())
        raise PlanError(f"reading the header of a plan: got tag {tag:#010x}, expected {known}; {_REBUILD}")
    return PlanHeader(_TAGS[tag], ".".join(str(part) for part in content[24:_HEADER_BYTES]))


def check_plan_header(content: bytes, plan: PlanRecord) -> None:
    """Raise PlanError when the plan in `content` was written by another TensorRT than its record says."""
    header = plan_header(content)
    if header.backend != plan.backend or not is_same_version(header.version, plan.version):
        raise PlanError(
            f"{plan.file.path} was written by {_TITLES[header.backend]} {header.version}, "
            f"its record says {_TITLES.get(plan.backend, plan.backend)} {plan.version}; "
            f"{_REBUILD[:-1]} --force`"
        )


def is_same_version(header_version: str, version: str) -> bool:
    """Whether a header's version, one byte a part, is `version` (four parts; a trailing "+" is ignored)."""
    return [part % 256 for part in _parts(version)[:4]] == _parts(header_version)


def plan_obstacle(plan: PlanRecord, version: str, sm: str) -> str:
    """Why `plan` cannot run here, with what mends it, or "" when nothing speaks against it.

    `version` is that of the installed module of the plan's backend, "" when it is not installed; `sm` is the
    compute capability of the GPU, "" when there is none. A trailing "+" in the plan's version or targets
    means that one and every later one.
    """
    title = _TITLES.get(plan.backend)
    if title is None:
        return f"plan was built by {plan.backend!r}, which this offramp does not know; {_REBUILD}"
    if not version:
        return f"plan needs {title}, which is not installed; run `pip install 'offramp[{plan.backend}]'`"
    if not sm:
        return f"plan needs an NVIDIA GPU (SM {', '.join(plan.targets)}) and its driver, this machine has none"
    if problem := gpu_obstacle(plan.backend, sm):
        return problem
    fits = _is_within(version, (plan.version,)) and _is_within(sm, plan.targets)
    if not fits:
        return (
            f"plan was built by {title} {plan.version} for SM {', '.join(plan.targets)}, "
            f"this machine has {version} and SM {sm}; {_REBUILD}"
        )
    return ""


def gpu_obstacle(backend: str, sm: str) -> str:
    """Why no plan of `backend` runs on a GPU of compute capability `sm`, with what mends it, or ""."""
    if backend != "tensorrt-rtx" or _is_within(sm, RTX_GPUS):
        return ""
    return (
        f"TensorRT-RTX does not run on GPUs of SM {sm}, only on {', '.join(RTX_GPUS)}; run "
        "`pip install 'offramp[tensorrt]'` and `offramp build-engine BUNDLE --backend tensorrt`"
    )


def _is_within(value: str, allowed: tuple[str, ...]) -> bool:
    """Whether a version is one of `allowed`, or later than one of them that ends in "+"."""
    parts = _parts(value)
    return any(parts >= _parts(one) if one.endswith("+") else parts == _parts(one) for one in allowed)


def _parts(version: str) -> list[int]:
    """A version as numbers that compare in order; a part that is no number counts as 0."""
    return [int(part) if part.isdecimal() else 0 for part in version.rstrip("+").split(".")]


def choose_plans(manifest: Manifest, backend: str, precision: str, version: str, sm: str) -> tuple[PlanRecord, ...]:
    """The plan of every segment that `backend` is to run here, all of one precision. Raises PlanError.

    `precision` "auto" is FP16 where every segment has such a plan that runs here, otherwise FP32. `version` and `sm`
    as for `plan_obstacle`. Of several plans the one whose profile reaches furthest is taken, of equals the last built.
    """
    obstacles: list[str] = []
    for wanted in ("fp16", "fp32") if precision == "auto" else (precision,):
        chosen: list[PlanRecord] = []
        for segment in manifest.segments:
            plans = [plan for plan in segment.plans if plan.backend == backend and plan.precision == wanted]
            reasons = [plan_obstacle(plan, version, sm) for plan in plans]
            fitting = [plan for plan, reason in zip(plans, reasons, strict=True) if not reason]
            if not fitting:
                build = f"`offramp build-engine BUNDLE --backend {backend} --precision {wanted}`"
                missing = f"there is no {wanted} plan for {_TITLES[backend]}; run {build}"
                obstacles.append(f"segment {segment.index}: {reasons[0] if reasons else missing}")
                break
            chosen.append(max(reversed(fitting), key=_reach))
        else:
            return tuple(chosen)
    raise PlanError(next((text for text in obstacles if "there is no" not in text), obstacles[0]))


def narrowed(manifest: Manifest, plans: tuple[PlanRecord, ...]) -> Manifest:
    """The manifest with the dimensions that all `plans`, one per segment, can run. Raises PlanError when none is left.

    A plan may be built for fewer or shorter rows than the bundle was exported for; requests are then split or refused
    by what the plans can do.
    """
    ranges = dict(manifest.dimensions)
    inputs = {spec.name: spec.shape for spec in manifest.inputs} | {ROWS: (ROWS,)}
    for segment, plan in zip(manifest.segments, plans, strict=True):
        shapes = inputs | {tensor.name: (ROWS, *tensor.shape[1:]) for tensor in segment.carry_in}
        for name, bounds in plan.profile.items():
            for axis, dimension in enumerate(shapes.get(name, ())):
                if isinstance(dimension, str) and dimension in ranges:
                    have = ranges[dimension]
                    low = have.min if dimension == ROWS else max(have.min, bounds[0][axis])  # rows can be padded
                    ranges[dimension] = DimensionSpec(low, min(have.max, bounds[-1][axis]))
    empty = [name for name, size in ranges.items() if size.min > size.max]
    if empty:
        raise PlanError(f"the plans of the segments have no size of {', '.join(empty)} in common; {_REBUILD}")
    return replace(manifest, dimensions=ranges)


def _reach(plan: PlanRecord) -> int:
    """The elements of its largest inputs."""
    return sum(math.prod(bounds[-1]) for bounds in plan.profile.values())
