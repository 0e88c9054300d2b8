"""TensorRT plans for the segments and separate heads of a bundle, cached by key. Needs onnx and TensorRT, never torch.

A plan is recorded in the manifest as soon as it is built, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import uses_external_data

from offramp.bundle import (
    Dimension,
    FileRecord,
    HeadSpec,
    Manifest,
    PlanRecord,
    SegmentSpec,
    add_plan,
    file_record,
    load_manifest,
    read_file,
)
from offramp.errors import BuildError, BundleError, CorruptError, OptionError
from offramp.export.attention import expand_attention
from offramp.export.build_progress import OnSegment, ignore_progress
from offramp.export.profile import (
    Profile,
    Range,
    Shapes,
    head_ranges,
    profile_from_ranges,
    ranges_from_shapes,
    segment_ranges,
)
from offramp.export.tensorrt_builder import Backend, BuilderOptions, open_backend, plan_from_onnx

PRECISIONS = ("fp16", "fp32")
_KEY_LENGTH = 16  # hexadecimal digits of the key: a file name that people can compare
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


@dataclass(frozen=True)
class BuildOptions:
    """What to build. Shapes are those of the model's inputs. Raises OptionError."""

    precision: str = "fp16"
    min_shapes: Shapes = field(default_factory=dict)
    opt_shapes: Shapes = field(default_factory=dict)
    max_shapes: Shapes = field(default_factory=dict)
    builder: BuilderOptions = field(default_factory=BuilderOptions)
    force: bool = False  # build even what is there
    dry_run: bool = False  # say what would be built, write nothing

    def __post_init__(self) -> None:
        if self.precision == "int8":
            raise OptionError(
                "--precision int8: INT8 graphs are for ONNX Runtime on CPUs (`offramp run --precision int8`), TensorRT "
                "takes other operators; build with fp16"
            )
        if self.precision not in PRECISIONS:
            raise OptionError(f"--precision {self.precision}: expected one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class SegmentBuild:
    """What was done, or would be, for one segment or head. What only a build tells is 0 before it."""

    segment: int  # its place in Manifest.parts: heads come after the segments
    name: str  # for people: "segment 1", or the name of a head
    action: str  # "build" or "reuse"
    key: str
    path: str  # of the plan, relative to the bundle
    profile: Profile
    fp32_weight_bytes: int  # of the graph, were all its weights FP32: what an FP16 plan should halve
    bytes: int = 0
    fp16_share: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class BuildReport:
    """One `build_engines`: who built for whom, and what became of each segment, then of each head."""

    backend: str
    version: str
    targets: tuple[str, ...]
    precision: str
    dry_run: bool
    segments: tuple[SegmentBuild, ...]


@dataclass(frozen=True)
class _Wanted:
    """What is wanted of every segment."""

    options: BuildOptions
    backend: Backend
    ranges: dict[str, Range]


def build_engines(bundle: Path, options: BuildOptions, on_progress: OnSegment = ignore_progress) -> BuildReport:
    """Build, or find already built, the plan of every segment and head of `bundle` and record it in the manifest.

    `on_progress` is called from the builder's threads. What can be known beforehand is checked for all
    of them before the first build. Raises OptionError, BackendError, BundleError, StorageError, and
    BuildError when TensorRT refuses or Ctrl-C cancels; the plans finished by then are kept.
    """
    manifest = load_manifest(bundle)
    ranges = ranges_from_shapes(manifest, options.min_shapes, options.opt_shapes, options.max_shapes)
    for part in manifest.parts:
        _check_precision(part, options.precision, bundle)
    backend = open_backend(options.builder)
    wanted = _Wanted(options, backend, ranges)
    planned = [_planned_build(bundle, manifest, place, wanted) for place in range(len(manifest.parts))]
    done = tuple(
        build
        if options.dry_run or build.action == "reuse"
        else _build_part(bundle, manifest.parts[build.segment], build, wanted, on_progress)
        for build in planned
    )
    return BuildReport(
        options.builder.backend, backend.version, backend.targets, options.precision, options.dry_run, done
    )


def _called(part: SegmentSpec | HeadSpec) -> str:
    return part.name if isinstance(part, HeadSpec) else f"segment {part.index}"


def _check_precision(part: SegmentSpec | HeadSpec, precision: str, bundle: Path) -> None:
    if precision not in part.graphs:
        raise OptionError(
            f"--precision {precision}: {_called(part)} of {bundle} has only {', '.join(part.graphs)}; "
            f"run `offramp export MODEL -o {bundle} --precision {precision}`"
        )


def _planned_build(bundle: Path, manifest: Manifest, place: int, wanted: _Wanted) -> SegmentBuild:
    """What is to be done for one segment or head: its profile, its key and whether the plan is there already."""
    part = manifest.parts[place]
    record = part.graphs[wanted.options.precision]
    model = _load_graph(bundle, record)
    ranges = head_ranges(manifest, wanted.ranges) if isinstance(part, HeadSpec) else None
    profile = profile_from_ranges(_graph_inputs(model), ranges or segment_ranges(wanted.ranges, place))
    key = _plan_key(record, profile, wanted)
    folder = Path(record.path).parent.as_posix()
    build = SegmentBuild(
        place, _called(part), "build", key, f"{folder}/plans/{key}.plan", profile, _fp32_weight_bytes(model)
    )
    plan = next((plan for plan in part.plans if plan.key == key), None)
    if plan is None or wanted.options.force or not _is_whole(bundle, plan):
        return build
    return replace(build, action="reuse", bytes=plan.file.bytes, fp16_share=plan.fp16_share, seconds=plan.seconds)


def _build_part(
    bundle: Path, part: SegmentSpec | HeadSpec, build: SegmentBuild, wanted: _Wanted, on_progress: OnSegment
) -> SegmentBuild:
    """Build one plan, store it and record it. Raises BuildError, StorageError."""
    precision, backend = wanted.options.precision, wanted.backend
    graph = expand_attention(_load_graph(bundle, part.graphs[precision])).SerializeToString()
    report = functools.partial(on_progress, build.segment)
    try:
        built = plan_from_onnx(graph, build.profile, precision, backend, report)
    except BuildError as exc:
        raise BuildError(f"{build.name}: {exc}") from exc
    plan = PlanRecord(
        file=file_record(build.path, built.content),
        key=build.key,
        backend=backend.options.backend,
        precision=precision,
        version=backend.version,
        targets=backend.targets,
        profile=build.profile,
        fp16_share=built.fp16_share,
        seconds=built.seconds,
    )
    add_plan(bundle, build.segment, plan, built.content)
    return replace(build, bytes=plan.file.bytes, fp16_share=plan.fp16_share, seconds=plan.seconds)


def _plan_key(record: FileRecord, profile: Profile, wanted: _Wanted) -> str:
    """A name for everything that decides what a plan is; never the plan's own hash, which no build repeats.

    The timing cache is left out: it says how long tactics take, not which are allowed.
    """
    builder = dataclasses.asdict(wanted.options.builder)
    del builder["timing_cache"]
    content = {
        "graph": record.sha256,
        "builder": builder,
        "profile": profile,
        "version": wanted.backend.version,
        "targets": wanted.backend.targets,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_KEY_LENGTH]


def _is_whole(bundle: Path, plan: PlanRecord) -> bool:
    try:
        read_file(bundle, plan.file)
    except CorruptError:
        return False
    return True


def _load_graph(bundle: Path, record: FileRecord) -> onnx.ModelProto:
    """The graph of a segment, all of it in one file. Raises BundleError."""
    try:
        model = onnx.load_from_string(read_file(bundle, record))
    except DecodeError as exc:
        raise CorruptError(f"{bundle / record.path} is no ONNX graph: {exc}; export the bundle again") from exc
    outside = [tensor.name for tensor in _weights(model) if uses_external_data(tensor)]
    if outside:
        raise BundleError(
            f"{bundle / record.path} keeps the weight {outside[0]!r} in another file, which no hash "
            "guards; export the bundle again"
        )
    return model


def _graph_inputs(model: onnx.ModelProto) -> dict[str, tuple[Dimension, ...]]:
    """The shapes of a graph's inputs, symbolic dimensions by name."""
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
    }


def _weights(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and constants that are nodes."""
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t


def _fp32_weight_bytes(model: onnx.ModelProto) -> int:
    return sum(4 * math.prod(tensor.dims) for tensor in _weights(model) if tensor.data_type in _FLOATS)
