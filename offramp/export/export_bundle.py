"""Export: cut, lower, verify, and write the bundle, whole or not at all."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from offramp.bundle import (
    INVERSE_TEMPERATURE,
    MANIFEST,
    POLICY,
    ROWS,
    DimensionSpec,
    ExitSpec,
    FileRecord,
    Manifest,
    PolicyRecord,
    SegmentSpec,
    TextSpec,
    file_record,
    manifest_bytes,
)
from offramp.errors import CaptureError, CutError, OptionError, StorageError
from offramp.export.attention import fused_from_segment
from offramp.export.chain import Arrays, Chain
from offramp.export.cut import CutModel, segments_from_graph
from offramp.export.graph import GraphView, weight_share
from offramp.export.lower import fp16_from_segment
from offramp.export.probe import run_tensors
from offramp.export.quantize import int8_from_segment
from offramp.export.roles import Roles
from offramp.export.sizes import resize_inputs
from offramp.export.source import ModelSource
from offramp.export.trim import verified_trims
from offramp.export.verify import INT8_TOLERANCE, Parity, Tolerance, verify_fp32, verify_lowered
from offramp.policy import Policy
from offramp.storage import staged_directory

PRECISIONS = ("fp32", "fp16", "int8")
WHOLE = "whole.onnx"  # in the reference: the graph that was cut
INPUTS = "inputs.npz"  # beside it: real inputs to verify with
CALIBRATION = "calibration.npz"  # and all batches that calibrated and verified it, to cut it again: NUMBER/INPUT
# Tools whose version decides the bytes of a graph.
_TOOLS = ("offramp", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "nvidia-modelopt")
_VERIFIED_BATCHES = 16
_KEPT_BYTES = 64 * 2**20  # of calibration batches; token ids take far less, images may not

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """How to lower and how closely to verify: FP16 may differ by `atol` + `rtol` x the FP32 value.

    Raises OptionError for a precision that does not exist or a tolerance that is not positive.
    """

    precision: str = "fp16"  # one or several with commas between; FP32 graphs are written always
    atol: float = 2e-2
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        if not set(self.precision.split(",")) <= set(PRECISIONS):
            raise OptionError(
                f"precision: got {self.precision!r}, expected {', '.join(PRECISIONS)}, or several: fp16,int8"
            )
        if not (self.atol > 0 and self.rtol > 0):
            raise OptionError(f"tolerances: got atol {self.atol}, rtol {self.rtol}; expected positive numbers")

    @property
    def lowerings(self) -> dict[str, Tolerance]:
        """The precisions below FP32 that are asked for, and how much each may differ."""
        tolerances = {"fp16": Tolerance(self.atol, self.rtol), "int8": INT8_TOLERANCE}
        return {name: tolerances[name] for name in tolerances if name in self.precision.split(",")}


@dataclass(frozen=True)
class Extras:
    """What goes into a bundle beside the model: a policy, and files below reports/ by name."""

    policy: Policy = field(default_factory=Policy.full_depth)
    reports: Mapping[str, bytes] = field(default_factory=dict)


def export_bundle(
    source: ModelSource,
    bundle: Path,
    options: ExportOptions = ExportOptions(),
    progress: Progress = lambda _: None,
    extras: Extras = Extras(),
) -> Manifest:
    """Cut `source` at its exits, lower and verify the segments, and write `bundle` and `bundle`.reference.

    The same source gives the same bytes. Raises CutError, CaptureError, ModelError, ParityError or StorageError;
    then nothing has been written.
    """
    check_target(bundle)
    progress("cutting")
    roles = Roles(source.row_outputs, source.late)
    cut = segments_from_graph(source.graph, source.exits, source.inputs, source.dimensions, source.example, roles)
    dimensions = _ranges(source, cut)
    batches = source.calibration[:_VERIFIED_BATCHES]
    progress("verifying FP32")
    models, fp32, parity = _verified_fp32(source, cut, batches, progress)
    parity.check()
    graphs, chains = {"fp32": models}, {"fp32": fp32}
    feeds = _feeds(fp32, batches) if options.lowerings else []
    for precision, tolerance in options.lowerings.items():
        graphs[precision], shares, notes = _LOWERINGS[precision](cut, feeds, progress)
        progress(f"verifying {precision.upper()}")
        chains[precision] = Chain.open(cut.segments, graphs[precision])
        found = verify_lowered(fp32, chains[precision], batches, tolerance)
        parity.lowered[precision] = replace(found, weight_share=shares, notes=notes)
        parity.check()
    progress("verifying without padding")
    trims, parity.trimming = verified_trims(chains, source.inputs, dimensions, batches)
    progress("writing")
    files = _graph_files(graphs)
    whole = source.graph.SerializeToString(deterministic=True)
    manifest = _manifest(source, cut, dimensions, files, parity, file_record(WHOLE, whole))
    policy = PolicyRecord(file_record(POLICY, extras.policy.to_json().encode()).sha256)
    manifest = replace(manifest, trims=trims, policy=policy)
    _write(bundle, manifest, source, files, whole, extras)
    return manifest


def reference_path(bundle: Path) -> Path:
    """The directory beside the bundle that holds the whole graph and does not ship."""
    return bundle.with_name(bundle.name + ".reference")


def check_target(bundle: Path) -> None:
    """Raise StorageError when `bundle` or its reference is something that an export must not replace."""
    for path, mark, kind in ((bundle, MANIFEST, "a bundle"), (reference_path(bundle), WHOLE, "a reference")):
        if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / mark).is_file()):
            raise StorageError(f"{path} exists and is not {kind}; choose another output directory or remove it")


def _verified_fp32(
    source: ModelSource, cut: CutModel, batches: Sequence[Arrays], progress: Progress
) -> tuple[list[ModelProto], Chain, Parity]:
    """The graphs for ONNX Runtime: with attention fused, unless bits of the whole graph are lost by that alone."""
    plain = [segment.model for segment in cut.segments]
    fused = [fused_from_segment(model) for model in plain]
    with_fused = _verify(source, cut, fused, batches)
    if with_fused[1].is_bit_equal or all(one is other for one, other in zip(fused, plain, strict=True)):
        return fused, *with_fused
    without = _verify(source, cut, plain, batches)
    if without[1].is_bit_equal or with_fused[1].failures():
        progress("attention stays in standard operators: as one operator it gives other bits than the whole graph")
        return plain, *without
    return fused, *with_fused


def _verify(
    source: ModelSource, cut: CutModel, models: list[ModelProto], batches: Sequence[Arrays]
) -> tuple[Chain, Parity]:
    chain, parity = Chain.open(cut.segments, models), Parity()
    verify_fp32(parity, chain, source.graph, _exit_specs(source, cut), batches)
    return chain, parity


def _feeds(fp32: Chain, batches: Sequence[Arrays]) -> list[list[Arrays]]:
    """Per segment, what the FP32 segments before it really hand over: what it is calibrated on."""
    feeds: list[list[Arrays]] = [[] for _ in fp32.segments]
    one = np.array(1, np.float32)
    for batch in batches:
        for index, (feed, _) in enumerate(fp32.run(batch)):
            feeds[index].append({**feed, INVERSE_TEMPERATURE: one})
    return feeds


_Found = tuple[list[ModelProto], list[float], list[dict[str, str]]]  # graphs, lowered shares of weights, notes


def _fp16(cut: CutModel, feeds: Sequence[Sequence[Arrays]], progress: Progress) -> _Found:
    lowered = []
    for segment in cut.segments:
        progress(f"lowering segment {segment.index} to FP16")
        lowered.append(fp16_from_segment(segment.model, feeds[segment.index]))
    return lowered, [weight_share(model, TensorProto.FLOAT16) for model in lowered], []


def _int8(cut: CutModel, feeds: Sequence[Sequence[Arrays]], progress: Progress) -> _Found:
    lowered = []
    for segment in cut.segments:
        progress(f"lowering segment {segment.index} to INT8")
        lowered.append(int8_from_segment(segment.model, feeds[segment.index], progress))
    models = [found.model for found in lowered]
    return models, [weight_share(model, TensorProto.INT8) for model in models], [found.unusual for found in lowered]


_LOWERINGS = {"fp16": _fp16, "int8": _int8}


def _ranges(source: ModelSource, cut: CutModel) -> dict[str, DimensionSpec]:
    """Ranges of all dimensions, those that only carried tensors have found by running at both ends.

    Raises CaptureError when the graph does not run at the ends of the ranges it declares.
    """
    view = GraphView(source.graph)
    run = run_tensors(view, sorted({tensor for tensor, _ in cut.derived.values()}) or list(source.exits))
    found: dict[str, list[int]] = {symbol: [] for symbol in cut.derived}
    for end in ("min", "max"):
        size = {symbol: getattr(limits, end) for symbol, limits in source.dimensions.items()} | {ROWS: 2}
        try:
            values = run(resize_inputs(source.inputs, source.example, size))
        except CutError as exc:
            raise CaptureError(
                f"the graph does not run at the {end} of its declared ranges, {size}: {exc}; declare a narrower range "
                f"(for an ONNX file: `--dimension NAME=MIN:MAX`)"
            ) from exc
        for symbol, (tensor, axis) in cut.derived.items():
            found[symbol].append(np.shape(values[tensor])[axis])
    derived = {symbol: DimensionSpec(min(lengths), max(lengths)) for symbol, lengths in found.items()}
    return dict(source.dimensions) | derived


def _graph_files(graphs: Mapping[str, Sequence[ModelProto]]) -> dict[str, list[tuple[FileRecord, bytes]]]:
    files: dict[str, list[tuple[FileRecord, bytes]]] = {}
    for precision, models in graphs.items():
        contents = [model.SerializeToString(deterministic=True) for model in models]
        files[precision] = [
            (file_record(graph_path(f"segments/{index:02d}", precision), content), content)
            for index, content in enumerate(contents)
        ]
    return files


def graph_path(folder: str, precision: str) -> str:
    """Where the bundle has the graph of a segment or head."""
    return f"{folder}/model.onnx" if precision == "fp32" else f"{folder}/model.{precision}.onnx"


def _manifest(
    source: ModelSource,
    cut: CutModel,
    dimensions: dict[str, DimensionSpec],
    files: Mapping[str, Sequence[tuple[FileRecord, bytes]]],
    parity: Parity,
    reference: FileRecord,
) -> Manifest:
    segments = tuple(
        SegmentSpec(
            index=segment.index,
            inputs=segment.inputs,
            carry_in=segment.carry_in,
            carry_out=segment.carry_out,
            graphs={precision: records[segment.index][0] for precision, records in files.items()},
        )
        for segment in cut.segments
    )
    text = None
    if source.text:
        tokenizer = file_record("tokenizer.json", source.text.tokenizer)
        text = TextSpec(tokenizer, source.text.max_length, source.text.ids, source.text.mask)
    return Manifest(
        name=source.name,
        inputs=source.inputs,
        dimensions=dimensions,
        exits=_exit_specs(source, cut),
        segments=segments,
        policy=PolicyRecord(""),  # the caller's
        reference_sha256=reference.sha256,
        labels=source.labels,
        text=text,
        tools=tool_versions(),
        parity=parity.figures(),
    )


def _exit_specs(source: ModelSource, cut: CutModel) -> tuple[ExitSpec, ...]:
    return tuple(ExitSpec(name, cut.num_classes, **source.row_outputs.get(name, {})) for name in source.exits)


def tool_versions() -> dict[str, str]:
    versions = {}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _write(
    bundle: Path,
    manifest: Manifest,
    source: ModelSource,
    files: Mapping[str, Sequence[tuple[FileRecord, bytes]]],
    whole: bytes,
    extras: Extras,
) -> None:
    contents = {record.path: content for records in files.values() for record, content in records}
    if source.text:
        contents["tokenizer.json"] = source.text.tokenizer
    contents[POLICY] = extras.policy.to_json().encode()
    contents |= {f"reports/{name}": content for name, content in extras.reports.items()}
    write_bundle(bundle, manifest, contents, whole, source.calibration)


def write_bundle(
    bundle: Path, manifest: Manifest, contents: Mapping[str, bytes], whole: bytes, batches: Sequence[Arrays]
) -> None:
    """Write bundle and reference, then move the bundle into place, then the reference; nothing moves before.

    `contents` maps paths in the bundle to bytes, the manifest apart. Raises StorageError.
    """
    with staged_directory(reference_path(bundle)) as beside, staged_directory(bundle) as staging:
        (beside / WHOLE).write_bytes(whole)
        np.savez(beside / INPUTS, allow_pickle=False, **batches[0])
        _save_calibration(beside / CALIBRATION, batches)
        for name, content in {**contents, MANIFEST: manifest_bytes(manifest)}.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)


def _save_calibration(path: Path, batches: Sequence[Arrays]) -> None:
    """The batches that are verified with, as many as are not too large to keep."""
    kept: dict[str, NDArray[np.generic]] = {}
    num_bytes = 0
    for index, batch in enumerate(batches[:_VERIFIED_BATCHES]):
        num_bytes += sum(array.nbytes for array in batch.values())
        if index and num_bytes > _KEPT_BYTES:
            break
        kept |= {f"{index:02d}/{name}": array for name, array in batch.items()}
    np.savez(path, allow_pickle=False, **kept)
