# ruff: noqa: N802, N815  (the names are CUDA's)
"""CUDA and TensorRT as far as the real device uses them, at once and in host memory: so that its lines run somewhere.

It checks no order (the fake device does) and proves nothing about the real libraries; names and signatures are held by
mypy against stubs made from them. `fail` makes a CUDA function or a TensorRT method fail as the real ones do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda.bindings import runtime
from faked import FakeTensor

SUCCESS = runtime.cudaError_t.cudaSuccess
_TRT_NAMES = {"float32": "FLOAT", "int64": "INT64", "bool": "BOOL"}


class SimulatedCuda:
    """Stands for the module cuda.bindings.runtime."""

    cudaError_t, cudaMemcpyKind = runtime.cudaError_t, runtime.cudaMemcpyKind
    cudaStreamCaptureMode = runtime.cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaEventDisableTiming, cudaHostAllocDefault = 1, 2, 0
    cudaGetErrorName = staticmethod(runtime.cudaGetErrorName)
    cudaGetErrorString = staticmethod(runtime.cudaGetErrorString)

    def __init__(self) -> None:
        self.fail: set[str] = set()
        self.alive: dict[int, Any] = {}  # by address or handle
        self.captured: list[Callable[[], None]] | None = None
        self._handles = iter(range(1, 1 << 30))

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        """A CUDA function: its result, or the error it was told to give, with None in place of results."""
        work = getattr(self, f"_{name}")  # AttributeError for what is not simulated

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name in self.fail:
                self.captured = None  # as the real call ends the capture even where it fails
                return (runtime.cudaError_t.cudaErrorMemoryAllocation, None)
            result = work(*arguments)
            return (SUCCESS,) if result is None else (SUCCESS, result)

        return call

    def do(self, work: Callable[[], None]) -> None:
        """Now, or at every launch of the graph being captured."""
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def _made(self, what: Any) -> int:
        handle = next(self._handles)
        self.alive[handle] = what
        return handle

    def _cudaGetDeviceCount(self) -> int:
        return 1

    def _cudaGetLastError(self) -> None: ...

    def _cudaMalloc(self, size: int) -> int:
        buffer = (ctypes.c_uint8 * (size + 256))()
        address = -(-ctypes.addressof(buffer) // 256) * 256
        self.alive[address] = buffer
        return address

    def _cudaHostAlloc(self, size: int, flags: int) -> int:
        return self._cudaMalloc(size)

    def _cudaStreamCreateWithFlags(self, flags: int) -> int:
        return self._made("stream")

    def _cudaEventCreateWithFlags(self, flags: int) -> int:
        return self._made("event")

    def _release(self, handle: int) -> None:
        del self.alive[handle]

    _cudaFree = _cudaFreeHost = _cudaStreamDestroy = _cudaEventDestroy = _release
    _cudaGraphDestroy = _cudaGraphExecDestroy = _release

    def _cudaStreamSynchronize(self, stream: int) -> None:
        assert self.captured is None

    def _cudaEventSynchronize(self, event: int) -> None:
        assert self.captured is None

    def _cudaEventRecord(self, event: int, stream: int) -> None: ...

    def _cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> None: ...

    def _cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: int) -> None:
        self.do(lambda: ctypes.memmove(dst, src, count))

    def _cudaMemsetAsync(self, pointer: int, value: int, count: int, stream: int) -> None:
        self.do(lambda: ctypes.memset(pointer, value, count))

    def _cudaStreamBeginCapture(self, stream: int, mode: Any) -> None:
        self.captured = []

    def _cudaStreamEndCapture(self, stream: int) -> int:
        captured, self.captured = self.captured, None
        return self._made(captured)

    def _cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        return self._made(self.alive[graph])

    def _cudaGraphLaunch(self, executable: int, stream: int) -> None:
        for work in self.alive[executable]:
            work()


class SimulatedContext:
    """trt.IExecutionContext."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return "set_input_shape" not in self._engine.fail

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return "set_tensor_address" not in self._engine.fail

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self._engine.device_memory_size_v2

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1,) if "get_tensor_shape" in self._engine.fail else self._shape(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        sizes = {"inverse_temperature": ()} | self._shapes
        named = {
            dimension: size
            for tensor, spec in self._engine.tensors.items()
            if spec.is_input
            for dimension, size in zip(spec.shape, sizes[tensor], strict=True)
        }
        return tuple(size if isinstance(size, int) else named[size] for size in self._engine.tensors[name].shape)

    def get_max_output_size(self, name: str) -> int:
        if "get_max_output_size" in self._engine.fail:
            return -1
        return int(np.prod(self._shape(name))) * np.dtype(self._engine.tensors[name].dtype).itemsize

    def execute_async_v3(self, stream_handle: int) -> bool:
        places = {}
        for name, spec in self._engine.tensors.items():
            shape = self._shape(name) if not spec.is_input else self._shapes.get(name, ())
            dtype = np.dtype(spec.dtype)
            buffer = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(self._addresses[name])
            places[name] = np.frombuffer(buffer, dtype).reshape(shape)

        def work() -> None:
            inputs = {name: places[name] for name, spec in self._engine.tensors.items() if spec.is_input}
            for name, array in self._engine.function(inputs).items():
                places[name][...] = array

        self._engine.cuda.do(work)
        return "execute_async_v3" not in self._engine.fail


class SimulatedEngine:
    """trt.ICudaEngine."""

    device_memory_size_v2 = 1000

    def __init__(
        self, cuda: SimulatedCuda, tensors: Mapping[str, FakeTensor], function: Callable[..., Any], fail: set[str]
    ) -> None:
        self.cuda, self.tensors, self.function, self.fail = cuda, tensors, function, fail
        self.configs: list[SimpleNamespace] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=_TRT_NAMES[self.tensors[name].dtype])

    def get_tensor_location(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="HOST" if "get_tensor_location" in self.fail else "DEVICE")

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="INPUT" if self.tensors[name].is_input else "OUTPUT")

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def create_execution_context(self, how: Any) -> SimulatedContext | None:
        return None if "create_execution_context" in self.fail else SimulatedContext(self)

    def create_runtime_config(self) -> SimpleNamespace:
        strategy = SimulatedStrategy()
        config = SimpleNamespace(
            cuda_graph_strategy=strategy, create_runtime_cache=SimulatedCache, set_runtime_cache=bool
        )
        self.configs.append(config)
        return config


class SimulatedStrategy:
    """trt.CudaGraphStrategy."""

    WHOLE_GRAPH_CAPTURE = "whole"


class SimulatedCache:
    """trt.IRuntimeCache."""

    content = b"kernels"

    def deserialize(self, blob: bytes) -> bool:
        self.content = blob + b" and more"
        return True

    def serialize(self) -> bytes:
        return self.content

    def __bool__(self) -> bool:
        return True


class SimulatedTensorRt:
    """The module tensorrt or tensorrt_rtx; a plan's content is the position of its engine."""

    __version__ = "1.7.1.116"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")

    class ILogger:
        """trt.ILogger."""

    def __init__(self, engines: list[SimulatedEngine], fail: set[str]) -> None:
        self.engines, self.fail = engines, fail

    def Runtime(self, logger: Any) -> Any:
        def deserialize(content: bytes) -> SimulatedEngine | None:
            if "deserialize_cuda_engine" in self.fail:
                logger.log(SimpleNamespace(name="ERROR"), "Version tag does not match")
                logger.log(SimpleNamespace(name="WARNING"), "never mind")
                return None
            return self.engines[content[-1]]

        return None if "Runtime" in self.fail else SimpleNamespace(deserialize_cuda_engine=deserialize)
