"""Opening bundles that are damaged, too new, or meant for another machine."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny

from offramp.bundle import FileRecord, PlanRecord, load_manifest, save_manifest
from offramp.certificate import Certificate, CertificateWarning
from offramp.errors import BackendError, BundleError, CertificateError, CorruptError, OptionError, VersionError
from offramp.policy import Policy
from offramp.runtime import Baseline, Monitor, PlanWarning, Runner, backends

GRAPH = "segments/01/model.onnx"


def edit_manifest(bundle: Path, **changes: Any) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], type[BundleError], list[str]]] = {
    "not a bundle": (
        lambda b: (b / "manifest.json").unlink(),
        BundleError,
        ["not a bundle", "offramp export"],
    ),
    "graph missing": (lambda b: (b / GRAPH).unlink(), CorruptError, [GRAPH, "missing"]),
    "graph empty": (lambda b: (b / GRAPH).write_bytes(b""), CorruptError, [GRAPH, "got 0 bytes"]),
    "graph truncated": (
        lambda b: (b / GRAPH).write_bytes((b / GRAPH).read_bytes()[:-1]),
        CorruptError,
        [GRAPH, "bytes"],
    ),
    "graph altered": (lambda b: flip_a_byte(b / GRAPH), CorruptError, [GRAPH, "SHA-256"]),
    "graph a directory": (
        lambda b: ((b / GRAPH).unlink(), (b / GRAPH).mkdir()),
        CorruptError,
        [GRAPH, "directory"],
    ),
    "policy missing": (lambda b: (b / "policy.json").unlink(), CorruptError, ["policy.json", "missing"]),
    "policy altered": (
        lambda b: flip_a_byte(b / "policy.json"),
        CorruptError,
        ["policy.json", "offramp calibrate"],
    ),
    "tokenizer altered": (
        lambda b: flip_a_byte(b / "tokenizer.json"),
        CorruptError,
        ["tokenizer.json", "SHA-256"],
    ),
    "manifest cut": (
        lambda b: (b / "manifest.json").write_bytes((b / "manifest.json").read_bytes()[:-20]),
        CorruptError,
        ["manifest.json", "export the bundle again"],
    ),
    "newer schema": (lambda b: edit_manifest(b, schema=99), VersionError, ["schema 99", "pip install -U"]),
    "unknown field": (lambda b: edit_manifest(b, colour="red"), CorruptError, ["unknown colour"]),
}


@pytest.mark.parametrize(("damage", "kind", "parts"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_bundle_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], kind: type[BundleError], parts: list[str]
) -> None:
    tiny.make_bundle(tmp_path, tokenizer=b"{}")
    damage(tmp_path)
    with pytest.raises(kind) as caught:
        Runner.open(tmp_path)
    for part in parts:
        assert part in str(caught.value)


def test_a_policy_of_one_s_own_opens_a_bundle_whose_policy_is_damaged(tmp_path: Path) -> None:
    tiny.make_bundle(tmp_path)
    flip_a_byte(tmp_path / "policy.json")
    with Runner.open(tmp_path, policy=Policy.full_depth()) as runner:
        assert runner.run(tiny.request([[1]])).exit_index.tolist() == [2]


def certify(bundle: Path, **changes: Any) -> Certificate:
    """Give the bundle the certificate of what opens it by default, or another one."""
    with Runner.open(bundle) as runner:
        certificate = Certificate(
            risk="consistency",
            max_risk=0.01,
            confidence=0.95,
            method="by hand",
            num_rows=400,
            losses=0,
            p_value=0.018,
            upper_bound=0.0075,
            exit_counts=(300, 60, 40),
            mean_depth=1.35,
            backend=runner.backend,
            precision=runner.precision,
            files=runner.files,
            policy_sha256=runner.policy.sha256,
            trace_sha256="d" * 64,
        )
    certificate = replace(certificate, **changes)
    (bundle / "certificate.json").write_text(certificate.to_json())
    return certificate


def test_a_certificate_that_holds_is_the_runner_s_until_its_policy_changes(tmp_path: Path) -> None:
    tiny.make_bundle(tmp_path)
    certificate = certify(tmp_path)
    with Runner.open(tmp_path, require_certificate=True) as runner:
        assert runner.certificate == certificate
        own = runner.policy
        runner.policy = Policy.thresholds("max_prob", [0.5, 0.5])
        assert runner.certificate is None
        runner.policy = own
        assert runner.certificate == certificate


def test_a_certificate_holds_as_soon_as_its_policy_is_in_force(tmp_path: Path) -> None:
    tiny.make_bundle(tmp_path)
    certificate = certify(tmp_path)
    with Runner.open(tmp_path) as runner:
        own = runner.policy
    with Runner.open(tmp_path, policy=Policy.thresholds("max_prob", [0.5, 0.5])) as runner:
        assert runner.certificate is None
        runner.policy = own
        assert runner.certificate == certificate


def test_what_cannot_be_opened_to_the_end_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[backends.OpenedEngines] = []

    def noted(*args: Any) -> backends.OpenedEngines:
        opened.append(backends.open_engines(*args))
        return opened[-1]

    tiny.make_bundle(tmp_path)
    certify(tmp_path, policy_sha256="0" * 64)
    monkeypatch.setattr("offramp.runtime.runner.open_engines", noted)
    with pytest.raises(CertificateWarning):
        Runner.open(tmp_path)
    for engine in opened[0].engines:
        with pytest.raises(BackendError, match="closed"):
            engine.run([], np.zeros(1, np.int64), np.float32(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "tensorrt"}, "is for tensorrt in fp32"),
        ({"precision": "fp16"}, "in fp16"),
        ({"files": ("0" * 64,) * 3}, "files of segment 0, 1, 2"),
        ({"policy_sha256": "0" * 64}, "for policy 000000000000"),
    ],
)
def test_a_certificate_for_something_else_is_a_warning_or_an_error(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tiny.make_bundle(tmp_path)
    certify(tmp_path, **changes)
    with pytest.warns(CertificateWarning, match=f"{message}.*offramp calibrate"), Runner.open(tmp_path) as runner:
        assert runner.certificate is None
    with pytest.raises(CertificateError, match=message):
        Runner.open(tmp_path, require_certificate=True)


def test_a_damaged_certificate_is_a_warning_or_an_error(tmp_path: Path) -> None:
    tiny.make_bundle(tmp_path)
    certify(tmp_path)
    flip_a_byte(tmp_path / "certificate.json")
    (tmp_path / "certificate.json").write_bytes((tmp_path / "certificate.json").read_bytes()[:-9])
    with pytest.warns(CertificateWarning, match="not JSON"):
        Runner.open(tmp_path).close()
    with pytest.raises(CertificateError, match="not JSON"):
        Runner.open(tmp_path, require_certificate=True)


def test_a_required_certificate_is_missing(tmp_path: Path) -> None:
    tiny.make_bundle(tmp_path)
    with pytest.raises(CertificateError, match=r"no certificate; run `offramp calibrate .* --max-risk"):
        Runner.open(tmp_path, require_certificate=True)


def test_a_policy_of_one_s_own_has_no_certificate(tmp_path: Path) -> None:
    tiny.make_bundle(tmp_path)
    certify(tmp_path)
    own = Policy.thresholds("max_prob", [0.9, 0.9])
    with Runner.open(tmp_path, policy=own) as runner:  # without a warning: it was asked for
        assert runner.certificate is None
    with pytest.raises(CertificateError, match="for policy"):
        Runner.open(tmp_path, policy=own, require_certificate=True)


def rename(old: str, new: str) -> tiny.Edit:
    """Give an input or output of segment 1 another name."""

    def edit(model: onnx.ModelProto, index: int) -> onnx.ModelProto:
        for value in [*model.graph.input, *model.graph.output] if index == 1 else []:
            value.name = new if value.name == old else value.name
        for node in model.graph.node if index == 1 else []:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]
        return model

    return edit


def retype(name: str, shape: list[int | str]) -> tiny.Edit:
    """Declare an input of segment 1 with another shape."""

    def edit(model: onnx.ModelProto, index: int) -> onnx.ModelProto:
        for value in model.graph.input:
            if value.name == name and index == 1:
                value.CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        return model

    return edit


FOREIGN = {
    "carry renamed": (rename("carry_in_1", "keep_mask"), ["input", "keep_mask", "carry_in_1"]),
    "rows renamed": (rename("rows", "survivors"), ["input", "survivors"]),
    "output renamed": (rename("prediction", "label"), ["output", "label", "prediction"]),
    "fixed rows": (retype("carry_in_0", [8, "sequence", tiny.WIDTH]), ["'carry_in_0'", "(8, 'sequence', 4)"]),
    "fixed temperature": (retype("inverse_temperature", [1]), ["'inverse_temperature'", "(1,)", "()"]),
}


@pytest.mark.parametrize(("edit", "parts"), FOREIGN.values(), ids=FOREIGN)
def test_a_graph_that_is_not_the_manifest_s_is_refused(tmp_path: Path, edit: tiny.Edit, parts: list[str]) -> None:
    tiny.make_bundle(tmp_path, edit=edit)
    with pytest.raises(CorruptError) as caught:
        Runner.open(tmp_path)
    for part in [GRAPH, *parts]:
        assert part in str(caught.value)


def test_a_graph_with_another_dtype_is_refused(tmp_path: Path) -> None:
    manifest = tiny.make_bundle(tmp_path)
    first = manifest.segments[0]
    wrong = (replace(first.carry_out[0], dtype="float16"), first.carry_out[1])
    save_manifest(tmp_path, replace(manifest, segments=(replace(first, carry_out=wrong), *manifest.segments[1:])))
    with pytest.raises(CorruptError, match=r"'carry_out_0' is float32 .* expects float16"):
        Runner.open(tmp_path)


def test_a_graph_onnxruntime_cannot_read_is_refused(tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto, index: int) -> onnx.ModelProto:
        model.graph.node[0].op_type = "Gathr"
        return model

    tiny.make_bundle(tmp_path, edit=edit)
    with pytest.raises(BundleError, match=r"segments/00/model.onnx: ONNX Runtime .* refuses it: .*Gathr"):
        Runner.open(tmp_path)


def test_a_late_input_that_the_graph_does_not_read_is_refused(tmp_path: Path) -> None:
    manifest = tiny.make_bundle(tmp_path)
    late = replace(manifest.segments[1], inputs=("mask",))
    save_manifest(tmp_path, replace(manifest, segments=(manifest.segments[0], late, manifest.segments[2])))
    with pytest.raises(CorruptError, match=r"inputs are .*; the manifest expects .*mask"):
        Runner.open(tmp_path)


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "backend": ({"backend": "openvino"}, OptionError, "got backend 'openvino', expected one of auto, onnx"),
    "threads": ({"threads": -1}, OptionError, "got threads=-1"),
    "precision": ({"precision": "int8"}, OptionError, "no 'int8' graph, expected one of fp16, fp32"),
    "policy": ({"policy": Policy.thresholds("margin", [0.5])}, OptionError, "3 exits; expected 2"),
    "temperatures": ({"policy": Policy(temperatures=(1.0,))}, OptionError, "1 temperatures"),
}


@pytest.mark.parametrize(("options", "kind", "message"), OPTIONS.values(), ids=OPTIONS)
def test_bad_options_are_refused(bundle: Path, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Runner.open(bundle, **options)


def test_a_machine_without_onnxruntime_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "offramp.runtime.onnxruntime_engine", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'offramp\[onnxruntime\]'"):
        Runner.open(bundle)


def bundle_with_plan(path: Path, version: str) -> Path:
    """A bundle with one recorded TensorRT-RTX plan for SM 8.6; the plan's file plays no part here."""
    manifest = tiny.make_bundle(path)
    record = FileRecord("segments/00/plans/x.plan", 4, "0" * 64)
    plan = PlanRecord(record, "x", "tensorrt-rtx", "fp16", version, ("8.6",), {}, 1.0, 0.1)
    first = replace(manifest.segments[0], plans=(plan,))
    save_manifest(path, replace(manifest, segments=(first, *manifest.segments[1:])))
    return path


PLANS = {  # built by, installed, GPU -> what is said
    "another version": ("1.6.0.1", "1.7.1.116", "8.6", "built by .* 1.6.0.1 .* 1.7.1.116"),
    "another version, no GPU": ("1.6.0.1", "1.7.1.116", "", "1.6.0.1, this machine has 1.7.1.116 and no GPU"),
    "another GPU": ("1.7.1.116", "1.7.1.116", "8.9", "for SM 8.6, this machine has 1.7.1.116 and SM 8.9"),
    "a GPU it never runs on": (
        "1.7.1.116",
        "1.7.1.116",
        "9.0",
        r"does not run on GPUs of SM 9.0, .*offramp\[tensorrt\]",
    ),
    "a segment without": ("1.7.1.116", "1.7.1.116", "8.6", "1: there is no fp16 plan for TensorRT-RTX; run"),
    "fits, no GPU": ("1.7.1.116", "1.7.1.116", "", ""),
    "not installed": ("1.7.1.116", "", "8.6", ""),
    "nothing here": ("1.7.1.116", "", "", ""),
}


@pytest.mark.parametrize(("built_by", "installed", "sm", "said"), PLANS.values(), ids=PLANS)
def test_plans_that_do_not_run_here_are_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_by: str, installed: str, sm: str, said: str
) -> None:
    bundle_with_plan(tmp_path, built_by)
    monkeypatch.setattr(backends, "installed_version", lambda name: installed if name == "tensorrt-rtx" else "")
    monkeypatch.setattr(backends, "compute_capability", lambda: sm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Runner.open(tmp_path).close()
    assert len(caught) == bool(said)
    if said:
        assert caught[0].category is PlanWarning
        assert caught[0].filename == __file__
        with pytest.warns(PlanWarning, match=rf"segment .*{said}.*running on ONNX Runtime instead"):
            Runner.open(tmp_path).close()
    Runner.open(tmp_path, backend="onnxruntime").close()  # asked for by name: nothing to say


def test_another_plan_that_fits_keeps_it_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle_with_plan(tmp_path, "1.6.0.1")
    manifest = load_manifest(tmp_path)
    old = manifest.segments[0].plans[0]
    both = replace(manifest.segments[0], plans=(old, replace(old, key="y", version="1.7.1.116")))
    save_manifest(tmp_path, replace(manifest, segments=(both, *manifest.segments[1:])))
    monkeypatch.setattr(backends, "installed_version", lambda name: "1.7.1.116")
    monkeypatch.setattr(backends, "compute_capability", lambda: "")
    assert backends.plan_problem(load_manifest(tmp_path)) == ""


def test_a_monitor_watches_from_the_beginning(bundle: Path) -> None:
    monitor = Monitor()
    with Runner.open(bundle, threads=1, monitor=monitor) as runner:
        runner.run(tiny.request([[1], [2, 3]]))
    assert monitor.snapshot().total.rows == 2
    with pytest.raises(OptionError, match="the model has 3"):
        Runner.open(bundle, threads=1, monitor=Monitor(Baseline((1, 1), 0.01)))
