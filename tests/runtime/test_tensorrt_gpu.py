"""Real plans: built here by TensorRT-RTX, which needs no GPU; run by `make test-gpu` on a machine that has one."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
from faked import Faked, compare_all_sizes, compare_in_threads

from offramp.bundle import load_manifest
from offramp.errors import BackendError
from offramp.export.build_engine import BuildOptions, build_engines
from offramp.export.tensorrt_builder import BuilderOptions
from offramp.gpu import compute_capability
from offramp.plan import choose_plans, gpu_obstacle
from offramp.policy import Policy
from offramp.runtime import Runner, TensorRtOptions
from offramp.runtime.backends import installed_version
from offramp.runtime.tensorrt.engine import planned_segments
from offramp.runtime.tensorrt.lane import RowRange
from offramp.runtime.tensorrt.worker import GraphWarning

# Of logits up to 11 and scores in [0, 1]. All sums of the tiny model are exact in FP16; not yet seen on a GPU.
LOGIT_TOLERANCE, SCORE_TOLERANCE = 0.01, 1e-3
POLICY = Policy.thresholds("max_prob", [0.6, 0.8])


def build(bundle: Path, backend: str) -> None:
    for precision in ("fp16", "fp32"):
        build_engines(bundle, BuildOptions(precision=precision, builder=BuilderOptions(backend=backend)))


@pytest.fixture(scope="module")
def rtx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with plans of TensorRT-RTX for every segment."""
    path = tmp_path_factory.mktemp("rtx") / "bundle"
    tiny.make_bundle(path, POLICY)
    build(path, "tensorrt-rtx")
    return path


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_records_of_real_plans_are_all_the_engine_needs(rtx_bundle: Path, precision: str) -> None:
    manifest = load_manifest(rtx_bundle)
    plans = choose_plans(manifest, "tensorrt-rtx", precision, installed_version("tensorrt-rtx"), "8.6")
    assert [plan.precision for plan in plans] == [precision] * 3
    segments = planned_segments(manifest, plans, Faked(rtx_bundle).plans)
    assert [segment.rows for segment in segments] == [RowRange(1, tiny.MAX_ROWS)] * 3
    sizes = (tiny.MAX_ROWS, tiny.MAX_LENGTH)
    assert segments[0].max_shapes == {"ids": sizes, "mask": sizes}
    assert segments[2].max_shapes["carry_in_0"] == (*sizes, tiny.WIDTH)


@pytest.mark.skipif(bool(compute_capability()), reason="this machine has a GPU")
def test_without_a_gpu_real_plans_are_refused_and_auto_runs_on_the_cpu(rtx_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"tensorrt-rtx .* runs on an NVIDIA GPU with a driver"):
        Runner.open(rtx_bundle, "tensorrt-rtx")
    with Runner.open(rtx_bundle) as runner:
        assert runner.backend == "onnxruntime"


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def gpu_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle with plans for the GPU here, and their backend."""
    backend: str = request.param
    if not compute_capability():
        pytest.skip(f"no NVIDIA GPU: not shown that {backend} runs plans")
    if not installed_version(backend):
        pytest.skip(f"package missing: not shown that {backend} runs plans")
    if obstacle := gpu_obstacle(backend, compute_capability()):
        pytest.skip(f"not shown that {backend} runs plans: {obstacle}")
    path = tmp_path_factory.mktemp(backend) / "bundle"
    tiny.make_bundle(path, POLICY)
    build(path, backend)
    return path, backend


def assert_close(got: object, expected: object) -> None:
    """Two Results agree: decisions exactly, numbers within the tolerances."""
    np.testing.assert_allclose(got.outputs["logits"], expected.outputs["logits"], atol=LOGIT_TOLERANCE)  # type: ignore[attr-defined]
    np.testing.assert_allclose(got.score, expected.score, atol=SCORE_TOLERANCE)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(got.exit_index, expected.exit_index)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(got.prediction, expected.prediction)  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_plans_answer_as_onnxruntime(
    gpu_bundle: tuple[Path, str], graphs: bool, speculate: bool, precision: str
) -> None:
    bundle, backend = gpu_bundle
    options = TensorRtOptions(graphs, speculate)
    with (
        warnings.catch_warnings(),
        Runner.open(bundle, backend, precision=precision, tensorrt=options) as runner,
        Runner.open(bundle, "onnxruntime") as plain,
    ):
        warnings.simplefilter("error", GraphWarning)  # graphs must work, not be given up
        compare_all_sizes(runner, plain, (Policy.full_depth(), POLICY), assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("speculate", [False, True])
def test_four_threads_share_the_plans(gpu_bundle: tuple[Path, str], speculate: bool) -> None:
    bundle, backend = gpu_bundle
    options = TensorRtOptions(speculate=speculate)
    with Runner.open(bundle, backend, tensorrt=options) as runner, Runner.open(bundle, "onnxruntime") as plain:
        compare_in_threads(runner, plain, 200, assert_close)


@pytest.mark.gpu
def test_auto_runs_on_the_gpu(gpu_bundle: tuple[Path, str], tmp_path: Path) -> None:
    bundle, backend = gpu_bundle
    with Runner.open(bundle, tensorrt=TensorRtOptions(runtime_cache=tmp_path)) as runner:
        assert (runner.backend, runner.precision) == (backend, "fp16")
        assert runner.run(tiny.request(tiny.sentences(3))).prediction.shape == (3,)
    assert bool(list(tmp_path.iterdir())) == (backend == "tensorrt-rtx")
