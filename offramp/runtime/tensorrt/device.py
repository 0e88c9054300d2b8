"""The device seam: what the scheduling of segments asks of CUDA and TensorRT, and no more. Imports neither.

Implemented by `cuda_device` and `loaded_plan` (the real thing), and by `fake_device` and `fake_plan` (numpy, lazy,
watchful). All calls but those that say
"wait" only enqueue. Whoever enqueues sees to the order: operations of one stream follow one another, those of two
streams do not unless one holds for an event of the other, and the host sees nothing before it has waited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from offramp.errors import BackendError

Shape = tuple[int, ...]

# Bytes; of every tensor. TensorRT asks 256 of its scratch memory (IExecutionContext.set_device_memory) and cudaMalloc
# gives as much.
ALIGNMENT = 256


class GraphCaptureError(BackendError):
    """The device could not make a graph of what was enqueued; plain enqueues still work."""


class PlanTensor(NamedTuple):
    """A tensor as a plan knows it; -1 for a dimension that varies."""

    dtype: str  # numpy's name
    shape: Shape
    is_input: bool


class Memory(Protocol):
    """Device memory."""

    @property
    def address(self) -> int:
        """Where it begins, aligned to ALIGNMENT."""

    @property
    def num_bytes(self) -> int:
        """How much there is."""


class PinnedMemory(Protocol):
    """Host memory that the device copies from and to while the host goes on."""

    @property
    def address(self) -> int:
        """Where it begins."""

    @property
    def num_bytes(self) -> int:
        """How much there is."""

    def write(self, offset: int, array: NDArray[Any]) -> None:
        """Put the bytes of `array` at `offset`; no copy from there may be under way."""

    def read(self, offset: int, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        """A copy of what is at `offset`; no copy to there may be under way."""


@dataclass(frozen=True, eq=False, slots=True)
class Stream:
    """Operations that follow one another on the device."""

    name: str
    handle: Any  # the device's own


@dataclass(frozen=True, eq=False, slots=True)
class Event:
    """A point in a stream, set anew by every `record`."""

    name: str
    handle: Any  # the device's own


class Graph(Protocol):
    """Captured operations, replayed as one."""

    def replay(self, stream: Stream) -> None:
        """Enqueue it; only one stream may."""

    def close(self) -> None:
        """Give it back; no replay of it may be under way."""


class Context(Protocol):
    """A plan with input shapes, addresses and scratch memory. For one stream and one thread."""

    def set_shape(self, name: str, shape: Shape) -> None:
        """Set the shape of an input. Raises BackendError outside the plan's profile."""

    def set_address(self, name: str, address: int) -> None:
        """Set where an input or output lies, from the next enqueue on."""

    def shape(self, name: str) -> Shape:
        """The shape of an output for the input shapes set."""

    def max_bytes(self, name: str) -> int:
        """The most that an output can take within the plan's profile; every input has a shape by now."""

    def enqueue(self, stream: Stream) -> None:
        """Run the plan with the shapes and addresses of now."""


class LoadedPlan(Protocol):
    """A deserialized plan; contexts may be made of it by any thread."""

    @property
    def tensors(self) -> Mapping[str, PlanTensor]:
        """Its inputs and outputs by name."""

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory a context needs from us; 0 when contexts see to it themselves."""

    @property
    def has_own_graphs(self) -> bool:
        """Whether it makes CUDA graphs by itself, so that nobody else should."""

    def context(self, scratch: Memory | None) -> Context:
        """A new context, on `scratch` where the plan asks for some. Contexts of one stream may share it."""

    def close(self) -> None:
        """Save what is to be kept and let go; contexts are gone by now."""


class Device(Protocol):
    """One worker's part of a GPU: memory, streams and events that `close` gives back. Every call: BackendError."""

    def allocate(self, num_bytes: int) -> Memory:
        """Device memory, not initialised."""

    def allocate_pinned(self, num_bytes: int) -> PinnedMemory:
        """Pinned host memory, not initialised."""

    def stream(self, name: str) -> Stream:
        """A new stream; the name is for messages."""

    def event(self, name: str) -> Event:
        """A new event; the name is for messages."""

    def upload(self, target: Memory, source: PinnedMemory, span: slice, stream: Stream) -> None:
        """Copy the bytes `span` of `source` to the same place in `target`."""

    def download(self, target: PinnedMemory, source: Memory, span: slice, stream: Stream) -> None:
        """Copy the bytes `span` of `source` to the same place in `target`."""

    def fill(self, target: Memory, value: int, stream: Stream) -> None:
        """Set every byte of `target`."""

    def record(self, event: Event, stream: Stream) -> None:
        """Set `event` to everything enqueued in `stream` so far."""

    def hold(self, stream: Stream, event: Event) -> None:
        """Let what is enqueued in `stream` from now on begin after `event`."""

    def wait(self, event: Event) -> None:
        """Wait, on the host, until `event` has happened."""

    def finish(self) -> None:
        """Wait, on the host, for everything enqueued here."""

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        """Make a graph of what `work` enqueues in `stream`, without running it. Raises GraphCaptureError."""

    def close(self) -> None:
        """Finish, then give everything back. Closing twice is fine."""
