"""The CUDA half of the TensorRT engine on a real GPU, TensorRT itself left out: `make test-gpu`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
from faked import compare_all_sizes, compare_in_threads

from offramp.errors import BackendError
from offramp.gpu import compute_capability
from offramp.policy import Policy
from offramp.runtime import Runner, TensorRtOptions
from offramp.runtime.tensorrt.device import GraphCaptureError
from offramp.runtime.tensorrt.worker import GraphWarning

if TYPE_CHECKING:
    from offramp.runtime.tensorrt.cuda_device import CudaDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not compute_capability(), reason="no NVIDIA GPU: not shown that CUDA does as it should"),
]
POLICY = Policy.thresholds("max_prob", [0.6, 0.8])
NUMBERS = np.arange(1000, dtype=np.float32)
SPAN = slice(0, NUMBERS.nbytes)


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    from offramp.runtime.tensorrt.cuda_device import open_device

    opened = open_device()
    yield opened
    opened.close()


def test_numbers_come_back_from_the_gpu(device: CudaDevice) -> None:
    stream, there = device.stream("one"), device.event("there")
    memory = device.allocate(NUMBERS.nbytes)
    sent, received = (device.allocate_pinned(NUMBERS.nbytes) for _ in range(2))
    sent.write(0, NUMBERS)
    device.fill(memory, 0xFF, stream)
    device.upload(memory, sent, SPAN, stream)
    device.download(received, memory, SPAN, stream)
    device.record(there, stream)
    device.wait(there)
    np.testing.assert_array_equal(received.read(0, (1000,), NUMBERS.dtype), NUMBERS)
    assert memory.address % 256 == 0


def test_a_graph_copies_what_is_there_when_it_is_replayed(device: CudaDevice) -> None:
    stream, memory = device.stream("one"), device.allocate(NUMBERS.nbytes)
    sent, received = (device.allocate_pinned(NUMBERS.nbytes) for _ in range(2))

    def work() -> None:
        device.upload(memory, sent, SPAN, stream)
        device.download(received, memory, SPAN, stream)

    graph = device.capture(stream, work)
    for factor in (1, 2):
        sent.write(0, NUMBERS * np.float32(factor))
        graph.replay(stream)
        device.finish()
        np.testing.assert_array_equal(received.read(0, (1000,), NUMBERS.dtype), NUMBERS * factor)


def test_a_stream_waits_for_another(device: CudaDevice) -> None:
    first, second, half = device.stream("first"), device.stream("second"), device.event("half")
    large = 256 << 20  # takes a millisecond to fill: the second stream would be too early
    memory, received = device.allocate(large), device.allocate_pinned(4)
    for value in range(1, 20):
        device.fill(memory, value, first)
        device.record(half, first)
        device.hold(second, half)
        device.download(received, memory, slice(0, 4), second)
        device.finish()
        assert received.read(0, (4,), np.dtype(np.uint8)).tolist() == [value] * 4


def test_a_capture_that_cannot_be_is_said_and_the_stream_goes_on(device: CudaDevice) -> None:
    stream, memory = device.stream("one"), device.allocate(64)
    with pytest.raises(GraphCaptureError, match="capturing a CUDA graph"):
        device.capture(stream, device.finish)  # waiting is not an operation of a stream
    device.fill(memory, 1, stream)
    device.finish()


def test_too_much_memory_is_refused_with_a_cure_and_the_device_goes_on(device: CudaDevice) -> None:
    with pytest.raises(BackendError, match=r"allocating .* cudaErrorMemoryAllocation.*--max-shapes"):
        device.allocate(1 << 50)
    device.fill(device.allocate(64), 1, device.stream("one"))
    device.finish()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "bundle"
    tiny.make_bundle(path, POLICY)
    return path


def host_runner(bundle: Path, options: TensorRtOptions) -> Runner:
    from host_plan import host_runner

    return host_runner(bundle, options, POLICY)


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_segments_in_streams_answer_as_on_the_host(bundle: Path, graphs: bool, speculate: bool) -> None:
    with (
        warnings.catch_warnings(),
        host_runner(bundle, TensorRtOptions(graphs, speculate)) as runner,
        Runner.open(bundle, "onnxruntime") as plain,
    ):
        warnings.simplefilter("error", GraphWarning)  # graphs must work, not be given up
        compare_all_sizes(runner, plain, (Policy.full_depth(), POLICY), tiny.assert_same)


@pytest.mark.parametrize("speculate", [False, True])
def test_four_threads_have_workers_of_their_own(bundle: Path, speculate: bool) -> None:
    options = TensorRtOptions(speculate=speculate)
    with host_runner(bundle, options) as runner, Runner.open(bundle, "onnxruntime") as plain:
        compare_in_threads(runner, plain, 100, tiny.assert_same)


def test_without_waiting_answers_are_wrong(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offramp.runtime.tensorrt.cuda_device import CudaDevice

    monkeypatch.setattr(CudaDevice, "wait", lambda self, event: None)
    with (
        host_runner(bundle, TensorRtOptions(graphs=False)) as runner,
        Runner.open(bundle, "onnxruntime") as plain,
        pytest.raises(AssertionError),
    ):
        compare_all_sizes(runner, plain, (POLICY,), tiny.assert_same)
