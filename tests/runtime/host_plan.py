"""Plans that need a GPU and no TensorRT: ONNX Runtime computes a segment on the host, in its place in a CUDA stream.

Inputs travel to pinned memory, a host function runs, outputs travel back: all of it enqueued, and captured into CUDA
graphs as kernels are. So everything but TensorRT's own calls runs on the real device: memory, copies, events, graphs
and speculation. Every run waits a random while first, so that whoever reads too early reads something else.
"""

from __future__ import annotations

import ctypes
import functools
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from faked import SIZES, plan_record, segment_tensors, session_function

from offramp.bundle import load_manifest
from offramp.policy import Policy
from offramp.runtime import Runner, TensorRtOptions
from offramp.runtime.tensorrt.device import Memory, Stream
from offramp.runtime.tensorrt.engine import TensorRtChain, planned_segments
from offramp.runtime.tensorrt.fake_plan import FakeContext, FakePlan

MOST_DELAY_S = 300e-6
_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver; its handles are those of the runtime."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchHostFunc.argtypes = (ctypes.c_void_p, _HostFunction, ctypes.c_void_p)
    library.cuMemcpyAsync.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
    return library


def checked(status: int) -> None:
    """CUDA_SUCCESS is 0."""
    assert status == 0, f"the CUDA driver answered {status}"


class HostPlan(FakePlan):
    """See the module; the function computes a segment from numpy arrays."""

    scratch_bytes = 0

    def context(self, scratch: Memory | None) -> HostContext:
        """See LoadedPlan.context."""
        return HostContext(self)


class HostContext(FakeContext):
    """A plan's shapes and addresses; staging memory is of the plan's largest shapes."""

    def __init__(self, plan: HostPlan) -> None:
        super().__init__(plan, 0)
        from offramp.runtime.tensorrt.cuda_device import CudaPinnedMemory

        self._staging = {name: CudaPinnedMemory(self._num_bytes(name, plan.max_sizes)) for name in plan.named}
        self._kept: list[Any] = []  # functions that a stream or a graph may still call
        self._delays = random.Random(0)

    def enqueue(self, stream: Stream) -> None:
        """See Context.enqueue."""
        sizes, plan, handle = self._sizes(), self._plan, int(stream.handle)
        shapes = {name: self._resolve(name, sizes) for name in plan.named}
        lengths = {name: math.prod(shapes[name]) * np.dtype(plan.named[name].dtype).itemsize for name in shapes}
        inputs = [name for name, spec in plan.named.items() if spec.is_input]
        outputs = [name for name, spec in plan.named.items() if not spec.is_input]

        def compute(_: int | None) -> None:
            time.sleep(self._delays.uniform(0, MOST_DELAY_S))
            given = {
                name: self._staging[name].read(0, shapes[name], np.dtype(plan.named[name].dtype)) for name in inputs
            }
            for name, array in plan.function(given).items():
                self._staging[name].write(0, np.ascontiguousarray(array))

        self._kept.append(_HostFunction(compute))
        for name in inputs:
            checked(driver().cuMemcpyAsync(self._staging[name].address, self._addresses[name], lengths[name], handle))
        checked(driver().cuLaunchHostFunc(handle, self._kept[-1], None))
        for name in outputs:
            checked(driver().cuMemcpyAsync(self._addresses[name], self._staging[name].address, lengths[name], handle))


def host_runner(bundle: Path, options: TensorRtOptions, policy: Policy) -> Runner:
    """The tiny bundle on the GPU here, its segments computed by ONNX Runtime on the host."""
    from offramp.runtime.tensorrt.cuda_device import open_device

    manifest = load_manifest(bundle)
    plans = [
        HostPlan(segment_tensors(segment), session_function(bundle, segment), SIZES) for segment in manifest.segments
    ]
    records = [plan_record(segment) for segment in manifest.segments]
    chain = TensorRtChain(planned_segments(manifest, records, plans), open_device, options)
    return Runner(chain.engines, manifest, policy, backend="tensorrt-rtx", precision="fp16")
