"""Plans for a whole bundle: real TensorRT-RTX builds on a bundle made by hand."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import external_data_helper
from tiny_bundle import first_segment, last_segment, make_bundle

from offramp.bundle import Manifest, load_manifest, read_file
from offramp.errors import BackendError, BuildError, BundleError, CorruptError, OptionError, StorageError
from offramp.export import tensorrt_builder
from offramp.export.build_engine import BuildOptions, BuildReport, build_engines
from offramp.export.tensorrt_builder import BuilderOptions
from offramp.plan import check_plan_header, plan_header, plan_obstacle


@pytest.fixture
def bundle(tmp_path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """What pressing Ctrl-C does; a shell may have started the tests with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def actions(report: BuildReport) -> list[str]:
    return [build.action for build in report.segments]


def files(bundle: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def plan_keys(manifest: Manifest) -> list[list[str]]:
    return [[plan.key for plan in segment.plans] for segment in manifest.segments]


def test_the_tiny_bundle_is_a_chain_that_runs(bundle):
    """The graphs that the plans are built from obey the segment contract."""
    first, last = (
        ort.InferenceSession(read_file(bundle, segment.graphs["fp32"])) for segment in load_manifest(bundle).segments
    )
    one = np.array(1, np.float32)
    ids, mask = np.arange(12).reshape(4, 3), np.ones((4, 3), np.int64)
    hidden, flags, *_ = first.run(None, {"input_ids": ids, "attention_mask": mask, "inverse_temperature": one})
    rows = np.array([3, 1])
    feed = {"rows": rows, "carry_in_0": hidden, "carry_in_1": flags, "inverse_temperature": one}
    logits, prediction, scores = last.run(None, feed)
    assert (logits.shape, prediction.shape, scores.shape) == ((2, 2), (2,), (2, 3))
    np.testing.assert_allclose(scores[:, 0] - scores[:, 1], 1 - scores[:, 0], atol=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_segment_gets_a_plan_that_says_who_built_it(bundle, precision: str):
    report = build_engines(bundle, BuildOptions(precision=precision))
    manifest = load_manifest(bundle)
    assert actions(report) == ["build", "build"]
    for build, segment in zip(report.segments, manifest.segments, strict=True):
        (plan,) = segment.plans
        content = read_file(bundle, plan.file)
        check_plan_header(content, plan)
        assert plan_header(content).version == report.version == plan.version
        assert (plan.backend, plan.precision, plan.targets) == ("tensorrt-rtx", precision, report.targets)
        assert (plan.key, plan.file.path, plan.file.bytes) == (build.key, build.path, build.bytes)
        assert plan.file.path == f"segments/{segment.index:02d}/plans/{plan.key}.plan"
        assert (plan.fp16_share > 0) == (precision == "fp16")
        assert plan.seconds > 0
        assert plan_obstacle(plan, report.version, "8.6") == ""
        assert "SM 7.5" in plan_obstacle(plan, report.version, "7.5")
    assert report.segments[1].fp32_weight_bytes == 4 * (32 * 32 + 32 * 2 + 1)


def test_shapes_reach_the_later_segments(bundle):
    options = BuildOptions(
        min_shapes={"input_ids": (2, 4)}, opt_shapes={"input_ids": (4, 16)}, max_shapes={"input_ids": (8, 32)}
    )
    build_engines(bundle, options)
    first, last = (segment.plans[0].profile for segment in load_manifest(bundle).segments)
    assert first == dict.fromkeys(("input_ids", "attention_mask"), ((2, 4), (4, 16), (8, 32)))
    assert last == {
        "rows": ((1,), (4,), (8,)),
        "carry_in_0": ((2, 4, 32), (4, 16, 32), (8, 32, 32)),
        "carry_in_1": ((2, 1, 4), (4, 1, 16), (8, 1, 32)),
    }


def test_a_second_build_reuses_and_force_does_not(bundle):
    first = build_engines(bundle, BuildOptions())
    before = files(bundle)
    second = build_engines(bundle, BuildOptions())
    assert actions(second) == ["reuse", "reuse"]
    assert files(bundle) == before
    assert [(b.bytes, b.fp16_share, b.seconds) for b in second.segments] == [
        (b.bytes, b.fp16_share, b.seconds) for b in first.segments
    ]
    assert actions(build_engines(bundle, BuildOptions(force=True))) == ["build", "build"]
    assert plan_keys(load_manifest(bundle)) == [[b.key] for b in first.segments]


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(precision="fp32"),
        BuildOptions(opt_shapes={"input_ids": (1, 24)}),
        BuildOptions(builder=BuilderOptions(opt_level=2)),
        BuildOptions(builder=BuilderOptions(workspace_mib=64)),
        BuildOptions(builder=BuilderOptions(compute_capabilities=("8.6",))),
    ],
)
def test_whatever_changes_the_plan_changes_the_key(bundle, options: BuildOptions):
    usual = build_engines(bundle, BuildOptions(dry_run=True))
    other = build_engines(bundle, BuildOptions(**{**vars(options), "dry_run": True}))
    assert all(a.key != b.key for a, b in zip(usual.segments, other.segments, strict=True))


def test_another_version_of_tensorrt_changes_the_key(bundle, monkeypatch):
    usual = build_engines(bundle, BuildOptions(dry_run=True))
    monkeypatch.setattr("tensorrt_rtx.__version__", "1.8.0.1")
    newer = build_engines(bundle, BuildOptions(dry_run=True))
    assert newer.version == "1.8.0.1"
    assert all(a.key != b.key for a, b in zip(usual.segments, newer.segments, strict=True))


def test_another_segment_has_another_key(bundle):
    report = build_engines(bundle, BuildOptions(dry_run=True))
    assert report.segments[0].key != report.segments[1].key


def test_a_dry_run_says_and_writes_nothing(bundle):
    before = files(bundle)
    report = build_engines(bundle, BuildOptions(dry_run=True))
    assert report.dry_run
    assert actions(report) == ["build", "build"]
    assert report.segments[0].profile["input_ids"] == ((1, 2), (1, 11), (8, 64))
    assert files(bundle) == before
    build_engines(bundle, BuildOptions())
    assert actions(build_engines(bundle, BuildOptions(dry_run=True))) == ["reuse", "reuse"]
    assert actions(build_engines(bundle, BuildOptions(dry_run=True, force=True))) == ["build", "build"]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"vtrt"), lambda path: path.unlink()])
def test_a_damaged_plan_is_built_again(bundle, damage):
    report = build_engines(bundle, BuildOptions())
    damage(bundle / report.segments[0].path)
    assert actions(build_engines(bundle, BuildOptions())) == ["build", "reuse"]
    manifest = load_manifest(bundle)
    assert read_file(bundle, manifest.segments[0].plans[0].file)


def test_ctrl_c_cancels_and_the_next_build_goes_on(bundle, ctrl_c):
    pressed = []

    def press_in_last(segment: int, fraction: float, phase: str) -> None:
        if segment == 1 and not pressed:
            pressed.append(phase)
            ctrl_c()

    with pytest.raises(BuildError, match=r"segment 1: .*cancelled") as caught:
        build_engines(bundle, BuildOptions(), press_in_last)
    assert pressed
    assert isinstance(caught.value.__cause__.__cause__, KeyboardInterrupt)
    manifest = load_manifest(bundle)
    assert [len(segment.plans) for segment in manifest.segments] == [1, 0]
    assert read_file(bundle, manifest.segments[0].plans[0].file)
    assert not list(bundle.glob("segments/01/plans/*"))
    assert actions(build_engines(bundle, BuildOptions())) == ["reuse", "build"]


def test_what_the_progress_callback_raises_comes_back(bundle):
    before = files(bundle)

    def fail(segment: int, fraction: float, phase: str) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        build_engines(bundle, BuildOptions(), fail)
    assert files(bundle) == before


def test_progress_is_told_by_segment(bundle):
    seen: dict[int, list[float]] = {}
    build_engines(bundle, BuildOptions(), lambda segment, fraction, _: seen.setdefault(segment, []).append(fraction))
    assert list(seen) == [0, 1]
    assert all(fractions[-1] == 1.0 for fractions in seen.values())


def test_a_graph_that_pretends_to_be_fp16_is_refused(tmp_path):
    graphs = [{"fp16": first_segment("fp16")}, {"fp16": last_segment("fp32")}]
    bundle = make_bundle(tmp_path / "bundle", graphs)
    with pytest.raises(BuildError, match=r"segment 1: building an FP16 plan: .*FP32"):
        build_engines(bundle, BuildOptions())
    assert [len(segment.plans) for segment in load_manifest(bundle).segments] == [1, 0]


def test_the_segment_and_the_node_are_named(tmp_path):
    broken = last_segment("fp32")
    (node,) = [node for node in broken.graph.node if node.op_type == "Relu"]
    node.op_type, node.name = "NoSuchThing", "layer_3/odd_one"
    bundle = make_bundle(tmp_path / "bundle", [{"fp32": first_segment("fp32")}, {"fp32": broken}])
    with pytest.raises(BuildError, match=r"segment 1: .*node 'layer_3/odd_one' \(NoSuchThing\)"):
        build_engines(bundle, BuildOptions(precision="fp32"))


def test_tensorrt_without_a_gpu_is_refused_before_anything_is_written(bundle, monkeypatch):
    monkeypatch.setattr(tensorrt_builder, "compute_capability", lambda: "")
    before = files(bundle)
    with pytest.raises(BackendError, match="--backend tensorrt-rtx"):
        build_engines(bundle, BuildOptions(builder=BuilderOptions(backend="tensorrt")))
    assert files(bundle) == before


def test_a_precision_that_was_not_exported(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", [{"fp32": first_segment("fp32")}, {"fp32": last_segment("fp32")}])
    with pytest.raises(OptionError, match=r"segment 0 .* only fp32; .*offramp export MODEL .*--precision fp16"):
        build_engines(bundle, BuildOptions())


@pytest.mark.parametrize("precision", ["int4", "", "FP16"])
def test_an_unknown_precision(precision: str):
    with pytest.raises(OptionError, match="expected one of fp16, fp32"):
        BuildOptions(precision=precision)


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(min_shapes={"ids": (1, 4)}),
        BuildOptions(opt_shapes={"input_ids": (1,)}),
        BuildOptions(max_shapes={"input_ids": (1, 65)}),
        BuildOptions(min_shapes={"input_ids": (1, 32)}, max_shapes={"input_ids": (1, 16)}),
        BuildOptions(builder=BuilderOptions(compute_capabilities=("9.0",))),
    ],
)
def test_bad_options_write_nothing(bundle, options: BuildOptions):
    before = files(bundle)
    with pytest.raises(OptionError):
        build_engines(bundle, options)
    assert files(bundle) == before


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="offramp export"):
        build_engines(tmp_path, BuildOptions())


def test_an_altered_graph_is_never_parsed(bundle, monkeypatch):
    graph = bundle / "segments/00/model.fp16.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(onnx, "load_from_string", lambda content: pytest.fail("parsed"))
    with pytest.raises(CorruptError, match=r"segments/00/model\.fp16\.onnx"):
        build_engines(bundle, BuildOptions())


def test_a_file_that_is_no_graph(tmp_path):
    class Garbage:
        def SerializeToString(self, deterministic: bool) -> bytes:  # noqa: N802
            return b"\xff no graph"

    bundle = make_bundle(tmp_path / "bundle", [{"fp16": first_segment("fp16")}, {"fp16": Garbage()}])
    with pytest.raises(CorruptError, match="no ONNX graph"):
        build_engines(bundle, BuildOptions())


def test_weights_outside_the_bundle_are_refused(tmp_path):
    outside = last_segment("fp16")
    external_data_helper.set_external_data(outside.graph.initializer[0], "../../secret.bin")
    outside.graph.initializer[0].ClearField("raw_data")
    bundle = make_bundle(tmp_path / "bundle", [{"fp16": first_segment("fp16")}, {"fp16": outside}])
    with pytest.raises(BundleError, match="'weight' in another file"):
        build_engines(bundle, BuildOptions())


def test_a_dimension_the_manifest_does_not_know(tmp_path):
    strange = last_segment("fp16")
    strange.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "width"
    bundle = make_bundle(tmp_path / "bundle", [{"fp16": first_segment("fp16")}, {"fp16": strange}])
    with pytest.raises(BundleError, match=r"'carry_in_0' has the dimension 'width'"):
        build_engines(bundle, BuildOptions())


def test_a_full_disk_leaves_the_bundle_as_it_was(bundle, monkeypatch):
    before = files(bundle)

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="the disk is full"):
        build_engines(bundle, BuildOptions())
    assert files(bundle) == before


def test_a_place_that_cannot_be_written(bundle):
    (bundle / "segments/00/plans").write_text("a file where the directory should be")
    with pytest.raises(StorageError, match="writing"):
        build_engines(bundle, BuildOptions())
    assert plan_keys(load_manifest(bundle)) == [[], []]


def test_torch_stays_out():
    heavy = ("torch", "tensorrt", "tensorrt_rtx", "rich", "onnxruntime")
    code = f"import sys, offramp.export.build_engine; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
