"""Opening a bundle on TensorRT: which plans, which errors, and the real device's code on simulated libraries."""

from __future__ import annotations

import struct
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from faked import plan_record, segment_tensors, session_function
from simulated import SimulatedCuda, SimulatedEngine, SimulatedTensorRt

from offramp.bundle import PlanRecord, file_record, load_manifest, save_manifest
from offramp.errors import BackendError, BundleError, CorruptError, InputError, OfframpError, PlanError
from offramp.gpu import compute_capability
from offramp.policy import Policy
from offramp.runtime import PlanWarning, Runner, TensorRtOptions, backends
from offramp.runtime.tensorrt import cuda_device, loaded_plan
from offramp.runtime.tensorrt.worker import GraphWarning

VERSION = "1.7.1.116"
_TAGS = {"tensorrt": 0x74727466, "tensorrt-rtx": 0x74727476}
POLICY = Policy.thresholds("max_prob", [0.6, 0.8])


def header(backend: str, last: int) -> bytes:
    return struct.pack("<I20x4B", _TAGS[backend], 1, 7, 1, 116) + bytes([last])


class Gpu:
    """A bundle with plans, on a machine with a simulated GPU and its libraries; `fail` names calls that fail."""

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        self.bundle, self.backend = bundle, backend
        manifest = tiny.make_bundle(bundle, POLICY)
        self.cuda, self.fail = SimulatedCuda(), set[str]()
        engines = []
        for segment in manifest.segments:
            self.add_plan(plan_record(segment, backend=backend), segment.index)
            function = session_function(bundle, segment)
            engines.append(SimulatedEngine(self.cuda, segment_tensors(segment), function, self.fail))
        self.engines = engines
        module = SimulatedTensorRt(engines, self.fail)
        loaded_plan._tensorrt.cache_clear()
        monkeypatch.setattr(cuda_device, "cuda", self.cuda)
        monkeypatch.setattr(loaded_plan, "importlib", SimpleNamespace(import_module=lambda name: module))
        monkeypatch.setattr(backends, "installed_version", lambda name: VERSION if name == backend else "")
        monkeypatch.setattr(backends, "compute_capability", lambda: "8.6")

    def add_plan(self, record: PlanRecord, index: int) -> None:
        """Store and record a plan of segment `index`; what is simulated finds its engine by the last byte."""
        manifest = load_manifest(self.bundle)
        content = header(record.backend, index)
        path = f"segments/{index:02d}/plans/{record.key}.plan"
        (self.bundle / path).parent.mkdir(exist_ok=True)
        (self.bundle / path).write_bytes(content)
        segments = list(manifest.segments)
        record = replace(record, file=file_record(path, content))
        segments[index] = replace(segments[index], plans=(*segments[index].plans, record))
        save_manifest(self.bundle, replace(manifest, segments=tuple(segments)))

    def change_plans(self, change: Callable[[PlanRecord], PlanRecord]) -> None:
        """Change the record of every plan."""
        manifest = load_manifest(self.bundle)
        segments = tuple(replace(s, plans=tuple(map(change, s.plans))) for s in manifest.segments)
        save_manifest(self.bundle, replace(manifest, segments=segments))


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def gpu(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(tmp_path / "bundle", monkeypatch, request.param)


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_the_real_device_answers_as_onnxruntime_on_simulated_libraries(gpu: Gpu, graphs: bool, speculate: bool) -> None:
    options = TensorRtOptions(graphs, speculate)
    with (
        Runner.open(gpu.bundle, tensorrt=options) as runner,
        Runner.open(gpu.bundle, "onnxruntime") as plain,
    ):
        assert runner.files == tuple(s.plans[0].file.sha256 for s in load_manifest(gpu.bundle).segments)
        assert (runner.backend, runner.precision, plain.precision) == (gpu.backend, "fp16", "fp32")
        for num_rows in (3, 3, 3, 1, 20):
            inputs = tiny.request(tiny.sentences(num_rows))
            tiny.assert_same(runner.run(inputs), plain.run(inputs))
        launches = sum(isinstance(one, list) for one in gpu.cuda.alive.values())
        assert (launches > 0) == (graphs and gpu.backend == "tensorrt")  # TensorRT-RTX makes its own
    assert gpu.cuda.alive == {}  # everything was given back


FAILURES = {  # what fails -> the words of the error
    "Runtime": (BackendError, "made no runtime: it gave no reason; check the NVIDIA driver"),
    "deserialize_cuda_engine": (PlanError, "x.plan: .* cannot run it here: Version tag does not match; run `offramp b"),
    "create_execution_context": (BackendError, "made no execution context"),
    "set_input_shape": (BackendError, "refuses the shape"),
    "set_tensor_address": (BackendError, "refuses the address"),
    "get_max_output_size": (BackendError, "knows no largest size"),
    "get_tensor_location": (PlanError, "is a shape, or of a type"),
    "cudaGetDeviceCount": (BackendError, "CUDA finds none .*; install an NVIDIA driver"),
    "cudaMalloc": (BackendError, "allocating .* cudaErrorMemoryAllocation: out of memory; close other users"),
    "cudaHostAlloc": (BackendError, "pinned memory: cudaErrorMemoryAllocation"),
    "cudaStreamCreateWithFlags": (BackendError, "making a CUDA stream"),
    "cudaEventCreateWithFlags": (BackendError, "making a CUDA event"),
}


@pytest.mark.parametrize("failing", FAILURES)
def test_whatever_fails_while_opening_is_an_error_and_nothing_is_kept(gpu: Gpu, failing: str) -> None:
    kind, message = FAILURES[failing]
    (gpu.cuda.fail if failing.startswith("cuda") else gpu.fail).add(failing)
    with pytest.raises(kind, match=message):
        Runner.open(gpu.bundle, gpu.backend)
    assert gpu.cuda.alive == {}


@pytest.mark.parametrize(
    "failing", ["execute_async_v3", "get_tensor_shape", "cudaMemcpyAsync", "cudaEventRecord", "cudaEventSynchronize"]
)
def test_whatever_fails_while_running_is_an_error_and_passes(gpu: Gpu, failing: str) -> None:
    fail = gpu.cuda.fail if failing.startswith("cuda") else gpu.fail
    inputs = tiny.request(tiny.sentences(3))
    with Runner.open(gpu.bundle, gpu.backend) as runner:
        expected = runner.run(inputs)
        fail.add(failing)
        with pytest.raises(BackendError):
            runner.run(tiny.request(tiny.sentences(5)))  # shapes that are new
        fail.clear()
        tiny.assert_same(runner.run(inputs), expected)


@pytest.mark.parametrize("failing", ["cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    gpu = Gpu(tmp_path, monkeypatch, "tensorrt")
    inputs = tiny.request(tiny.sentences(3))
    with Runner.open(gpu.bundle) as runner:
        expected = runner.run(inputs)
        gpu.cuda.fail.add(failing)
        with pytest.warns(GraphWarning, match="cudaErrorMemoryAllocation"):
            tiny.assert_same(runner.run(inputs), expected)
        tiny.assert_same(runner.run(inputs), expected)


def test_the_runtime_cache_is_kept_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(tmp_path / "bundle", monkeypatch, "tensorrt-rtx")
    cache = tmp_path / "cache"
    cache.mkdir()
    for content in (b"kernels", b"kernels and more"):
        Runner.open(gpu.bundle, tensorrt=TensorRtOptions(runtime_cache=cache)).close()
        assert (cache / "x.cache").read_bytes() == content
    assert [config.cuda_graph_strategy for config in gpu.engines[0].configs] == ["whole", "whole"]


def test_a_plan_that_was_altered_reaches_nobody(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_plan, "load_plans", lambda *_: pytest.fail("loaded"))
    (gpu.bundle / "segments/01/plans/x.plan").write_bytes(header(gpu.backend, 2))
    with pytest.raises(CorruptError, match=r"01/plans/x.plan is not the file"):
        Runner.open(gpu.bundle, gpu.backend)


def test_a_plan_of_another_version_than_recorded_is_refused(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.change_plans(lambda plan: replace(plan, version="1.7.1.117"))
    monkeypatch.setattr(backends, "installed_version", lambda name: "1.7.1.117")
    with pytest.raises(PlanError, match=r"was written by .* 1.7.1.116, its record says .* 1.7.1.117"):
        Runner.open(gpu.bundle, gpu.backend)


def test_a_plan_of_another_segment_is_refused(gpu: Gpu) -> None:
    gpu.engines[1].tensors = gpu.engines[2].tensors
    with pytest.raises(PlanError, match=r"01/plans/x.plan: its tensor 'carry_out_0' is missing, the manifest expects"):
        Runner.open(gpu.bundle, gpu.backend)


def test_a_plan_without_a_profile_is_refused(gpu: Gpu) -> None:
    gpu.change_plans(lambda plan: replace(plan, profile={}))
    with pytest.raises(PlanError, match="no profile for input 'ids'"):
        Runner.open(gpu.bundle, gpu.backend)


def test_smaller_profiles_split_and_refuse(gpu: Gpu) -> None:
    def shrink(plan: PlanRecord) -> PlanRecord:
        profile = {
            name: tuple(
                tuple(min(size, limit) for size, limit in zip(shape, (3, 5, 4), strict=False)) for shape in bounds
            )
            for name, bounds in plan.profile.items()
        }
        profile |= {name: tuple((min(b[0], 3), *b[1:]) for b in bounds) for name, bounds in profile.items()}
        return replace(plan, profile=profile | {k: v for k, v in plan.profile.items() if k == "carry_in_1"})

    gpu.change_plans(shrink)
    inputs = tiny.request(tiny.sentences(8)[:1] * 8, width=4)
    with Runner.open(gpu.bundle, gpu.backend) as runner, Runner.open(gpu.bundle, "onnxruntime") as plain:
        assert {name: size.max for name, size in runner.manifest.dimensions.items()} == {"rows": 3, "sequence": 5}
        tiny.assert_same(runner.run(inputs), plain.run(inputs))
        with pytest.raises(InputError, match="sequence"):
            runner.run(tiny.request([[1] * 6]))


def test_a_later_segment_with_model_inputs_is_refused(gpu: Gpu) -> None:
    manifest = load_manifest(gpu.bundle)
    late = replace(manifest.segments[1], inputs=("mask",))
    save_manifest(gpu.bundle, replace(manifest, segments=(manifest.segments[0], late, manifest.segments[2])))
    with pytest.raises(BundleError, match=r"segment 1 .* reads the model inputs mask"):
        Runner.open(gpu.bundle, gpu.backend)


def test_a_precision_without_plans_is_refused_with_the_command(gpu: Gpu) -> None:
    with pytest.raises(PlanError, match=rf"no fp32 plan .*--backend {gpu.backend} --precision fp32"):
        Runner.open(gpu.bundle, gpu.backend, precision="fp32")


def test_auto_falls_back_to_onnxruntime_and_says_why(gpu: Gpu) -> None:
    gpu.fail.add("deserialize_cuda_engine")
    with pytest.warns(PlanWarning, match=r"Version tag does not match.*; running on ONNX Runtime instead") as caught:
        runner = Runner.open(gpu.bundle)
    assert runner.backend == "onnxruntime"
    assert caught[0].filename == __file__


def test_auto_takes_the_precision_that_there_are_plans_for(gpu: Gpu) -> None:
    gpu.change_plans(lambda plan: replace(plan, precision="fp32"))
    with Runner.open(gpu.bundle) as runner:
        assert (runner.backend, runner.precision) == (gpu.backend, "fp32")


def test_without_cuda_bindings_the_package_is_named(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "offramp.runtime.tensorrt.cuda_device")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=rf"pip install 'offramp\[{gpu.backend}\]'"):
        Runner.open(gpu.bundle, gpu.backend)


def test_without_tensorrt_or_a_gpu_the_backend_is_refused(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "compute_capability", lambda: "")
    with pytest.raises(BackendError, match=rf"{gpu.backend} {VERSION} runs on an NVIDIA GPU .* this machine has none"):
        Runner.open(gpu.bundle, gpu.backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Runner.open(gpu.bundle).backend == "onnxruntime"
    monkeypatch.setattr(backends, "installed_version", lambda name: "")
    with pytest.raises(BackendError, match=rf"is not installed; run `pip install 'offramp\[{gpu.backend}\]'`"):
        Runner.open(gpu.bundle, gpu.backend)


@pytest.mark.skipif(bool(compute_capability()), reason="this machine has a GPU")
def test_the_real_bindings_say_that_there_is_no_gpu() -> None:
    with pytest.raises(BackendError, match=r"CUDA finds none .*; install an NVIDIA driver"):
        cuda_device.open_device()
    with pytest.raises(OfframpError, match="CUDA finds none"):
        loaded_plan.load_plans([], [], True, None)
