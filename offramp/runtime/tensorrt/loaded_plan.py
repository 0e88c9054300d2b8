"""Plans through TensorRT 11 or TensorRT-RTX: deserialized, with their contexts. The only module that imports either.

It translates and checks: TensorRT returns None or False and tells its logger why, here that is raised. Both have the
same classes for all that is used, but for what is marked as RTX's own. Not yet run on a GPU: checked by mypy against
stubs made from the installed package (typings/make_stubs.py), and run on a simulated TensorRT in the tests.
"""

from __future__ import annotations

import collections
import functools
import importlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from offramp.bundle import PlanRecord
from offramp.errors import BackendError, PlanError
from offramp.runtime.tensorrt.cuda_device import check_gpu
from offramp.runtime.tensorrt.device import Memory, PlanTensor, Shape, Stream
from offramp.storage import write_file

if TYPE_CHECKING:
    import tensorrt_rtx as trt

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> module
_DTYPES = dict(  # trt.DataType -> numpy
    FLOAT="float32", HALF="float16", INT8="int8", UINT8="uint8", INT32="int32", INT64="int64", BOOL="bool"
)
_MAX_MESSAGES = 8


class TensorRtModule(Protocol):
    """What is used of the module `tensorrt` or `tensorrt_rtx` itself."""

    __version__: str
    ILogger: type[trt.ILogger]
    Runtime: type[trt.Runtime]
    ExecutionContextAllocationStrategy: type[trt.ExecutionContextAllocationStrategy]


class TensorRtContext:
    """An execution context; see Context."""

    def __init__(self, context: trt.IExecutionContext, log: Log) -> None:
        self._context, self._log = context, log

    def set_shape(self, name: str, shape: Shape) -> None:
        """See Context.set_shape."""
        if not self._context.set_input_shape(name, shape):
            raise BackendError(f"TensorRT refuses the shape {shape} of input {name!r}: {self._log.said()}")

    def set_address(self, name: str, address: int) -> None:
        """See Context.set_address."""
        if not self._context.set_tensor_address(name, address):
            raise BackendError(f"TensorRT refuses the address {address:#x} of {name!r}: {self._log.said()}")

    def shape(self, name: str) -> Shape:
        """See Context.shape."""
        shape = _shape(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise BackendError(f"output {name!r} has the shape {shape}: it depends on values, which is not supported")
        return shape

    def max_bytes(self, name: str) -> int:
        """See Context.max_bytes."""
        num_bytes = self._context.get_max_output_size(name)
        if num_bytes < 0:
            raise BackendError(f"TensorRT knows no largest size of output {name!r}: {self._log.said()}")
        return num_bytes

    def enqueue(self, stream: Stream) -> None:
        """See Context.enqueue."""
        if not self._context.execute_async_v3(int(stream.handle)):
            raise BackendError(f"TensorRT did not enqueue the segment: {self._log.said()}")


class TensorRtPlan:
    """An engine of TensorRT; see LoadedPlan. Its contexts share scratch memory that is ours."""

    has_own_graphs = False

    def __init__(self, loaded: tuple[trt.ICudaEngine, trt.Runtime], module: TensorRtModule, log: Log) -> None:
        self._engine, self._runtime = engine, _ = loaded  # the runtime must outlive the engine
        self._module, self._log = module, log
        self._lock = threading.Lock()
        self.tensors = {name: self._tensor(name) for name in map(engine.get_tensor_name, range(engine.num_io_tensors))}
        self.scratch_bytes = engine.device_memory_size_v2

    def context(self, scratch: Memory | None) -> TensorRtContext:
        """See LoadedPlan.context."""
        strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._lock:
            context = self._made(self._engine.create_execution_context(strategy))
        if scratch is not None:
            context.set_device_memory(scratch.address, scratch.num_bytes)
        return TensorRtContext(context, self._log)

    def close(self) -> None:
        """See LoadedPlan.close. TensorRT frees when nobody refers to it any more."""

    def _made(self, context: trt.IExecutionContext | None) -> trt.IExecutionContext:
        if context is None:
            raise BackendError(
                f"TensorRT made no execution context: {self._log.said()}; close other users of the GPU's memory, or "
                f"build for fewer rows: `offramp build-engine BUNDLE --max-shapes …`"
            )
        return context

    def _tensor(self, name: str) -> PlanTensor:
        engine = self._engine
        dtype = engine.get_tensor_dtype(name).name
        if (
            engine.get_tensor_location(name).name != "DEVICE"
            or engine.is_shape_inference_io(name)
            or dtype not in _DTYPES
        ):
            raise PlanError(
                f"plan: its tensor {name!r} ({dtype}) is a shape, or of a type that numpy does not have; export the "
                f"bundle again and run `offramp build-engine BUNDLE`"
            )
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        return PlanTensor(_DTYPES[dtype], _shape(engine.get_tensor_shape(name)), is_input)


class TensorRtRtxPlan(TensorRtPlan):
    """An engine of TensorRT-RTX: contexts see to their memory and their graphs, and kernels are compiled here."""

    has_own_graphs = True

    def __init__(
        self,
        loaded: tuple[trt.ICudaEngine, trt.Runtime],
        module: TensorRtModule,
        log: Log,
        cache: Path | None,
        *,
        graphs: bool,
    ) -> None:
        super().__init__(loaded, module, log)
        self.scratch_bytes = 0
        self._cache_path = cache
        self._config = self._engine.create_runtime_config()
        if graphs:
            self._config.cuda_graph_strategy = type(self._config.cuda_graph_strategy).WHOLE_GRAPH_CAPTURE
        self._cache: trt.IRuntimeCache = self._config.create_runtime_cache()
        if cache is not None and cache.exists():
            self._cache.deserialize(cache.read_bytes())  # False for one of another GPU or version: compiled anew
        if not self._config.set_runtime_cache(self._cache):
            raise BackendError(f"TensorRT-RTX refuses its own runtime cache: {log.said()}")

    def context(self, scratch: Memory | None) -> TensorRtContext:
        """See LoadedPlan.context."""
        with self._lock:
            context = self._made(self._engine.create_execution_context(self._config))
        return TensorRtContext(context, self._log)

    def close(self) -> None:
        """See LoadedPlan.close. Raises StorageError."""
        if self._cache_path is not None:
            content = cast(Any, self._cache.serialize())
            if content is not None:
                write_file(self._cache_path, bytes(content))


class Log:
    """What TensorRT said last about what went wrong, for messages."""

    def __init__(self) -> None:
        self.messages: collections.deque[str] = collections.deque(maxlen=_MAX_MESSAGES)

    def said(self) -> str:
        """The messages since the last time, all of them errors."""
        text = "; ".join(self.messages)
        self.messages.clear()
        return text or "it gave no reason"


def load_plans(
    records: Sequence[PlanRecord], contents: Sequence[bytes], graphs: bool, runtime_cache: Path | None
) -> list[TensorRtPlan]:
    """Deserialize plans of one backend, whose hashes have been checked. Raises BackendError, PlanError."""
    check_gpu()
    backend = records[0].backend
    module, log, logger = _tensorrt(backend)
    runtime = module.Runtime(logger)
    if not runtime:
        raise BackendError(f"opening {backend}: it made no runtime: {log.said()}; check the NVIDIA driver")
    plans: list[TensorRtPlan] = []
    for record, content in zip(records, contents, strict=True):
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise PlanError(
                f"{record.file.path}: {backend} {module.__version__} cannot run it here: {log.said()}; run "
                f"`offramp build-engine BUNDLE --force` on this machine"
            )
        if backend == "tensorrt":
            plans.append(TensorRtPlan((engine, runtime), module, log))
        else:
            cache = runtime_cache / f"{record.key}.cache" if runtime_cache is not None else None
            plans.append(TensorRtRtxPlan((engine, runtime), module, log, cache, graphs=graphs))
    return plans


@functools.cache
def _tensorrt(backend: str) -> tuple[TensorRtModule, Log, trt.ILogger]:
    """The module of a backend, and its logger: TensorRT may use it as long as the process lives, so it does too."""
    try:
        module = cast(TensorRtModule, importlib.import_module(_MODULES[backend]))
    except (ImportError, OSError, RuntimeError) as exc:
        raise BackendError(
            f"opening {backend}: importing {_MODULES[backend]} failed: {exc}; run `pip install 'offramp[{backend}]'`"
        ) from exc
    log = Log()

    class Logger(module.ILogger):  # type: ignore[name-defined,misc]
        """Hands errors to the log; warnings and progress are not errors."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                log.messages.append(msg.strip())

    return module, log, Logger()


def _shape(dims: trt.Dims) -> Shape:
    return tuple(dims[axis] for axis in range(len(dims)))
