"""The bundle: the directory that export writes and the runtime opens. Standard library only.

The only reader and writer of the format (docs/bundle-format.md). It knows files, not what a graph or an engine is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from offramp.errors import BundleError, CorruptError, VersionError
from offramp.storage import remove_file, write_file
from offramp.typed_json import decoded

# 2 added ExitSpec.learned, Manifest.trims; 3 retention, late inputs, states, heads, decoder; 4 took scores out of heads
SCHEMA = 4
_SCHEMA_OF_HEADS = 4
MANIFEST = "manifest.json"
POLICY = "policy.json"
CERTIFICATE = "certificate.json"
ROWS = "rows"  # dimension name of the row axis, and name of the input with the rows that go on
PREVIOUS_ROWS = "previous_rows"  # leading dimension of a carried tensor as it comes in
INVERSE_TEMPERATURE = "inverse_temperature"
SCORES = ("max_prob", "margin", "entropy")  # columns of the `scores` output, in order
HIDDEN = "hidden"  # the output of a segment whose exit has a separate head, and the input of that head
LEARNED = "learned"  # the output of an exit that has a learned confidence, and the score of that name
RETENTION = "retention"  # the output of an exit that tells which share of a row's tokens is left
ROW_OUTPUTS = (LEARNED, RETENTION)  # what an exit may put out after its scores, in this order: one number per row

Dimension = int | str


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a segment's interface: numpy dtype name and shape, symbolic dimensions by name."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


@dataclass(frozen=True)
class InputSpec:
    """A model input, with the closed range of its integer values; a mask has at least one 1 per row."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]
    minimum: int | None
    maximum: int | None
    is_mask: bool


@dataclass(frozen=True)
class DimensionSpec:
    """Closed range of a symbolic dimension."""

    min: int
    max: int


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle: relative path with forward slashes, size and SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PlanRecord:
    """A TensorRT plan of one segment and everything that decides whether it can run somewhere."""

    file: FileRecord
    key: str
    backend: str
    precision: str
    version: str
    targets: tuple[str, ...]
    profile: dict[str, tuple[tuple[int, ...], ...]]  # input name -> (min, opt, max) shapes
    fp16_share: float  # of the layers of the parsed network, those that compute in FP16
    seconds: float


@dataclass(frozen=True)
class ExitSpec:
    """One exit, in order of depth; the last one is the final exit."""

    name: str
    num_classes: int
    learned: str = ""  # output of the whole graph with its learned confidence; empty: it has none
    retention: str = ""  # output of the whole graph with its token retention; empty: it has none
    head: str = ""  # name of its separate head; empty: the head is in the segment

    @property
    def row_outputs(self) -> dict[str, str]:
        """Those of ROW_OUTPUTS that it has, in their order, with their names in the whole graph."""
        return {name: found for name in ROW_OUTPUTS if (found := getattr(self, name))}


@dataclass(frozen=True)
class StateSpec:
    """What a segment makes for its later calls, to be appended along `axis` to what it is given as `past`."""

    tensor: TensorSpec
    past: str  # a late input
    axis: int


@dataclass(frozen=True)
class SegmentSpec:
    """The interface and the files of one segment (DESIGN: segment contract)."""

    index: int
    inputs: tuple[str, ...]  # model inputs read here: all of them in segment 0, late inputs afterwards
    carry_in: tuple[TensorSpec, ...]
    carry_out: tuple[TensorSpec, ...]
    graphs: dict[str, FileRecord]  # precision -> ONNX graph
    plans: tuple[PlanRecord, ...] = ()
    states: tuple[StateSpec, ...] = ()


@dataclass(frozen=True)
class HeadSpec:
    """A head that is a graph of its own: `hidden` (rows, width), a position each, to `logits` (rows, classes)."""

    name: str
    width: int
    graphs: dict[str, FileRecord]  # precision -> ONNX graph
    plans: tuple[PlanRecord, ...] = ()


@dataclass(frozen=True)
class DecoderSpec:
    """How a decoder's inputs are called, and what ends a text. Keys and values are the segments' states."""

    input_ids: str  # (rows, chunk)
    past_length: str  # (rows,): positions of the past that are there
    active: tuple[str, ...]  # per segment after the first, (rows, ·): positions of the chunk that go on
    chunk: str  # dimension name of the new positions
    past: str  # dimension name of the past ones
    max_positions: int
    stop_tokens: tuple[int, ...] = ()
    router_threshold: str = ""  # (rows, layers): an FFN runs where its router's score is at least this
    capacities: dict[str, tuple[float, ...]] = field(default_factory=dict)  # share of FFNs that run -> thresholds


@dataclass(frozen=True)
class TextSpec:
    """How to turn text into the model's inputs."""

    tokenizer: FileRecord
    max_length: int
    ids: str
    mask: str


@dataclass(frozen=True)
class PolicyRecord:
    """`policy.json` by its hash; `pending` is accepted too while an update is under way."""

    sha256: str
    pending: str = ""


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle but the contents of its files."""

    name: str
    inputs: tuple[InputSpec, ...]
    dimensions: dict[str, DimensionSpec]
    exits: tuple[ExitSpec, ...]
    segments: tuple[SegmentSpec, ...]
    policy: PolicyRecord
    reference_sha256: str  # of whole.onnx in BUNDLE.reference
    labels: tuple[str, ...] = ()
    text: TextSpec | None = None
    tools: dict[str, str] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    trims: dict[str, str] = field(default_factory=dict)  # precision -> dimension: its padding may be cut off
    heads: tuple[HeadSpec, ...] = ()  # separate ones, each perhaps of several exits
    decoder: DecoderSpec | None = None  # for a model that generates
    schema: int = SCHEMA

    @property
    def is_regression(self) -> bool:
        """Are the answers values and not classes?"""
        return self.exits[-1].num_classes == 1

    @property
    def parts(self) -> tuple[SegmentSpec | HeadSpec, ...]:
        """All that is a graph of its own: the segments, then the separate heads."""
        return (*self.segments, *self.heads)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the graphs of all segments: what a policy or a trace was made for."""
        digest = hashlib.sha256()
        parts = [("", segment.graphs) for segment in self.segments] + [("head ", head.graphs) for head in self.heads]
        for kind, graphs in parts:
            for precision in sorted(graphs):
                digest.update(f"{kind}{precision}:{graphs[precision].sha256}\n".encode())
        return digest.hexdigest()


def load_manifest(bundle: Path) -> Manifest:
    """Read and check the manifest of `bundle`.

    Raises BundleError when it is not a bundle, VersionError when a newer offramp wrote it, or an older one a decoder,
    CorruptError when it is malformed.
    """
    path = bundle / MANIFEST
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BundleError(
            f"{bundle} is not a bundle: it has no {MANIFEST}; make one with `offramp export MODEL -o {bundle}`"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
        raise CorruptError(f"reading {path}: {exc}; export the bundle again or restore it") from exc
    schema = document.get("schema") if isinstance(document, dict) else None
    if type(schema) is not int or schema < 1:
        raise CorruptError(f"{path} has no positive integer `schema`; export the bundle again or restore it")
    if schema > SCHEMA:
        raise VersionError(
            f"{path} has schema {schema}, this offramp reads up to {SCHEMA}; upgrade with `pip install -U offramp`"
        )
    manifest: Manifest = decoded(Manifest, document, str(path))
    if manifest.heads and schema < _SCHEMA_OF_HEADS:
        raise VersionError(f"{path} has schema {schema}, whose heads were other graphs; export the bundle again")
    _check_consistent(manifest, path)
    return manifest


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as UTF-8 JSON in this version's schema, byte for byte the same for equal manifests."""
    manifest = replace(manifest, schema=SCHEMA)
    return (json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True) + "\n").encode()


def save_manifest(bundle: Path, manifest: Manifest) -> None:
    """Replace the manifest of `bundle` atomically. Raises StorageError."""
    write_file(bundle / MANIFEST, manifest_bytes(manifest))


def file_record(path: str, content: bytes) -> FileRecord:
    """The record of `content` stored under `path`, relative to the bundle."""
    return FileRecord(path, len(content), hashlib.sha256(content).hexdigest())


def read_file(bundle: Path, record: FileRecord) -> bytes:
    """The content of a file of the bundle, returned only when size and hash are right. Raises CorruptError."""
    pure = PurePosixPath(record.path)
    if pure.is_absolute() or ".." in pure.parts:
        raise CorruptError(f"{bundle / MANIFEST} names {record.path!r}, which is outside the bundle")
    content = _read(bundle / pure)
    if len(content) != record.bytes or hashlib.sha256(content).hexdigest() != record.sha256:
        raise CorruptError(
            f"{bundle / pure} is not the file that was exported: got {len(content)} bytes, expected "
            f"{record.bytes} with SHA-256 {record.sha256[:12]}…; export the bundle again or restore it"
        )
    return content


def read_policy(bundle: Path, manifest: Manifest) -> bytes:
    """The bytes of `policy.json`, checked against the manifest. Raises CorruptError."""
    content = _read(bundle / POLICY)
    if hashlib.sha256(content).hexdigest() not in (manifest.policy.sha256, manifest.policy.pending):
        raise CorruptError(
            f"{bundle / POLICY} was altered after calibration: its SHA-256 is not the manifest's; "
            f"run `offramp calibrate {bundle}`, or pass a policy of your own"
        )
    return content


def read_certificate(bundle: Path) -> bytes:
    """The bytes of `certificate.json`, which names by their hashes what it holds for; b"" without one."""
    try:
        return (bundle / CERTIFICATE).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as exc:
        raise CorruptError(f"reading {bundle / CERTIFICATE}: {exc}; run `offramp calibrate {bundle}` again") from exc


def replace_policy(bundle: Path, content: bytes, certificate: bytes = b"") -> None:
    """Replace `policy.json`, and `certificate.json` by the one of the new policy, or by none.

    At every moment the manifest accepts the policy that is on disk: it first accepts both the old and the new hash,
    then the file is swapped, then it accepts only the new one. The certificate follows: an interruption before that
    leaves one that names another policy, which is as good as none. Raises StorageError.
    """
    manifest = load_manifest(bundle)
    sha256 = hashlib.sha256(content).hexdigest()
    current = hashlib.sha256(read_policy(bundle, manifest)).hexdigest()
    save_manifest(bundle, replace(manifest, policy=PolicyRecord(current, sha256)))
    write_file(bundle / POLICY, content)
    save_manifest(bundle, replace(manifest, policy=PolicyRecord(sha256)))
    if certificate:
        write_file(bundle / CERTIFICATE, certificate)
    else:
        remove_file(bundle / CERTIFICATE)


def add_plan(bundle: Path, index: int, plan: PlanRecord, content: bytes) -> Manifest:
    """Store a plan for part `index` of `Manifest.parts` and record it, in place of one with the same key.

    A plan that is replaced is struck off the manifest before its file changes, so that the manifest never names
    a file with another content. Raises StorageError.
    """
    manifest = load_manifest(bundle)
    part = manifest.parts[index]
    kept = tuple(old for old in part.plans if old.key != plan.key)
    is_new = len(kept) == len(part.plans)
    if not is_new:
        save_manifest(bundle, _with_plans(manifest, index, kept))
    path = bundle / plan.file.path
    try:
        write_file(path, content)
    except BaseException:
        if not is_new:
            save_manifest(bundle, manifest)
        raise
    updated = _with_plans(manifest, index, (*kept, plan))
    try:
        save_manifest(bundle, updated)
    except BaseException:
        remove_file(path)
        raise
    return updated


def _with_plans(manifest: Manifest, index: int, plans: tuple[PlanRecord, ...]) -> Manifest:
    def changed(parts: tuple[Any, ...], first: int) -> tuple[Any, ...]:
        return tuple(replace(part, plans=plans) if n == index else part for n, part in enumerate(parts, first))

    segments = manifest.segments
    return replace(manifest, segments=changed(segments, 0), heads=changed(manifest.heads, len(segments)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing; export the bundle again or restore it") from None
    except OSError as exc:
        raise CorruptError(f"reading {path}: {exc}; export the bundle again or restore it") from exc


def _check_consistent(manifest: Manifest, path: Path) -> None:
    """Raise CorruptError when parts of the manifest contradict each other."""
    segments = manifest.segments
    if not segments or len(segments) != len(manifest.exits):
        raise CorruptError(
            f"{path} has {len(segments)} segments and {len(manifest.exits)} exits; expected as many, at least 1"
        )
    names = {spec.name for spec in manifest.inputs}
    for dimension in manifest.trims.values():
        masks = [spec for spec in manifest.inputs if spec.is_mask and spec.shape[1:] == (dimension,)]
        if len(masks) != 1 or dimension not in manifest.dimensions:
            raise CorruptError(f"{path}: {dimension!r} cannot be trimmed without a mask over it; export it again")
    for position, segment in enumerate(segments):
        before = segments[position - 1].carry_out if position else ()
        same = len(before) == len(segment.carry_in)
        if segment.index != position or not same or not names.issuperset(segment.inputs):
            raise CorruptError(f"{path}: segment {position} does not fit the one before it; export the bundle again")
    has_pasts = all(state.past in segment.inputs for segment in segments for state in segment.states)
    if not has_pasts or not {spec.head for spec in manifest.exits} <= {"", *(head.name for head in manifest.heads)}:
        raise CorruptError(f"{path}: a state or an exit names what is not there; export the bundle again")
