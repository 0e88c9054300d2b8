"""Plans for a FakeDevice: a Python function, or whatever else computes a segment, in the place of a TensorRT engine.

As strict as TensorRT's documentation: shapes within the profile, addresses aligned, inputs, outputs and scratch memory
apart, one plain run over before a capture, and no other use of a context whose run was captured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import Dimension
from offramp.errors import BackendError
from offramp.runtime.tensorrt.device import ALIGNMENT, Memory, PlanTensor, Shape, Stream
from offramp.runtime.tensorrt.fake_device import Access, Clock, FakeDevice, HazardError, Operation, bytes_of

Function = Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]  # inputs by name -> outputs by name


class FakeTensor(NamedTuple):
    """A tensor of a fake plan: like PlanTensor, with names for the dimensions that vary."""

    dtype: str
    shape: tuple[Dimension, ...]
    is_input: bool


class FakePlan:
    """A plan that runs `function` on numpy arrays. `max_sizes` has the largest size of each named dimension."""

    scratch_bytes = ALIGNMENT

    def __init__(
        self,
        tensors: Mapping[str, FakeTensor],
        function: Function,
        max_sizes: Mapping[str, int],
        *,
        has_own_graphs: bool = False,
    ) -> None:
        self.named, self.function, self.max_sizes = dict(tensors), function, max_sizes
        self.has_own_graphs = has_own_graphs
        self.is_closed = False
        self.contexts: list[FakeContext] = []

    @property
    def tensors(self) -> dict[str, PlanTensor]:
        """See LoadedPlan.tensors."""
        return {
            name: PlanTensor(dtype, tuple(size if isinstance(size, int) else -1 for size in shape), is_input)
            for name, (dtype, shape, is_input) in self.named.items()
        }

    def context(self, scratch: Memory | None) -> FakeContext:
        """See LoadedPlan.context."""
        if self.is_closed or scratch is None or scratch.num_bytes < self.scratch_bytes:
            raise HazardError("a context of a closed plan, or without scratch memory")
        self.contexts.append(FakeContext(self, scratch.address))
        return self.contexts[-1]

    def close(self) -> None:
        """See LoadedPlan.close."""
        self.is_closed = True


class FakeContext:
    """See Context. `calls` are the shapes and addresses that were set, in order."""

    def __init__(self, plan: FakePlan, scratch: int) -> None:
        self.calls: list[str] = []
        self._plan, self._scratch = plan, scratch
        self._shapes: dict[str, Shape] = {  # of inputs; one that does not vary is known already
            name: tuple(size for size in spec.shape if isinstance(size, int))
            for name, spec in plan.named.items()
            if spec.is_input and all(isinstance(size, int) for size in spec.shape)
        }
        self._addresses: dict[str, int] = {}
        self._num_uses = 0  # of whatever makes a graph that was captured from it undefined
        self._warm: Clock | None = None  # when a plain run as it is set now is over; None without one

    def set_shape(self, name: str, shape: Shape) -> None:
        """See Context.set_shape."""
        spec = self._plan.named[name]
        limits = [size if isinstance(size, int) else self._plan.max_sizes[size] for size in spec.shape]
        is_within = len(shape) == len(limits) and all(
            1 <= size <= high for size, high in zip(shape, limits, strict=True)
        )
        if not spec.is_input or not is_within:
            raise BackendError(f"{name}: got shape {shape}, the profile ends at {limits}")
        self._shapes[name] = shape
        self._set(f"shape of {name}")

    def set_address(self, name: str, address: int) -> None:
        """See Context.set_address."""
        if address % ALIGNMENT or name not in self._plan.named:
            raise HazardError(f"{name} at {address:#x}: no such tensor, or not aligned to {ALIGNMENT}")
        self._addresses[name] = address
        self._set(f"address of {name}")

    def shape(self, name: str) -> Shape:
        """See Context.shape."""
        return self._resolve(name, self._sizes())

    def max_bytes(self, name: str) -> int:
        """See Context.max_bytes."""
        self._sizes()
        return self._num_bytes(name, self._plan.max_sizes)

    def enqueue(self, stream: Stream) -> None:
        """See Context.enqueue."""
        device: FakeDevice = stream.handle.device
        operation = self._operation(device)
        if device.capturing and device.capturing[0] is stream.handle:
            if self._warm is None or not device.is_over(self._warm):
                raise HazardError("a context is captured before one plain run as it is set is over")
            uses = self._num_uses
            device.capturing[1].conditions.append(lambda: self._num_uses == uses)
            device.submit(operation, stream)
            return
        device.submit(operation, stream)
        self._num_uses += 1
        self._warm = dict(stream.handle.clock)

    def _set(self, call: str) -> None:
        self.calls.append(call)
        self._num_uses += 1
        self._warm = None

    def _sizes(self) -> dict[str, int]:
        """The named dimensions, from the shapes of the inputs. HazardError where two inputs disagree."""
        sizes: dict[str, int] = {}
        for name, spec in self._plan.named.items():
            for size, dimension in zip(self._shapes[name] if spec.is_input else (), spec.shape, strict=False):
                if isinstance(dimension, str) and sizes.setdefault(dimension, size) != size:
                    raise HazardError(f"input {name} has {dimension} = {size}, another has {sizes[dimension]}")
        return sizes

    def _resolve(self, name: str, sizes: Mapping[str, int]) -> Shape:
        return tuple(size if isinstance(size, int) else sizes[size] for size in self._plan.named[name].shape)

    def _num_bytes(self, name: str, sizes: Mapping[str, int]) -> int:
        return math.prod(self._resolve(name, sizes)) * np.dtype(self._plan.named[name].dtype).itemsize

    def _operation(self, device: FakeDevice) -> Operation:
        """A run with the shapes and addresses of now. HazardError where its tensors overlap."""
        sizes, plan = self._sizes(), self._plan
        places: dict[str, tuple[Access, Shape]] = {}
        for name, spec in plan.named.items():
            span = slice(0, self._num_bytes(name, sizes))
            access = device.access_at(self._addresses[name], span, writes=not spec.is_input)
            places[name] = access, self._resolve(name, sizes)
        scratch = device.access_at(self._scratch, slice(0, plan.scratch_bytes), writes=True)
        accesses = [*(access for access, _ in places.values()), scratch]
        for one, other in itertools.combinations(accesses, 2):
            if one.conflicts(other):
                raise HazardError(f"one run uses {one} and {other}")

        def effect() -> None:
            inputs = {
                name: access.get().view(plan.named[name].dtype).reshape(shape)
                for name, (access, shape) in places.items()
                if not access.writes
            }
            for name, array in plan.function(inputs).items():
                access, shape = places[name]
                assert array.shape == shape, f"{name}: the function gave {array.shape}, expected {shape}"
                access.put(bytes_of(array))

        return Operation("run", accesses, effect)
