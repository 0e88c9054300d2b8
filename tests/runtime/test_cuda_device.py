"""The CUDA half of the TensorRT engine on a real GPU, TensorRT itself left out: `make test-gpu`."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
from faked import random_request

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


def is_same(got: object, expected: object) -> bool:
    """Two Results agree in every number."""
    names = ("exit_index", "prediction", "score")
    pairs = [(getattr(got, name), getattr(expected, name)) for name in names]
    pairs.append((got.outputs["logits"], expected.outputs["logits"]))  # type: ignore[attr-defined]
    return all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_segments_in_streams_answer_as_on_the_host(bundle: Path, graphs: bool, speculate: bool) -> None:
    options = TensorRtOptions(graphs, speculate)
    with (
        warnings.catch_warnings(),
        host_runner(bundle, options) as runner,
        Runner.open(bundle, "onnxruntime") as plain,
    ):
        warnings.simplefilter("error", GraphWarning)  # graphs must work, not be given up
        rng = np.random.default_rng(0)
        for policy in (Policy.full_depth(), POLICY):
            runner.policy = plain.policy = policy
            for num_rows in (*range(1, tiny.MAX_ROWS + 1), 3 * tiny.MAX_ROWS):
                inputs = random_request(rng, num_rows)
                for _ in range(4):  # plainly, proving a graph, and by its replay
                    assert is_same(runner.run(inputs), plain.run(inputs))


@pytest.mark.parametrize("speculate", [False, True])
def test_four_threads_have_workers_of_their_own(bundle: Path, speculate: bool) -> None:
    failures: list[BaseException] = []
    options = TensorRtOptions(speculate=speculate)
    with host_runner(bundle, options) as runner, Runner.open(bundle, "onnxruntime") as plain:

        def work(seed: int) -> None:
            try:
                rng = np.random.default_rng(seed)
                for _ in range(100):
                    inputs = random_request(rng, int(rng.integers(1, 20)))
                    assert is_same(runner.run(inputs), plain.run(inputs))
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_without_waiting_answers_are_wrong(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offramp.runtime.tensorrt.cuda_device import CudaDevice

    monkeypatch.setattr(CudaDevice, "wait", lambda self, event: None)
    rng = np.random.default_rng(0)
    with (
        host_runner(bundle, TensorRtOptions(graphs=False)) as runner,
        Runner.open(bundle, "onnxruntime") as plain,
    ):
        requests = [random_request(rng, 4) for _ in range(20)]
        assert not all(is_same(runner.run(inputs), plain.run(inputs)) for inputs in requests)
