"""The tiny bundle as TensorRT engines on fake devices: ONNX Runtime computes what a plan would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from numpy.typing import NDArray

from offramp.bundle import FileRecord, Manifest, PlanRecord, SegmentSpec, load_manifest, read_file
from offramp.policy import Policy
from offramp.runtime import Runner, TensorRtOptions
from offramp.runtime.onnxruntime_engine import open_session
from offramp.runtime.tensorrt.engine import TensorRtChain, planned_segments
from offramp.runtime.tensorrt.fake_device import FakeDevice
from offramp.runtime.tensorrt.fake_plan import FakePlan, FakeTensor, Function

SIZES = {"rows": tiny.MAX_ROWS, "previous": tiny.MAX_ROWS, "sequence": tiny.MAX_LENGTH}


def segment_tensors(segment: SegmentSpec) -> dict[str, FakeTensor]:
    """The tensors of a segment of the tiny bundle, as its plan has them."""
    tensors = {"inverse_temperature": FakeTensor("float32", (), True)}
    if segment.index:
        tensors["rows"] = FakeTensor("int64", ("rows",), True)
    tensors |= {s.name: FakeTensor(s.dtype, s.shape, True) for s in tiny.INPUTS if s.name in segment.inputs}
    tensors |= {t.name: FakeTensor(t.dtype, ("previous", *t.shape[1:]), True) for t in segment.carry_in}
    tensors |= {t.name: FakeTensor(t.dtype, t.shape, False) for t in segment.carry_out}
    return tensors | {
        "logits": FakeTensor("float32", ("rows", tiny.NUM_CLASSES), False),
        "prediction": FakeTensor("int64", ("rows",), False),
        "scores": FakeTensor("float32", ("rows", 3), False),
    }


def session_function(
    bundle: Path, segment: SegmentSpec
) -> Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    """What ONNX Runtime makes of a segment, by name."""
    session = open_session(read_file(bundle, segment.graphs["fp32"]), 1, "tiny")
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _telling(bundle: Path, segment: SegmentSpec, row_outputs: Sequence[str]) -> tuple[dict[str, FakeTensor], Function]:
    """The tensors and the function of a segment, which may tell more of its rows: half and a third of the margin."""
    tensors, function = segment_tensors(segment), session_function(bundle, segment)
    tensors |= {name: FakeTensor("float32", ("rows",), False) for name in row_outputs}

    def telling(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = function(inputs)
        others = {"learned": outputs["scores"][:, 1] / 2, "retention": outputs["scores"][:, 1] / 3}
        return {**outputs, **{name: others[name] for name in row_outputs}}

    return tensors, telling


def plan_record(segment: SegmentSpec, **changes: Any) -> PlanRecord:
    """The record of a plan with the widest profile."""
    profile = {
        name: tuple(
            tuple(size if isinstance(size, int) else pick(SIZES[size]) for size in shape)
            for pick in (lambda size: 1, lambda size: (size + 1) // 2, lambda size: size)
        )
        for name, (_, shape, is_input) in segment_tensors(segment).items()
        if is_input and shape
    }
    file = FileRecord(f"segments/{segment.index:02d}/plans/x.plan", 4, "0" * 64)
    record = PlanRecord(file, "x", "tensorrt-rtx", "fp16", "1.7.1.116", ("8.6",), profile, 1.0, 0.1)
    return replace(record, **changes)


class Faked:
    """A chain on fake devices: `plans` and the `devices` made so far, one per thread."""

    def __init__(
        self,
        bundle: Path,
        options: TensorRtOptions = TensorRtOptions(),  # noqa: B008  (frozen)
        make_device: Callable[[], FakeDevice] = FakeDevice,
        *,
        has_own_graphs: bool = False,
        row_outputs: Sequence[str] = (),
    ) -> None:
        self.manifest: Manifest = load_manifest(bundle)
        self.devices: list[FakeDevice] = []
        self.plans = [
            FakePlan(*_telling(bundle, s, row_outputs), SIZES, has_own_graphs=has_own_graphs)
            for s in self.manifest.segments
        ]
        records = [plan_record(segment) for segment in self.manifest.segments]
        segments = planned_segments(self.manifest, records, self.plans)

        def open_device() -> FakeDevice:
            self.devices.append(make_device())
            return self.devices[-1]

        self.chain = TensorRtChain(segments, open_device, options)

    def runner(self, policy: Policy) -> Runner:
        """A runner over the chain."""
        return Runner(self.chain.engines, self.manifest, policy, backend="tensorrt-rtx", precision="fp16")


def random_request(rng: np.random.Generator, num_rows: int) -> tiny.Inputs:
    """Token lists of random lengths and contents."""
    lengths = rng.integers(1, tiny.MAX_LENGTH + 1, num_rows)
    return tiny.request([rng.integers(0, tiny.NUM_TOKENS, length).tolist() for length in lengths])


Compare = Callable[[Any, Any], None]  # two Results; raises AssertionError


def compare_all_sizes(runner: Runner, plain: Runner, policies: Sequence[Policy], compare: Compare) -> None:
    """Both answer alike under every policy, for all sizes of requests that fit at once and one that does not."""
    rng = np.random.default_rng(0)
    for policy in policies:
        runner.policy = plain.policy = policy
        for num_rows in (*range(1, tiny.MAX_ROWS + 1), 3 * tiny.MAX_ROWS):
            inputs = random_request(rng, num_rows)
            for _ in range(4):  # plainly, proving a graph, and by its replay
                compare(runner.run(inputs), plain.run(inputs))


def compare_in_threads(runner: Runner, plain: Runner, requests: int, compare: Compare, threads: int = 4) -> None:
    """Both answer alike to random requests of several threads, all of them alive at once."""
    barrier = threading.Barrier(threads)

    def work(seed: int) -> None:
        barrier.wait(timeout=60)
        rng = np.random.default_rng(seed)
        for _ in range(requests):
            inputs = random_request(rng, int(rng.integers(1, 20)))
            compare(runner.run(inputs), plain.run(inputs))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))  # raises what any of them raised


def log_of(devices: Sequence[FakeDevice]) -> list[str]:
    """What all devices were asked."""
    return [entry for device in devices for entry in device.log]
