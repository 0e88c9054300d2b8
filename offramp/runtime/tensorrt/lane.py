"""One segment in one worker: its memory, its contexts, its graphs. It enqueues; when to wait is the worker's affair.

Memory is laid out once, for the largest shapes of the plan, so that no address ever changes: what a segment carries
lies where the next one reads it. The temperature comes first and the logits last, so that one copy in and one copy out
move everything but further inputs and not much more than is used.

Rows are padded to a few sizes ("buckets") by repeating rows that are there: rows do not influence one another, so the
padding is computed and never looked at. Powers of two alone would make 33 survivors of 64 cost as much as 64, so above
the first step they are multiples of it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import INVERSE_TEMPERATURE, ROWS, SCORES, SegmentSpec
from offramp.errors import InputError
from offramp.runtime.engine import SegmentOutput
from offramp.runtime.tensorrt.device import (
    ALIGNMENT,
    Context,
    Device,
    Graph,
    LoadedPlan,
    Memory,
    Shape,
    Stream,
)

MAX_GRAPHS = 64  # per lane; a shape beyond them runs plainly. Making room would mean capturing again and again
_MAX_SEEN = 4096  # shapes remembered per lane
_BUCKET_STEP = 8  # rows; one tile of a tensor core has at least as many (CUDA C++ guide, warp matrix functions)
_BLANK = 0xFF  # NaN as float32, -1 as int64: never an answer

Key = tuple[Shape, ...]  # the shapes of a lane's inputs that vary, in the order of `Lane.inputs`


class RowRange(NamedTuple):
    """The fewest and the most rows that a segment, and whoever takes its carry, can run at once."""

    min: int
    max: int


@dataclass(frozen=True)
class PlannedSegment:
    """A segment with the plan that runs it."""

    spec: SegmentSpec
    plan: LoadedPlan
    max_shapes: Mapping[str, Shape]  # of every input, within the plan's profile
    dtypes: Mapping[str, str]  # of every input that comes from the host
    rows: RowRange
    num_classes: int
    row_outputs: tuple[str, ...]  # those of bundle.ROW_OUTPUTS that it puts out

    @property
    def uploads(self) -> tuple[str, ...]:
        """Inputs that come from the host with every run, besides the temperature."""
        return self.spec.inputs if self.spec.index == 0 else (ROWS,)


class _Field(NamedTuple):
    """Where a tensor lies in its block; its first axis varies."""

    name: str
    offset: int
    dtype: np.dtype[Any]
    tail: Shape  # its shape without the first axis

    def end(self, num_rows: int) -> int:
        """The byte after its first `num_rows` rows."""
        return self.offset + num_rows * math.prod(self.tail) * self.dtype.itemsize


class CarryBlock(NamedTuple):
    """Where a segment's carry lies: one tensor after another."""

    memory: Memory
    offsets: tuple[int, ...]


class _Captured(NamedTuple):
    graph: Graph
    context: Context  # it belongs to the graph: any other use would make the graph undefined


class Lane:
    """See the module."""

    def __init__(
        self,
        device: Device,
        segment: PlannedSegment,
        carry_in: CarryBlock | None,
        scratch: Memory | None,
        stream: Stream,
    ) -> None:
        self._device, self._segment, self._scratch, self._stream = device, segment, scratch, stream
        spec = segment.spec
        self.index = spec.index
        self.inputs = (*segment.uploads, *(tensor.name for tensor in spec.carry_in))  # those whose shapes vary
        self._sizes = bucket_sizes(*segment.rows)
        self._uploads, num_bytes = _upload_fields(segment)
        self._staging = device.allocate_pinned(num_bytes)
        self._uploaded = device.allocate(num_bytes)
        self._fields, num_bytes = _answer_fields(segment)
        self._answers = device.allocate(num_bytes)
        self._answers_host = device.allocate_pinned(num_bytes)
        self._addresses = {field.name: self._uploaded.address + field.offset for field in self._uploads}
        self._addresses |= {field.name: self._answers.address + field.offset for field in self._fields}
        if carry_in is not None:
            places = zip(spec.carry_in, carry_in.offsets, strict=True)
            self._addresses |= {tensor.name: carry_in.memory.address + offset for tensor, offset in places}
        self._context = segment.plan.context(scratch)
        self._key: Key = tuple(segment.max_shapes[name] for name in self.inputs)
        _set_shapes(self._context, self.inputs, self._key, ())
        self.carry_out = self._allocate_carry()
        self._set_addresses(self._context)
        self._carry_shapes: dict[Key, tuple[Shape, ...]] = {}  # of every key seen
        self._captured: dict[Key, _Captured] = {}

    def bucket(self, num_rows: int) -> int:
        """The rows that run when `num_rows` are asked for. Raises InputError when they are too many."""
        if num_rows > self._sizes[-1]:
            raise InputError(
                f"segment {self.index}: got {num_rows} rows, its plan runs up to {self._sizes[-1]} at once"
            )
        return self._sizes[bisect.bisect_left(self._sizes, num_rows)]

    def stage(self, arrays: Sequence[NDArray[Any]], temperature: np.float32) -> None:
        """Put the uploads, padded to their bucket, and the temperature into pinned memory."""
        first, *fields = self._uploads
        self._staging.write(first.offset, np.asarray(temperature))
        for field, array in zip(fields, arrays, strict=True):
            size = self.bucket(len(array))
            padded = array if len(array) == size else np.resize(array, (size, *array.shape[1:]))  # repeats rows
            self._staging.write(field.offset, padded)

    def wants_graph(self, key: Key) -> bool:
        """Whether a graph for these shapes would pay: they have come before, and there is room."""
        return key in self._carry_shapes and key not in self._captured and len(self._captured) < MAX_GRAPHS

    def launch(self, key: Key, *, use_graphs: bool, download: bool) -> None:
        """Enqueue what is staged: uploads, the run and, if wanted, the download of the answers."""
        captured = self._captured.get(key) if use_graphs else None
        if captured is not None:
            captured.graph.replay(self._stream)
            return
        before, self._key = self._key, ()  # unknown, should a shape be refused half-way
        _set_shapes(self._context, self.inputs, key, before)
        self._key = key
        if key not in self._carry_shapes:
            if len(self._carry_shapes) >= _MAX_SEEN:
                self._carry_shapes = {old: self._carry_shapes[old] for old in self._captured}
            names = (tensor.name for tensor in self._segment.spec.carry_out)
            self._carry_shapes[key] = tuple(self._context.shape(name) for name in names)
        self._enqueue(self._context, key, download=download)

    def carry_shapes(self, key: Key) -> tuple[Shape, ...]:
        """The shapes of what is carried on from a run with these shapes."""
        return self._carry_shapes[key]

    def warm_context(self, key: Key, *, download: bool) -> Context:
        """A context of its own for a graph, after one plain run of what is staged."""
        context = self._segment.plan.context(self._scratch)
        _set_shapes(context, self.inputs, key, ())
        self._set_addresses(context)
        self._enqueue(context, key, download=download)
        return context

    def capture(self, key: Key, context: Context, *, download: bool) -> Graph:
        """A graph of a launch. Raises GraphCaptureError."""
        return self._device.capture(self._stream, lambda: self._enqueue(context, key, download=download))

    def keep(self, key: Key, graph: Graph, context: Context) -> None:
        """Launch these shapes by replaying `graph` from now on."""
        self._captured[key] = _Captured(graph, context)

    def blank_answers(self) -> None:
        """Overwrite the answers here and there, so that a graph that does nothing is found out."""
        self._answers_host.write(0, np.full(self._answers_host.num_bytes, _BLANK, np.uint8))
        self._device.fill(self._answers, _BLANK, self._stream)

    def download(self, key: Key, stream: Stream) -> None:
        """Enqueue the copy of the answers to pinned memory."""
        num_bytes = self._fields[-1].end(key[0][0])
        self._device.download(self._answers_host, self._answers, slice(0, num_bytes), stream)

    def read_answers(self, num_rows: int) -> SegmentOutput:
        """The answers for the first `num_rows` rows, without a carry; the host has waited for the download."""
        found = {
            field.name: self._answers_host.read(field.offset, (num_rows, *field.tail), field.dtype)
            for field in self._fields
        }
        return SegmentOutput(None, **found)

    def _enqueue(self, context: Context, key: Key, *, download: bool) -> None:
        """Uploads, run, download. The temperature goes with the first of the others."""
        for position, (field, shape) in enumerate(zip(self._uploads[1:], key, strict=False)):
            end = field.offset + math.prod(shape) * field.dtype.itemsize
            span = slice(field.offset if position else 0, end)
            self._device.upload(self._uploaded, self._staging, span, self._stream)
        context.enqueue(self._stream)
        if download:
            self.download(key, self._stream)

    def _set_addresses(self, context: Context) -> None:
        for name, address in self._addresses.items():
            context.set_address(name, address)

    def _allocate_carry(self) -> CarryBlock:
        """Memory for the largest carry; its addresses join the others."""
        offsets, end = [], 0
        for tensor in self._segment.spec.carry_out:
            offsets.append(end)
            end += _aligned(self._context.max_bytes(tensor.name))
        block = CarryBlock(self._device.allocate(max(end, ALIGNMENT)), tuple(offsets))
        for tensor, offset in zip(self._segment.spec.carry_out, offsets, strict=True):
            self._addresses[tensor.name] = block.memory.address + offset
        return block


def bucket_sizes(low: int, high: int) -> tuple[int, ...]:
    """The numbers of rows that are run, ascending: powers of two, then multiples of a step, within [low, high]."""
    step = max(_BUCKET_STEP, -(-high // (16 * _BUCKET_STEP)) * _BUCKET_STEP)  # at most 16 multiples
    sizes = {1 << power for power in range(step.bit_length())} | set(range(step, high, step)) | {high}
    return tuple(sorted({max(size, low) for size in sizes if size <= high}))


def _upload_fields(segment: PlannedSegment) -> tuple[tuple[_Field, ...], int]:
    """Where the temperature and the uploads lie, and the size of their block."""
    fields = [_Field(INVERSE_TEMPERATURE, 0, np.dtype(np.float32), ())]
    end = ALIGNMENT
    for name in segment.uploads:
        shape = segment.max_shapes[name]
        field = _Field(name, end, np.dtype(segment.dtypes[name]), shape[1:])
        fields.append(field)
        end = _aligned(field.end(shape[0]))
    return tuple(fields), end


def _answer_fields(segment: PlannedSegment) -> tuple[tuple[_Field, ...], int]:
    """Where the answers lie, and the size of their block."""
    wanted: list[tuple[str, type[Any], Shape]] = [("scores", np.float32, (len(SCORES),)), ("prediction", np.int64, ())]
    wanted += [(name, np.float32, ()) for name in segment.row_outputs]
    wanted.append(("logits", np.float32, (segment.num_classes,)))
    fields, end = [], 0
    for name, dtype, tail in wanted:
        field = _Field(name, end, np.dtype(dtype), tail)
        fields.append(field)
        end = _aligned(field.end(segment.rows.max))
    return tuple(fields), end


def _set_shapes(context: Context, names: Sequence[str], key: Key, before: Key) -> None:
    """Give a context the shapes `key`, where they differ from those it has."""
    for position, (name, shape) in enumerate(zip(names, key, strict=True)):
        if not before or before[position] != shape:
            context.set_shape(name, shape)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
