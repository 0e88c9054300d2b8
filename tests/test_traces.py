"""The traces beside a bundle: found, checked, recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offramp.bundle import FileRecord, PlanRecord, load_manifest
from offramp.commands import traces
from offramp.commands.traces import TraceRequest, is_of, record_bundle, stored_trace, trace_for, trace_path
from offramp.errors import BundleError, DataError, OptionError
from offramp.trace import load_trace, save_trace
from tests.runtime import tiny


@pytest.fixture(autouse=True)
def _quick_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_COST_SECONDS", 0.0)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    tiny.make_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def data(tmp_path: Path) -> str:
    labels = np.arange(40) % tiny.NUM_CLASSES
    np.savez(tmp_path / "data.npz", **tiny.request(tiny.sentences(40)), labels=labels)
    return str(tmp_path / "data.npz")


def test_a_trace_is_recorded_once_and_found_again(bundle: Path, data: str) -> None:
    said: list[str] = []
    first = trace_for(bundle, TraceRequest(data), say=said.append)
    assert trace_path(bundle, "onnxruntime", "fp32").is_file()
    assert said == []
    again = trace_for(bundle, TraceRequest(), say=said.append)
    assert (again.sha256, len(again.labels)) == (first.sha256, 40)
    assert "using" in said[0]
    assert stored_trace(bundle).sha256 == first.sha256


def test_each_precision_has_its_own(bundle: Path, data: str) -> None:
    for precision in ("fp32", "fp16"):
        assert record_bundle(bundle, TraceRequest(data, precision=precision))[0].stem == f"onnxruntime-{precision}"
    with pytest.raises(DataError, match="got onnxruntime-fp16, onnxruntime-fp32; choose one with `--backend`"):
        stored_trace(bundle)
    assert stored_trace(bundle, precision="fp16").precision == "fp16"
    assert stored_trace(bundle, "onnxruntime", "fp32").precision == "fp32"


def test_a_trace_of_other_files_is_not_used(bundle: Path, data: str) -> None:
    with pytest.raises(DataError, match=r"got none; run `offramp trace .*bundle --data DATA`"):
        stored_trace(bundle)
    path, _ = record_bundle(bundle, TraceRequest(data))
    trace = load_trace(path)
    save_trace(path, replace(trace, files=("0" * 64, *trace.files[1:])))
    with pytest.raises(DataError, match="got none"):
        stored_trace(bundle)
    said: list[str] = []
    with pytest.raises(BundleError, match="no tokenizer"):  # the default data are texts
        trace_for(bundle, TraceRequest(), say=said.append)
    assert "of other engines" in said[0]


def test_a_trace_of_plans_is_of_the_plans_of_its_backend(bundle: Path, data: str) -> None:
    trace = replace(load_trace(record_bundle(bundle, TraceRequest(data))[0]), backend="tensorrt", precision="fp16")
    manifest = load_manifest(bundle)
    assert not is_of(trace, manifest), "graphs are no plans"
    for backend in ("tensorrt", "tensorrt-rtx"):
        plans = [
            PlanRecord(FileRecord("x.plan", 1, sha256), "key", backend, "fp16", "11", (), {}, 1.0, 1.0)
            for sha256 in trace.files
        ]
        planned = replace(
            manifest,
            segments=tuple(
                replace(segment, plans=(plan,)) for segment, plan in zip(manifest.segments, plans, strict=True)
            ),
        )
        assert is_of(trace, planned) == (backend == "tensorrt")


def test_test_rows_do_not_become_what_a_bundle_is_calibrated_on(bundle: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="name another file with `-o`"):
        record_bundle(bundle, TraceRequest(data, split="test"))
    assert record_bundle(bundle, TraceRequest(data, split="test"), tmp_path / "t.npz")[0] == tmp_path / "t.npz"
    assert not trace_path(bundle, "onnxruntime", "fp32").exists()
