"""Export of a decoder: cut, lower, verify, write. Segments hand on hidden states only; heads are graphs apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx import ModelProto, TensorProto

from offramp.bundle import (
    HIDDEN,
    POLICY,
    ExitSpec,
    FileRecord,
    HeadSpec,
    Manifest,
    PolicyRecord,
    SegmentSpec,
    StateSpec,
    TextSpec,
    file_record,
)
from offramp.errors import CutError, OptionError
from offramp.export.chain import Chain, open_session
from offramp.export.cut import CutModel, segments_from_graph
from offramp.export.decoder_source import DecoderSource
from offramp.export.export_bundle import (
    WHOLE,
    ExportOptions,
    Progress,
    check_target,
    graph_path,
    tool_versions,
    write_bundle,
)
from offramp.export.graph import weight_share
from offramp.export.lower import fp16_from_segment
from offramp.export.verify import Difference, Lowered, Parity, Tolerance
from offramp.export.verify_decoder import DecoderParts, Given, run_head, verify_decoder
from offramp.policy import Policy

# FP16 rounds every value; residual streams of decoders have a few values a thousand times the others, so: by size.
_FP16_RMS = Tolerance(float("inf"), 0, rms=2e-2)
_STATE_AXIS = 2  # of keys and values (rows, heads, positions, width)


@dataclass(frozen=True)
class _Graphs:
    """The graphs of one precision."""

    segments: Sequence[ModelProto]
    heads: Mapping[str, ModelProto]  # exit -> its head


def export_decoder(
    source: DecoderSource,
    bundle: Path,
    options: ExportOptions = ExportOptions(precision="fp32"),  # noqa: B008  (frozen)
    progress: Progress = lambda _: None,
) -> Manifest:
    """Cut `source` at its exits, verify the segments, and write `bundle` and `bundle`.reference.

    Raises OptionError, CutError, CaptureError, ModelError, ParityError or StorageError; then nothing has been written.
    """
    check_target(bundle)
    check_lowerings(options)
    progress("cutting")
    model = source.model
    cut = segments_from_graph(model.graph, model.exits, model.inputs, model.dimensions, model.example, source.roles)
    _check_carries(cut)
    progress("verifying FP32")
    graphs = {"fp32": _Graphs([segment.model for segment in cut.segments], cut.heads)}
    chain = Chain.open(cut.segments, graphs["fp32"].segments)
    parity = Parity(rows=sum(len(batch[source.decoder.past_length]) for batch in model.calibration))
    feeds = _verify_fp32(parity, source, chain, cut)
    parity.check()
    if "fp16" in options.lowerings:
        graphs["fp16"], parity.lowered["fp16"] = _lowered(cut, chain, feeds, progress)
        parity.check()
    progress("writing")
    whole = model.graph.SerializeToString(deterministic=True)
    contents, manifest = _contents(source, cut, graphs)
    manifest = replace(manifest, reference_sha256=file_record(WHOLE, whole).sha256, parity=parity.figures())
    write_bundle(bundle, manifest, contents, whole, model.calibration)
    return manifest


def check_lowerings(options: ExportOptions) -> None:
    """Raise OptionError for a precision that decoders are not lowered to."""
    if others := sorted({*options.lowerings} - {"fp16"}):
        raise OptionError(f"precision: got {', '.join(others)} for a decoder, expected fp32 or fp16")


def _check_carries(cut: CutModel) -> None:
    """Raise CutError unless every boundary is crossed by one tensor, a vector per position of the chunk."""
    for segment in cut.segments[:-1]:
        shapes = [spec.shape for spec in segment.carry_out]
        if len(shapes) != 1 or len(shapes[0]) != 3 or not isinstance(shapes[0][2], int):
            raise CutError(
                f"segment {segment.index} of the decoder hands on {shapes}; expected one hidden state (rows, chunk, "
                f"width), so that positions can wait at the exit; please report this model"
            )


_Feeds = list[list[Given]]  # per segment, a piece per batch


def _verify_fp32(parity: Parity, source: DecoderSource, chain: Chain, cut: CutModel) -> _Feeds:
    """Compare segments and heads with the whole graph on real inputs; returns what the segments were given."""
    parts = DecoderParts(
        chain,
        [open_session(cut.heads[name]) for name in source.model.exits],
        _exit_specs(source, cut),
        [[spec.name for spec in segment.states] for segment in cut.segments],
        source.decoder,
    )
    whole = open_session(source.model.graph)
    batches = [verify_decoder(parity, parts, whole, batch) for batch in source.model.calibration]
    return [list(pieces) for pieces in zip(*batches, strict=True)]


def _exit_specs(source: DecoderSource, cut: CutModel) -> list[ExitSpec]:
    return [ExitSpec(name, cut.num_classes, **source.roles.row_outputs.get(name, {})) for name in source.model.exits]


def _lowered(cut: CutModel, chain: Chain, feeds: _Feeds, progress: Progress) -> tuple[_Graphs, Lowered]:
    """The FP16 graphs, each compared with FP32 on the same inputs."""
    found = Lowered([Difference() for _ in cut.segments])
    segments: list[ModelProto] = []
    for segment, pieces in zip(cut.segments, feeds, strict=True):
        given = [piece.feed for piece in pieces]
        progress(f"lowering segment {segment.index} to FP16")
        segments.append(fp16_from_segment(segment.model, given))
        lowered = Chain.open(cut.segments[:1], segments[-1:])
        for feed in given:
            expected = chain.run_segment(segment.index, feed)
            for name, value in lowered.run_segment(0, feed).items():
                found.segments[segment.index].update(value, expected[name], _FP16_RMS, f"output {name}")
    progress("lowering the heads to FP16")
    heads: dict[str, ModelProto] = {}
    done: dict[bytes, ModelProto] = {}
    for (name, head), pieces in zip(cut.heads.items(), feeds, strict=True):
        hidden = [piece.hidden for piece in pieces]
        key = head.SerializeToString(deterministic=True)
        if key not in done:
            done[key] = fp16_from_segment(head, [{HIDDEN: states} for states in hidden])
        heads[name] = done[key]
        sessions = open_session(head), open_session(heads[name])
        for states in hidden:
            wanted, got = (run_head(session, states) for session in sessions)
            found.chain.update(got, wanted, _FP16_RMS, f"logits of exit {name}")
            found.predictions_changed += int((got.argmax(axis=1) != wanted.argmax(axis=1)).sum())
    found.weight_share = [weight_share(model, TensorProto.FLOAT16) for model in segments]
    return _Graphs(segments, heads), found


def _contents(source: DecoderSource, cut: CutModel, graphs: Mapping[str, _Graphs]) -> tuple[dict[str, bytes], Manifest]:
    """All files of the bundle but policy and manifest, and the manifest. Heads with the same bytes are one."""
    contents = {POLICY: Policy.full_depth().to_json().encode()}

    def stored(path: str, model: ModelProto) -> FileRecord:
        contents[path] = model.SerializeToString(deterministic=True)
        return file_record(path, contents[path])

    segments = tuple(
        SegmentSpec(
            index=segment.index,
            inputs=segment.inputs,
            carry_in=segment.carry_in,
            carry_out=segment.carry_out,
            graphs={
                precision: stored(graph_path(f"segments/{segment.index:02d}", precision), found.segments[segment.index])
                for precision, found in graphs.items()
            },
            states=tuple(StateSpec(spec, source.roles.states[spec.name], _STATE_AXIS) for spec in segment.states),
        )
        for segment in cut.segments
    )
    heads: dict[bytes, HeadSpec] = {}
    exits = []
    for spec in _exit_specs(source, cut):
        name = spec.name
        key = cut.heads[name].SerializeToString(deterministic=True)
        if key not in heads:
            folder = f"heads/{len(heads):02d}"
            found = {kind: stored(graph_path(folder, kind), some.heads[name]) for kind, some in graphs.items()}
            width = cut.heads[name].graph.input[0].type.tensor_type.shape.dim[1].dim_value
            heads[key] = HeadSpec(f"head_{len(heads)}", width, found)
        exits.append(replace(spec, head=heads[key].name))
    text = None
    if source.tokenizer:
        contents["tokenizer.json"] = source.tokenizer
        limit = source.decoder.max_positions
        text = TextSpec(file_record("tokenizer.json", source.tokenizer), limit, source.decoder.input_ids, "")
    return contents, Manifest(
        name=source.model.name,
        inputs=source.model.inputs,
        dimensions=dict(source.model.dimensions),
        exits=tuple(exits),
        segments=segments,
        policy=PolicyRecord(file_record(POLICY, contents[POLICY]).sha256),
        reference_sha256="",
        text=text,
        tools=tool_versions(),
        heads=tuple(heads.values()),
        decoder=source.decoder,
    )
