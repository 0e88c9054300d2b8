"""One worker: a lane per segment, on one stream. It decides what is enqueued when, and what the host waits for.

Within a request nothing but the answers comes back to the host, and it waits for nothing else. Two things go beyond
"enqueue, download, wait":

* Graphs. Shapes that come a second time are captured into a CUDA graph, on a context of their own after one plain run;
  the first replay must answer as the plain run did (a capture gone wrong can be an empty graph, without an error).
  Where it does not, graphs are given up, with a warning, and the plain answer counts.
* Speculation. Segment k+1 is enqueued for all rows of segment k while the answers of k travel, on a stream of their
  own. If then all rows go on, its work is under way already; if not, it was for nothing and is run again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.errors import BackendError
from offramp.runtime.engine import SegmentOutput
from offramp.runtime.tensorrt.device import Device, Graph, Shape
from offramp.runtime.tensorrt.lane import Key, Lane, PlannedSegment

# A replay runs the same kernels on the same inputs; where one of them adds in another order each time (atomics), FP16
# sums differ in the last bits. Not measured: no plan has run on a GPU yet.
REPLAY_TOLERANCE = 1e-3


class GraphWarning(UserWarning):
    """CUDA graphs do not work here; segments are enqueued one kernel at a time instead."""


@dataclass
class GraphSwitch:
    """Whether graphs are used; shared by the workers of a bundle, so that giving up is said once."""

    is_on: bool

    def give_up(self, reason: str) -> None:
        """Use no graphs from now on."""
        if self.is_on:
            self.is_on = False
            warnings.warn(f"CUDA graphs are given up: {reason}; segments run without them", GraphWarning, stacklevel=2)


@dataclass(frozen=True, eq=False, slots=True)
class Carry:
    """What segment `index` left on the device; valid until that segment runs again in the same worker."""

    worker: Worker
    index: int
    generation: int
    shapes: tuple[Shape, ...] = field(repr=False)
    num_rows: int


class _Guess(NamedTuple):
    """A run of a segment that was enqueued before anybody asked for it."""

    segment: int
    generation: int  # of the segment before
    temperature: np.float32
    num_rows: int
    key: Key
    wants_graph: bool


class Worker:
    """See the module. For one thread."""

    def __init__(
        self, device: Device, segments: Sequence[PlannedSegment], switch: GraphSwitch, *, speculates: bool
    ) -> None:
        self._device, self._switch = device, switch
        self._compute = device.stream("compute")
        self._copies = device.stream("copies") if speculates else None
        needed = max(segment.plan.scratch_bytes for segment in segments)
        scratch = device.allocate(needed) if needed else None  # one for all: they run one after another
        self._lanes: list[Lane] = []
        for segment in segments:
            before = self._lanes[-1].carry_out if self._lanes else None
            self._lanes.append(Lane(device, segment, before, scratch, self._compute))
        self._computed, self._answered = device.event("computed"), device.event("answered")
        self._staged = [device.event("staged") for _ in segments]
        self._in_flight = [False] * len(segments)  # the pinned uploads of a lane may still be read
        self._generations = [0] * len(segments)
        self._temperatures = [np.float32(1)] * len(segments)  # of the last run: the guess for the next
        self._guess: _Guess | None = None

    def run(self, index: int, carry: Any, rows: NDArray[np.int64], temperature: np.float32) -> SegmentOutput:
        """Run segment `index` on `rows` of `carry`; see Engine.run. Raises BackendError for a carry gone stale."""
        if index:
            self._check_carry(index, carry, rows)
        try:
            return self._run(index, carry, rows, temperature)
        except BaseException:
            self._recover()
            raise

    def close(self) -> None:
        """Wait for what is under way and give everything back."""
        self._device.close()

    def _run(self, index: int, carry: Any, rows: NDArray[np.int64], temperature: np.float32) -> SegmentOutput:
        lane, num_rows = self._lanes[index], len(rows)
        guess, self._guess = self._guess, None
        if guess is not None and _is_right(guess, index, carry, rows, temperature):
            key, wants_graph = guess.key, guess.wants_graph
        else:
            key, arrays = _request(lane, carry, rows)
            wants_graph = self._launch(index, key, arrays, temperature)
        self._temperatures[index] = temperature
        self._send_answers(lane, key)
        if self._copies is not None and not wants_graph and index + 1 < len(self._lanes):
            self._speculate(index, key, num_rows)
        self._device.wait(self._answered)
        self._in_flight[index] = False
        answers = lane.read_answers(num_rows)
        if wants_graph:
            self._prove(lane, key, answers)
        carried = Carry(self, index, self._generations[index], lane.carry_shapes(key), num_rows)
        return answers._replace(carry=carried)

    def _launch(self, index: int, key: Key, arrays: Sequence[NDArray[Any]], temperature: np.float32) -> bool:
        """Stage and enqueue a segment; whether its shapes are due for a graph."""
        lane = self._lanes[index]
        if self._in_flight[index]:
            self._device.wait(self._staged[index])
        wants_graph = self._switch.is_on and lane.wants_graph(key)
        lane.stage(arrays, temperature)
        self._generations[index] += 1
        lane.launch(key, use_graphs=self._switch.is_on, download=self._copies is None)
        return wants_graph

    def _send_answers(self, lane: Lane, key: Key) -> None:
        """See to it that `_answered` happens when the answers are in pinned memory."""
        if self._copies is None:  # the launch has enqueued the download
            self._device.record(self._answered, self._compute)
            return
        self._device.record(self._computed, self._compute)
        self._device.hold(self._copies, self._computed)
        lane.download(key, self._copies)
        self._device.record(self._answered, self._copies)

    def _speculate(self, index: int, key: Key, num_rows: int) -> None:
        """Enqueue the segment after `index` for all rows, at the temperature it had last."""
        following, temperature = index + 1, self._temperatures[index + 1]
        rows = np.arange(num_rows)
        guessed = ((self._lanes[following].bucket(num_rows),), *self._lanes[index].carry_shapes(key))
        wants_graph = self._launch(following, guessed, [rows], temperature)
        self._device.record(self._staged[following], self._compute)
        self._in_flight[following] = True
        self._guess = _Guess(following, self._generations[index], temperature, num_rows, guessed, wants_graph)

    def _prove(self, lane: Lane, key: Key, expected: SegmentOutput) -> None:
        """Capture what was just run, and keep the graph if it answers the same. Nothing else is under way."""
        download = self._copies is None
        try:
            context = lane.warm_context(key, download=download)
            self._send_answers(lane, key)
            self._device.wait(self._answered)
            graph = lane.capture(key, context, download=download)
        except BackendError as exc:  # refused, or no memory for another context
            self._switch.give_up(str(exc))
            return
        if self._is_same(lane, key, graph, expected):
            lane.keep(key, graph, context)
            return
        self._switch.give_up(f"segment {lane.index} answers otherwise when its graph is replayed")
        graph.close()
        lane.launch(key, use_graphs=False, download=download)  # what it carries on was overwritten
        self._send_answers(lane, key)
        self._device.wait(self._answered)

    def _is_same(self, lane: Lane, key: Key, graph: Graph, expected: SegmentOutput) -> bool:
        lane.blank_answers()
        graph.replay(self._compute)
        self._send_answers(lane, key)
        self._device.wait(self._answered)
        got = lane.read_answers(len(expected.prediction))
        pairs = zip(got, expected, strict=True)  # the carry is None in both
        return all(
            one is None or np.allclose(one, other, rtol=REPLAY_TOLERANCE, atol=REPLAY_TOLERANCE) for one, other in pairs
        )

    def _check_carry(self, index: int, carry: Any, rows: NDArray[np.int64]) -> None:
        if not isinstance(carry, Carry) or carry.worker is not self or carry.index != index - 1:
            raise BackendError(
                f"running segment {index}: got a carry that is not one of segment {index - 1} in this thread; pass on "
                f"what that segment gave, in the thread that ran it"
            )
        if carry.generation != self._generations[index - 1]:
            raise BackendError(
                f"running segment {index}: the carry is stale, segment {index - 1} has run again since and overwrote "
                f"it; finish one request before the next one of the same thread begins"
            )
        listed = rows.tolist()  # quicker than numpy for a few
        if min(listed) < 0 or max(listed) >= carry.num_rows:
            raise BackendError(f"running segment {index}: got rows {listed}, the carry has {carry.num_rows}")

    def _recover(self) -> None:
        """After an error: nothing is under way, nothing is guessed."""
        self._guess = None
        with contextlib.suppress(BackendError):  # the first error is the one to tell
            self._device.finish()
        self._in_flight = [False] * len(self._lanes)


def _request(lane: Lane, carry: Any, rows: NDArray[np.int64]) -> tuple[Key, Sequence[NDArray[Any]]]:
    """What a run needs: the shapes of its inputs and the arrays to upload."""
    size = lane.bucket(len(rows))
    if isinstance(carry, Carry):
        return ((size,), *carry.shapes), [rows]
    arrays = [carry[name] for name in lane.inputs]
    return tuple((size, *array.shape[1:]) for array in arrays), arrays


def _is_right(guess: _Guess, index: int, carry: Any, rows: NDArray[np.int64], temperature: np.float32) -> bool:
    """Whether what was guessed is what is asked for."""
    return (
        guess.segment == index
        and guess.temperature == temperature
        and guess.generation == carry.generation
        and guess.num_rows == len(rows)
        and bool((rows == np.arange(len(rows))).all())
    )
