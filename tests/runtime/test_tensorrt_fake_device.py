"""The fake device itself: it is lazy, it gets the right order right, and it sees every misuse it says it sees."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from offramp.errors import BackendError
from offramp.runtime.tensorrt.device import GraphCaptureError
from offramp.runtime.tensorrt.fake_device import FakeDevice, FakeMemory, HazardError
from offramp.runtime.tensorrt.fake_plan import FakeContext, FakePlan, FakeTensor

FLOATS = np.dtype(np.float32)
ALL = slice(0, 16)


class Bench:
    """A device with two streams, an event, and a plan that adds one to four numbers."""

    def __init__(self, graphs: str = "right") -> None:
        self.device = FakeDevice(graphs)
        self.one, self.two = self.device.stream("one"), self.device.stream("two")
        self.event = self.device.event("event")
        self.pinned = self.device.allocate_pinned(16)
        self.source, self.target = self.device.allocate(16), self.device.allocate(16)
        tensors = {"x": FakeTensor("float32", ("n",), True), "y": FakeTensor("float32", ("n",), False)}
        self.plan = FakePlan(tensors, lambda inputs: {"y": inputs["x"] + 1}, {"n": 4})
        self.context = self.made_context(self.source, self.target)

    def made_context(self, source: FakeMemory, target: FakeMemory) -> FakeContext:
        context = self.plan.context(self.device.allocate(256))
        context.set_shape("x", (4,))
        context.set_address("x", source.address)
        context.set_address("y", target.address)
        return context

    def upload(self) -> None:
        self.pinned.write(0, np.arange(4, dtype=np.float32))
        self.device.upload(self.source, self.pinned, ALL, self.one)

    def finished(self, memory: FakeMemory) -> list[float]:
        """What is in device memory in the end."""
        self.device.finish()
        return memory.content.view(np.float32).tolist()


def test_nothing_happens_before_somebody_waits() -> None:
    bench = Bench()
    bench.upload()
    bench.context.enqueue(bench.one)
    bench.device.download(bench.pinned, bench.target, ALL, bench.one)
    bench.device.record(bench.event, bench.one)
    assert not bench.target.is_written.any()
    bench.device.wait(bench.event)
    assert bench.pinned.read(0, (4,), FLOATS).tolist() == [1, 2, 3, 4]


def test_streams_in_order_by_an_event_are_in_order() -> None:
    bench = Bench()
    bench.upload()
    bench.device.record(bench.event, bench.one)
    bench.device.hold(bench.two, bench.event)
    bench.context.enqueue(bench.two)
    assert bench.finished(bench.target) == [1, 2, 3, 4]


def test_order_passes_on_from_stream_to_stream_and_through_the_host() -> None:
    bench = Bench()
    bench.upload()
    bench.device.record(bench.event, bench.one)
    bench.device.hold(bench.two, bench.event)
    bench.context.enqueue(bench.two)
    bench.device.record(bench.event, bench.two)
    bench.device.wait(bench.event)  # and with it for the upload in the other stream
    bench.pinned.write(0, np.zeros(4, np.float32))
    bench.device.fill(bench.source, 0, bench.one)
    assert bench.finished(bench.target) == [1, 2, 3, 4]


def read_too_early(bench: Bench) -> None:
    bench.upload()
    bench.context.enqueue(bench.one)
    bench.device.download(bench.pinned, bench.target, ALL, bench.one)
    bench.pinned.read(0, (4,), FLOATS)


def write_too_early(bench: Bench) -> None:
    bench.upload()
    bench.pinned.write(0, np.zeros(4, np.float32))


def run_on_what_another_stream_writes(bench: Bench) -> None:
    bench.upload()
    bench.context.enqueue(bench.two)


def overwrite_what_another_stream_reads(bench: Bench) -> None:
    bench.upload()
    bench.context.enqueue(bench.one)
    bench.device.fill(bench.source, 0, bench.two)


def hold_for_an_event_before_it_is_recorded(bench: Bench) -> None:
    bench.upload()
    bench.device.hold(bench.two, bench.event)
    bench.device.record(bench.event, bench.one)
    bench.context.enqueue(bench.two)


def share_scratch_memory_between_streams(bench: Bench) -> None:
    bench.upload()
    bench.device.finish()
    bench.context.enqueue(bench.one)
    bench.context.set_address("y", bench.device.allocate(16).address)
    bench.context.enqueue(bench.two)


def run_on_what_nobody_wrote(bench: Bench) -> None:
    bench.context.enqueue(bench.one)
    bench.device.finish()


def read_what_nobody_wrote(bench: Bench) -> None:
    bench.pinned.read(0, (1,), FLOATS)


def write_in_place(bench: Bench) -> None:
    bench.upload()
    bench.made_context(bench.source, bench.source).enqueue(bench.one)


def write_beyond_the_end(bench: Bench) -> None:
    bench.upload()
    bench.made_context(bench.source, bench.device.allocate(12)).enqueue(bench.one)


def copy_beyond_the_end(bench: Bench) -> None:
    bench.device.upload(bench.source, bench.pinned, slice(0, 17), bench.one)


def misaligned(bench: Bench) -> None:
    bench.context.set_address("x", bench.source.address + 4)


def capture_without_a_plain_run(bench: Bench) -> None:
    bench.upload()
    bench.device.capture(bench.one, lambda: bench.context.enqueue(bench.one))


def capture_before_the_plain_run_is_over(bench: Bench) -> None:
    bench.upload()
    bench.context.enqueue(bench.one)
    bench.device.capture(bench.one, lambda: bench.context.enqueue(bench.one))


def allocate_while_capturing(bench: Bench) -> None:
    bench.device.capture(bench.one, lambda: bench.device.allocate(1))


def wait_while_capturing(bench: Bench) -> None:
    bench.device.capture(bench.one, bench.device.finish)


def captured(bench: Bench) -> Callable[[], None]:
    bench.upload()
    bench.context.enqueue(bench.one)
    bench.device.finish()
    graph = bench.device.capture(bench.one, lambda: bench.context.enqueue(bench.one))
    bench.replay_and_close = (lambda: graph.replay(bench.one)), graph.close  # type: ignore[attr-defined]
    return lambda: graph.replay(bench.one)


def use_the_context_of_a_graph(bench: Bench) -> None:
    replay = captured(bench)
    bench.context.enqueue(bench.one)
    replay()


def replay_in_two_streams(bench: Bench) -> None:
    bench.upload()
    bench.context.enqueue(bench.one)
    bench.device.finish()
    graph = bench.device.capture(bench.one, lambda: bench.context.enqueue(bench.one))
    graph.replay(bench.one)
    graph.replay(bench.two)


def close_a_graph_that_runs(bench: Bench) -> None:
    captured(bench)()
    bench.replay_and_close[1]()  # type: ignore[attr-defined]


def use_a_closed_device(bench: Bench) -> None:
    bench.device.close()
    bench.upload()


MISUSES = [
    read_too_early,
    write_too_early,
    run_on_what_another_stream_writes,
    overwrite_what_another_stream_reads,
    hold_for_an_event_before_it_is_recorded,
    share_scratch_memory_between_streams,
    run_on_what_nobody_wrote,
    read_what_nobody_wrote,
    write_in_place,
    write_beyond_the_end,
    copy_beyond_the_end,
    misaligned,
    capture_without_a_plain_run,
    capture_before_the_plain_run_is_over,
    allocate_while_capturing,
    wait_while_capturing,
    use_the_context_of_a_graph,
    replay_in_two_streams,
    close_a_graph_that_runs,
    use_a_closed_device,
]


@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.__name__)
def test_misuse_is_a_hazard(misuse: Callable[[Bench], None]) -> None:
    bench = Bench()
    with pytest.raises(HazardError):
        misuse(bench)


def test_a_replay_does_what_was_captured() -> None:
    bench = Bench()
    replay = captured(bench)
    bench.device.fill(bench.target, 0, bench.one)
    replay()
    assert bench.finished(bench.target) == [1, 2, 3, 4]


def test_capturing_itself_runs_nothing() -> None:
    bench = Bench()
    captured(bench)
    bench.device.fill(bench.target, 0, bench.one)
    assert bench.finished(bench.target) == [0, 0, 0, 0]


@pytest.mark.parametrize("graphs", ["empty", "wrong"])
def test_a_bad_graph_does_something_else(graphs: str) -> None:
    bench = Bench(graphs)
    replay = captured(bench)
    bench.device.fill(bench.target, 0, bench.one)
    replay()
    assert bench.finished(bench.target) != [1, 2, 3, 4]


def test_a_refused_capture_says_so_and_the_stream_goes_on() -> None:
    bench = Bench("refused")
    with pytest.raises(GraphCaptureError):
        captured(bench)
    bench.context.enqueue(bench.one)
    assert bench.finished(bench.target) == [1, 2, 3, 4]


def test_a_shape_outside_the_profile_is_refused_as_tensorrt_does() -> None:
    with pytest.raises(BackendError, match=r"x: got shape \(5,\), the profile ends at \[4\]"):
        Bench().context.set_shape("x", (5,))
