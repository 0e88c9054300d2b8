"""The real device: CUDA through cuda-bindings. The only module that imports it.

It translates and checks: CUDA returns its errors, here they are raised. Checked by mypy against stubs made from the
installed package (typings/make_stubs.py), run on a simulated CUDA in the tests, and on a real one by `make test-gpu`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from cuda.bindings import runtime as cuda
from numpy.typing import NDArray

from offramp.errors import BackendError
from offramp.runtime.tensorrt.device import (
    Event,
    Graph,
    GraphCaptureError,
    Memory,
    PinnedMemory,
    Shape,
    Stream,
)

_T = TypeVar("_T")


class CudaMemory:
    """Device memory; see Memory."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.address = _value(cuda.cudaMalloc(num_bytes), f"allocating {num_bytes} bytes on the GPU")

    def close(self) -> None:
        """Give it back."""
        _check(cuda.cudaFree(self.address), "freeing memory of the GPU")


class CudaPinnedMemory:
    """Pinned host memory; see PinnedMemory."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        pointer = _value(
            cuda.cudaHostAlloc(num_bytes, cuda.cudaHostAllocDefault), f"allocating {num_bytes} bytes of pinned memory"
        )
        self.address = pointer
        self._bytes: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(pointer))

    def write(self, offset: int, array: NDArray[Any]) -> None:
        """See PinnedMemory.write."""
        target = self._bytes[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
        target[...] = array

    def read(self, offset: int, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        """See PinnedMemory.read."""
        end = offset + math.prod(shape) * dtype.itemsize
        return self._bytes[offset:end].view(dtype).reshape(shape).copy()

    def close(self) -> None:
        """Give it back."""
        _check(cuda.cudaFreeHost(self.address), "freeing pinned memory")


class CudaGraph:
    """A graph ready to launch; see Graph."""

    def __init__(self, executable: cuda.cudaGraphExec_t) -> None:
        self._executable: cuda.cudaGraphExec_t | None = executable

    def replay(self, stream: Stream) -> None:
        """See Graph.replay."""
        assert self._executable is not None
        _check(cuda.cudaGraphLaunch(self._executable, stream.handle), "launching a CUDA graph")

    def close(self) -> None:
        """See Graph.close. Closing twice is fine."""
        if self._executable is not None:
            executable, self._executable = self._executable, None
            _check(cuda.cudaGraphExecDestroy(executable), "destroying a CUDA graph")


class CudaDevice:
    """One worker's part of the first visible GPU; see Device."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._closing: list[Callable[[], None]] = []  # in the order of making

    def allocate(self, num_bytes: int) -> CudaMemory:
        """See Device.allocate."""
        memory = CudaMemory(num_bytes)
        self._closing.append(memory.close)
        return memory

    def allocate_pinned(self, num_bytes: int) -> CudaPinnedMemory:
        """See Device.allocate_pinned."""
        memory = CudaPinnedMemory(num_bytes)
        self._closing.append(memory.close)
        return memory

    def stream(self, name: str) -> Stream:
        """See Device.stream. Non-blocking: the default stream, which others use, neither waits nor is waited for."""
        handle = _value(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking), "making a CUDA stream")
        stream = Stream(name, handle)
        self._streams.append(stream)
        self._closing.append(lambda: _check(cuda.cudaStreamDestroy(handle), "destroying a CUDA stream"))
        return stream

    def event(self, name: str) -> Event:
        """See Device.event. Without timing: cheaper. Waiting spins, which answers soonest."""
        handle = _value(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming), "making a CUDA event")
        self._closing.append(lambda: _check(cuda.cudaEventDestroy(handle), "destroying a CUDA event"))
        return Event(name, handle)

    def upload(self, target: Memory, source: PinnedMemory, span: slice, stream: Stream) -> None:
        """See Device.upload."""
        kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        _copy(target.address, source.address, span, kind, stream)

    def download(self, target: PinnedMemory, source: Memory, span: slice, stream: Stream) -> None:
        """See Device.download."""
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _copy(target.address, source.address, span, kind, stream)

    def fill(self, target: Memory, value: int, stream: Stream) -> None:
        """See Device.fill."""
        _check(cuda.cudaMemsetAsync(target.address, value, target.num_bytes, stream.handle), "filling GPU memory")

    def record(self, event: Event, stream: Stream) -> None:
        """See Device.record."""
        _check(cuda.cudaEventRecord(event.handle, stream.handle), "recording a CUDA event")

    def hold(self, stream: Stream, event: Event) -> None:
        """See Device.hold."""
        _check(cuda.cudaStreamWaitEvent(stream.handle, event.handle, 0), "letting a CUDA stream wait")

    def wait(self, event: Event) -> None:
        """See Device.wait. Other Python threads go on meanwhile."""
        _check(cuda.cudaEventSynchronize(event.handle), "waiting for the GPU")

    def finish(self) -> None:
        """See Device.finish."""
        for stream in self._streams:
            _check(cuda.cudaStreamSynchronize(stream.handle), "waiting for the GPU")

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        """See Device.capture. Other threads may do what they like meanwhile: the mode is per thread."""
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _check(cuda.cudaStreamBeginCapture(stream.handle, mode), "beginning to capture a CUDA graph")
        failure: BackendError | None = None
        try:
            work()
        except BackendError as exc:
            failure = exc
        finally:  # or the stream would go on capturing
            error, captured = cuda.cudaStreamEndCapture(stream.handle)
        if failure is not None or error != cuda.cudaError_t.cudaSuccess:
            cuda.cudaGetLastError()  # forgets it: the stream itself is in order
            raise GraphCaptureError(f"capturing a CUDA graph: {failure or _described(error)}") from failure
        error, executable = cuda.cudaGraphInstantiate(captured, 0)
        _check(cuda.cudaGraphDestroy(captured), "destroying a captured CUDA graph")
        if error != cuda.cudaError_t.cudaSuccess:
            cuda.cudaGetLastError()
            raise GraphCaptureError(f"instantiating a CUDA graph: {_described(error)}")
        graph = CudaGraph(executable)
        self._closing.append(graph.close)
        return graph

    def close(self) -> None:
        """See Device.close."""
        closing, self._closing = self._closing, []
        try:
            self.finish()
        finally:
            self._streams = []
            for close in reversed(closing):
                with contextlib.suppress(BackendError):  # after a failed kernel every call fails
                    close()


def open_device() -> CudaDevice:
    """A worker's part of the first visible GPU. Raises BackendError when there is none."""
    check_gpu()
    return CudaDevice()


def check_gpu() -> None:
    """Raise BackendError unless CUDA finds a GPU: without one, a TensorRT runtime ends the process."""
    error, count = cuda.cudaGetDeviceCount()
    if error != cuda.cudaError_t.cudaSuccess or not count:
        why = _described(error) if error != cuda.cudaError_t.cudaSuccess else "it counts none"
        raise BackendError(
            f"looking for a GPU: CUDA finds none ({why}); install an NVIDIA driver, check "
            f"CUDA_VISIBLE_DEVICES, or use backend='onnxruntime'"
        )


def _copy(target: int, source: int, span: slice, kind: cuda.cudaMemcpyKind, stream: Stream) -> None:
    count = span.stop - span.start
    _check(cuda.cudaMemcpyAsync(target + span.start, source + span.start, count, kind, stream.handle), "copying")


def _check(result: tuple[cuda.cudaError_t], doing: str) -> None:
    if result[0] != cuda.cudaError_t.cudaSuccess:
        raise _error(result[0], doing)


def _value(result: tuple[cuda.cudaError_t, _T], doing: str) -> _T:
    if result[0] != cuda.cudaError_t.cudaSuccess:
        raise _error(result[0], doing)
    return result[1]


def _error(error: cuda.cudaError_t, doing: str) -> BackendError:
    cuda.cudaGetLastError()  # forgets it, where it can be forgotten
    cure = "restart the process, and run `offramp doctor` if it happens again"
    if error == cuda.cudaError_t.cudaErrorMemoryAllocation:
        cure = "close other users of the GPU's memory, or build for fewer rows: `offramp build-engine --max-shapes …`"
    return BackendError(f"{doing}: {_described(error)}; {cure}")


def _described(error: cuda.cudaError_t) -> str:
    _, name = cuda.cudaGetErrorName(error)
    _, text = cuda.cudaGetErrorString(error)
    return f"{name.decode()}: {text.decode()}"
