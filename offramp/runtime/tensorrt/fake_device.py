"""A GPU that is not there: numpy, lazy, and watchful. For tests of whatever enqueues, ours or yours.

Nothing that is enqueued happens before the host waits for it. Every operation knows, stream by stream, what is certain
to have happened before it (vector clocks). HazardError is raised when two operations that may overlap in time touch
the same bytes and one of them writes, when the host reads or writes pinned memory that a copy may still use, when
bytes are read that nobody wrote, beyond a memory's end, and for what CUDA forbids while it captures. No timing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.tensorrt.device import (
    ALIGNMENT,
    Event,
    Graph,
    GraphCaptureError,
    Memory,
    PinnedMemory,
    Shape,
    Stream,
)

_GARBAGE = 0xA5  # what fresh memory holds
_GAP = 1 << 20  # bytes between two memories: no address just beyond one lies in another
GRAPHS = ("right", "empty", "wrong", "refused")  # what becomes of a capture

Clock = dict[str, int]  # stream -> number of its operations that are certain to be over


class HazardError(Exception):
    """What was enqueued is wrong, or right only by luck. A bug of the caller: nobody should catch it."""


class FakeMemory:
    """Device or pinned memory, with a flag per byte: has it been written?"""

    def __init__(self, device: FakeDevice, name: str, address: int, num_bytes: int) -> None:
        self.device, self.name, self.address, self.num_bytes = device, name, address, num_bytes
        self.content = np.full(num_bytes, _GARBAGE, np.uint8)
        self.is_written = np.zeros(num_bytes, bool)

    def write(self, offset: int, array: NDArray[Any]) -> None:
        """See PinnedMemory.write."""
        access = self.access(slice(offset, offset + array.nbytes), writes=True)
        self.device.check_host(access, "writes")
        access.put(bytes_of(array))

    def read(self, offset: int, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        """See PinnedMemory.read."""
        access = self.access(slice(offset, offset + math.prod(shape) * dtype.itemsize), writes=False)
        self.device.check_host(access, "reads")
        return access.get().view(dtype).reshape(shape)

    def access(self, span: slice, *, writes: bool) -> Access:
        """The bytes `span`; HazardError beyond the end."""
        if not 0 <= span.start <= span.stop <= self.num_bytes:
            raise HazardError(f"bytes {span.start} to {span.stop} of {self.name}, which has {self.num_bytes}")
        return Access(self, span.start, span.stop, writes)


class Access(NamedTuple):
    """Bytes that an operation reads or writes."""

    memory: FakeMemory
    start: int
    stop: int
    writes: bool

    def conflicts(self, other: Access) -> bool:
        """Whether the two must not happen at the same time."""
        is_shared = self.memory is other.memory and self.start < other.stop and other.start < self.stop
        return is_shared and (self.writes or other.writes)

    def get(self) -> NDArray[np.uint8]:
        """A copy of the bytes; HazardError unless all were written."""
        if not self.memory.is_written[self.start : self.stop].all():
            raise HazardError(f"{self} is read, but not all of it was ever written")
        return self.memory.content[self.start : self.stop].copy()

    def put(self, content: NDArray[np.uint8] | int) -> None:
        """Write the bytes."""
        self.memory.content[self.start : self.stop] = content
        self.memory.is_written[self.start : self.stop] = True

    def copy(self, source: Access) -> None:
        """Take over as many bytes; what nobody wrote may travel, as long as nobody looks at it."""
        span, other = slice(self.start, self.stop), slice(source.start, source.stop)
        self.memory.content[span] = source.memory.content[other]
        self.memory.is_written[span] = source.memory.is_written[other]

    def __str__(self) -> str:
        return f"{self.memory.name}[{self.start}:{self.stop}]"


@dataclass(eq=False)
class Operation:
    """Something enqueued: what it touches, what it does when its time comes."""

    label: str
    accesses: Sequence[Access]
    effect: Callable[[], None]
    stream: str = ""
    ticket: int = 0  # it is the ticket-th operation of its stream


@dataclass(eq=False)
class StreamState:
    """What the fake keeps per stream: the handle of a Stream."""

    device: FakeDevice
    name: str
    num_operations: int = 0
    clock: Clock = field(default_factory=dict)


class FakeGraph:
    """See Graph. `conditions` must hold at every replay."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.operations: list[Operation] = []
        self.conditions: list[Callable[[], bool]] = []
        self._last: Clock = {}  # when its last replay is over
        self._is_closed = False

    def replay(self, stream: Stream) -> None:
        """See Graph.replay."""
        self.device.call("replay")
        if self._is_closed or not all(condition() for condition in self.conditions):
            raise HazardError("a graph is replayed after it was closed, or after its context was used otherwise")
        for operation in self.operations if self.device.graphs != "empty" else ():
            self.device.submit(Operation(operation.label, operation.accesses, operation.effect), stream)
            if self.device.graphs == "wrong" and operation.label == "run":
                written = [access for access in operation.accesses if access.writes]
                self.device.submit(Operation("spoil", written, _spoiling(written)), stream)
        self._last = dict(stream.handle.clock)

    def close(self) -> None:
        """See Graph.close."""
        if not self.device.is_over(self._last):
            raise HazardError("a graph is closed while a replay of it may be under way")
        self._is_closed = True


class FakeDevice:
    """See Device. `log` has every call in order; `graphs` is one of GRAPHS."""

    def __init__(self, graphs: str = "right") -> None:
        assert graphs in GRAPHS
        self.graphs = graphs
        self.log: list[str] = []
        self.capturing: tuple[StreamState, FakeGraph] | None = None
        self._host: Clock = {}  # what the host has waited for
        self._memories: list[FakeMemory] = []
        self._pending: list[Operation] = []
        self._streams: list[StreamState] = []
        self._is_closed = False

    def allocate(self, num_bytes: int, kind: str = "device") -> FakeMemory:
        """See Device.allocate."""
        self.call(f"allocate {kind}")
        end = self._memories[-1].address + self._memories[-1].num_bytes if self._memories else 0
        address = -(-(end + _GAP) // ALIGNMENT) * ALIGNMENT
        self._memories.append(FakeMemory(self, f"{kind} memory {len(self._memories)}", address, num_bytes))
        return self._memories[-1]

    def allocate_pinned(self, num_bytes: int) -> FakeMemory:
        """See Device.allocate_pinned."""
        return self.allocate(num_bytes, "pinned")

    def stream(self, name: str) -> Stream:
        """See Device.stream."""
        self._streams.append(StreamState(self, name))
        return Stream(name, self._streams[-1])

    def event(self, name: str) -> Event:
        """See Device.event. The handle is the clock of the last `record`."""
        return Event(name, {})

    def upload(self, target: Memory, source: PinnedMemory, span: slice, stream: Stream) -> None:
        """See Device.upload."""
        self._copy("upload", (target.address, source.address), span, stream)

    def download(self, target: PinnedMemory, source: Memory, span: slice, stream: Stream) -> None:
        """See Device.download."""
        self._copy("download", (target.address, source.address), span, stream)

    def fill(self, target: Memory, value: int, stream: Stream) -> None:
        """See Device.fill."""
        access = self.access_at(target.address, slice(0, target.num_bytes), writes=True)
        self.submit(Operation("fill", [access], lambda: access.put(value)), stream)

    def record(self, event: Event, stream: Stream) -> None:
        """See Device.record."""
        self.call(f"record {event.name} {stream.name}")
        event.handle.clear()
        event.handle.update(stream.handle.clock)

    def hold(self, stream: Stream, event: Event) -> None:
        """See Device.hold."""
        self.call(f"hold {stream.name} {event.name}")
        stream.handle.clock = _later(stream.handle.clock, event.handle)

    def wait(self, event: Event) -> None:
        """See Device.wait."""
        self.call(f"wait {event.name}")
        self._happen(event.handle)

    def finish(self) -> None:
        """See Device.finish."""
        self.call("finish")
        for stream in self._streams:
            self._happen(stream.clock)

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        """See Device.capture."""
        self.call("capture")
        graph = FakeGraph(self)
        self.capturing = stream.handle, graph
        try:
            work()
        finally:
            self.capturing = None
        if self.graphs == "refused":
            raise GraphCaptureError("the fake device refuses to capture")
        return graph

    def close(self) -> None:
        """See Device.close."""
        if not self._is_closed:
            self.finish()
            self._is_closed = True

    def call(self, entry: str, *, is_capturable: bool = False) -> None:
        """Log a call. HazardError on a closed device, or while capturing where CUDA forbids it."""
        if self._is_closed:
            raise HazardError(f"{entry}: the device is closed")
        if self.capturing and not is_capturable:
            raise HazardError(f"{entry}: not while a graph is being captured")
        self.log.append(entry)

    def submit(self, operation: Operation, stream: Stream) -> None:
        """Enqueue an operation. HazardError when it may overlap with another that it must not overlap with."""
        self.call(f"{operation.label} in {stream.name}", is_capturable=True)
        state: StreamState = stream.handle
        if self.capturing and self.capturing[0] is state:
            self.capturing[1].operations.append(operation)
            return
        state.clock = _later(state.clock, self._host)
        for other in self._pending:
            if state.clock.get(other.stream, 0) < other.ticket:
                _check_apart(operation, other)
        state.num_operations += 1
        state.clock[state.name] = state.num_operations
        operation.stream, operation.ticket = state.name, state.num_operations
        self._pending.append(operation)

    def access_at(self, address: int, span: slice, *, writes: bool) -> Access:
        """The bytes `span` from an address on. HazardError unless one memory holds them all."""
        for memory in self._memories:
            offset = address - memory.address
            if 0 <= offset < memory.num_bytes:
                return memory.access(slice(offset + span.start, offset + span.stop), writes=writes)
        raise HazardError(f"no memory at {address:#x}")

    def check_host(self, access: Access, verb: str) -> None:
        """HazardError when the host touches bytes that something enqueued may still use."""
        self.call(f"host {verb}", is_capturable=True)
        for operation in self._pending:
            if any(access.conflicts(other) for other in operation.accesses):
                raise HazardError(f"the host {verb} {access} before it waited for: {operation.label}")

    def is_over(self, clock: Clock) -> bool:
        """Whether the host knows that everything at `clock` has happened."""
        return all(self._host.get(stream, 0) >= ticket for stream, ticket in clock.items())

    def _copy(self, verb: str, addresses: tuple[int, int], span: slice, stream: Stream) -> None:
        written = self.access_at(addresses[0], span, writes=True)
        read = self.access_at(addresses[1], span, writes=False)
        self.submit(Operation(verb, [read, written], lambda: written.copy(read)), stream)

    def _happen(self, clock: Clock) -> None:
        """Let everything happen that is over at `clock`, in the order in which it was enqueued."""
        due = [operation for operation in self._pending if clock.get(operation.stream, 0) >= operation.ticket]
        self._pending = [operation for operation in self._pending if operation not in due]
        self._host = _later(self._host, clock)
        for operation in due:
            operation.effect()


def bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of an array of any type and shape, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _check_apart(operation: Operation, other: Operation) -> None:
    for one, another in itertools.product(operation.accesses, other.accesses):
        if one.conflicts(another):
            raise HazardError(f"{operation.label} and {other.label} may overlap in time, in {one} and {another}")


def _later(one: Clock, other: Clock) -> Clock:
    return {stream: max(one.get(stream, 0), other.get(stream, 0)) for stream in one.keys() | other.keys()}


def _spoiling(accesses: Sequence[Access]) -> Callable[[], None]:
    def effect() -> None:
        for access in accesses:
            content = access.memory.content[access.start : access.stop]
            np.bitwise_xor(content, 1, out=content)

    return effect
