"""What a segment costs on a GPU besides its own kernels: uploads, launch, download, waiting, and our Python.

Physics: a launch costs the CPU a few microseconds, a copy of some bytes to pinned memory about as much, and the way
from the end of the GPU's work to a host that waits for an event five to ten more. That round trip is the price of
deciding on the host, segment by segment: "round trip" below is one clearing of 12 bytes, one download and one wait,
from Python, and nothing that decides can do with less. A graph makes one launch of the uploads, the plan and the
download. Nothing here computes a model: a plan clears its answers and is done, so that what is left is our own.

Needs a GPU and cuda-bindings, and no TensorRT. Medians in microseconds per segment, interleaved call by call; 3
segments that carry a hidden state of width 384, nobody leaves.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from machine import describe_machine
from runner_overhead import INPUTS, LENGTH

from offramp.bundle import ROWS, SCORES, DimensionSpec, TensorSpec
from offramp.gpu import compute_capability
from offramp.policy import Policy
from offramp.runtime import Runner, TensorRtOptions, fake_runner
from offramp.runtime.fake import fake_manifest
from offramp.runtime.tensorrt.device import ALIGNMENT, PlanTensor, Shape, Stream
from offramp.runtime.tensorrt.engine import TensorRtChain
from offramp.runtime.tensorrt.lane import PlannedSegment, RowRange
from offramp.runtime.timing import interleaved_ms

SEGMENTS, ROWS_AT_MOST, WIDTH, CLASSES = 3, 32, 384, 2
POLICY = Policy.thresholds("max_prob", [0.9] * (SEGMENTS - 1))
MODES = {
    "plain": TensorRtOptions(graphs=False),
    "graphs": TensorRtOptions(graphs=True),
    "graphs speculating": TensorRtOptions(graphs=True, speculate=True),
}


class EmptyPlan:
    """A plan that clears its answers: nobody is sure of anything."""

    scratch_bytes, has_own_graphs = 0, False

    def __init__(self, index: int, device: Any) -> None:
        self.tensors: dict[str, PlanTensor] = {}
        self.index, self.device = index, device

    def context(self, scratch: Any) -> EmptyContext:
        """See LoadedPlan.context."""
        return EmptyContext(self)

    def close(self) -> None:
        """See LoadedPlan.close."""


class EmptyContext:
    """See Context."""

    def __init__(self, plan: EmptyPlan) -> None:
        self._plan, self._answers = plan, 0
        self._shapes: dict[str, Shape] = {}

    def set_shape(self, name: str, shape: Shape) -> None:
        """See Context.set_shape."""
        self._shapes[name] = shape

    def set_address(self, name: str, address: int) -> None:
        """See Context.set_address."""
        if name == "scores":  # the first of the answers, which lie one behind the other
            self._answers = address

    def shape(self, name: str) -> Shape:
        """See Context.shape."""
        return (self._shapes["rows" if self._plan.index else "input_ids"][0], LENGTH, WIDTH)

    def max_bytes(self, name: str) -> int:
        """See Context.max_bytes."""
        return ROWS_AT_MOST * LENGTH * WIDTH * 4

    def enqueue(self, stream: Stream) -> None:
        """See Context.enqueue."""
        self._plan.device.fill(_Place(self._answers, _ANSWER_BYTES), 0, stream)


# Scores, prediction and logits of all rows, each beginning at a multiple of ALIGNMENT.
_ANSWER_BYTES = sum(
    math.ceil(ROWS_AT_MOST * num_bytes / ALIGNMENT) * ALIGNMENT for num_bytes in (len(SCORES) * 4, 8, CLASSES * 4)
)


class _Place:
    """A piece of the answers' memory."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address, self.num_bytes = address, num_bytes


def make_runner(options: TensorRtOptions) -> Runner:
    """Three segments that carry a hidden state, on the GPU here."""
    from offramp.runtime.tensorrt.cuda_device import open_device

    device = open_device()  # of the plans, to clear their answers with
    hidden = TensorSpec("hidden_in", "float32", (ROWS, "sequence", WIDTH))
    manifest = fake_manifest(SEGMENTS, CLASSES, INPUTS)
    specs = tuple(
        replace(
            spec,
            carry_in=(hidden,) if spec.index else (),
            carry_out=(replace(hidden, name="hidden_out"),) if spec.index < SEGMENTS - 1 else (),
        )
        for spec in manifest.segments
    )
    sizes = {ROWS: DimensionSpec(1, ROWS_AT_MOST), "sequence": DimensionSpec(1, LENGTH)}
    manifest = replace(manifest, segments=specs, dimensions=sizes)
    tokens, carried = (ROWS_AT_MOST, LENGTH), (ROWS_AT_MOST, LENGTH, WIDTH)
    shapes = {spec.name: tokens for spec in INPUTS}, {ROWS: (ROWS_AT_MOST,), "hidden_in": carried}
    dtypes = {spec.name: spec.dtype for spec in INPUTS} | {ROWS: "int64"}
    segments = [
        PlannedSegment(
            spec,
            EmptyPlan(spec.index, device),
            shapes[min(spec.index, 1)],
            dtypes,
            RowRange(1, ROWS_AT_MOST),
            CLASSES,
            (),
        )
        for spec in specs
    ]
    chain = TensorRtChain(segments, open_device, options)
    return Runner(chain.engines, manifest, POLICY, backend="tensorrt", precision="fp16")


def make_round_trip() -> Callable[[], None]:
    """Clear 12 bytes, download them, wait: what deciding on the host costs at least."""
    from offramp.runtime.tensorrt.cuda_device import open_device

    device = open_device()
    stream, there = device.stream("one"), device.event("there")
    memory, host = device.allocate(256), device.allocate_pinned(256)

    def round_trip() -> None:
        device.fill(memory, 0, stream)
        device.download(host, memory, slice(0, 12), stream)
        device.record(there, stream)
        device.wait(there)

    return round_trip


def measure(num_rows: int, repetitions: int) -> dict[str, float]:
    """Medians in microseconds per segment, by mode; the round trip is one, and the fake engines are numpy."""
    inputs = {name: np.ones((num_rows, LENGTH), np.int64) for name in ("input_ids", "attention_mask")}
    with ExitStack() as stack:
        runners = {name: stack.enter_context(make_runner(options)) for name, options in MODES.items()}
        calls: dict[str, Callable[[], object]] = {
            name: lambda runner=runner: runner.run(inputs) for name, runner in runners.items()
        }
        assert all((runner.run(inputs).exit_index == SEGMENTS - 1).all() for runner in runners.values())
        fakes = fake_runner([0.6] * SEGMENTS, POLICY, INPUTS)
        calls |= {"no device": lambda: fakes.run(inputs), "round trip": make_round_trip()}
        times_ms = interleaved_ms(calls, repetitions, warmup=50)  # graphs are made meanwhile
    per = {name: 1 if name == "round trip" else SEGMENTS for name in calls}
    return {name: round(float(np.median(times)) * 1e3 / per[name], 1) for name, times in times_ms.items()}


def main() -> None:
    """Print a line per batch, and at the end one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows the script, no result")
    options = parser.parse_args()
    document: dict[str, Any] = {"bench": "cuda_overhead", "machine": describe_machine()}
    sm = compute_capability()
    if not sm:
        print("needs a GPU; none here. Nothing was measured.")
        print(json.dumps(document | {"measured": False, "needs": "a GPU"}))
        return
    document["machine"] = {**describe_machine(), "sm": sm}
    cases = {}
    for num_rows in (1, ROWS_AT_MOST):
        cases[num_rows] = measure(num_rows, 20 if options.quick else 2000)
        print(f"batch {num_rows:2}: us per segment:", ", ".join(f"{name} {us}" for name, us in cases[num_rows].items()))
    print(json.dumps(document | {"measured": True, "us_per_segment": cases}))


if __name__ == "__main__":
    main()
