"""The bundle format: the manifest there and back, what it refuses, and updates that are whole at every moment."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offramp import bundle as bundle_module
from offramp.bundle import (
    DimensionSpec,
    ExitSpec,
    FileRecord,
    InputSpec,
    Manifest,
    PlanRecord,
    PolicyRecord,
    SegmentSpec,
    TensorSpec,
    TextSpec,
    add_plan,
    file_record,
    load_manifest,
    manifest_bytes,
    read_certificate,
    read_file,
    read_policy,
    replace_policy,
    save_manifest,
)
from offramp.errors import BundleError, CorruptError, StorageError, VersionError

LATER_FIELDS = ("learned", "retention", "trims", "head", "heads", "decoder", "states")  # what schema 1 lacked
OLD, NEW = b'{"policy": "old"}', b'{"policy": "new"}'
CARRY = (TensorSpec("hidden", "float32", ("rows", "sequence", 8)),)


def make_manifest() -> Manifest:
    """A manifest with every field filled."""
    graph = file_record("segments/00/model.onnx", b"graph")
    plan = make_plan("first")
    return Manifest(
        name="demo",
        inputs=(
            InputSpec("ids", "int64", ("rows", "sequence"), 0, 99, False),
            InputSpec("x", "float32", ("rows", 3), None, None, False),
        ),
        dimensions={"rows": DimensionSpec(1, 32), "sequence": DimensionSpec(4, 128)},
        exits=(ExitSpec("early", 2), ExitSpec("final", 2)),
        segments=(
            SegmentSpec(0, ("ids", "x"), (), CARRY, {"fp32": graph}, (plan,)),
            SegmentSpec(1, (), CARRY, (), {"fp32": graph, "fp16": graph}),
        ),
        policy=PolicyRecord(hashlib.sha256(OLD).hexdigest()),
        reference_sha256="0" * 64,
        labels=("negative", "positive"),
        text=TextSpec(graph, 128, "ids", "mask"),
        tools={"torch": "2.13.0"},
        parity={"fp16": {"worst": 1e-3, "per_segment": [1e-4, 1e-3]}},
    )


def make_plan(key: str, content: bytes = b"plan") -> PlanRecord:
    record = file_record(f"segments/00/plans/{key}.plan", content)
    profile = {"ids": ((1, 4), (8, 24), (32, 128))}
    return PlanRecord(record, key, "tensorrt-rtx", "fp16", "1.7.1.116", ("8.6", "8.9"), profile, 0.9, 1.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle with a manifest, a policy and one graph."""
    save_manifest(tmp_path, make_manifest())
    (tmp_path / "policy.json").write_bytes(OLD)
    (tmp_path / "segments/00").mkdir(parents=True)
    (tmp_path / "segments/00/model.onnx").write_bytes(b"graph")
    return tmp_path


def test_a_manifest_survives_its_file(path: Path) -> None:
    assert load_manifest(path) == make_manifest()
    assert manifest_bytes(load_manifest(path)) == (path / "manifest.json").read_bytes()


def test_the_fingerprint_is_of_the_graphs_alone() -> None:
    manifest = make_manifest()
    other = replace(manifest, name="other", policy=PolicyRecord("1"), parity={}, tools={})
    assert other.fingerprint == manifest.fingerprint
    graphs = {"fp32": file_record("segments/01/model.onnx", b"another graph")}
    changed = (manifest.segments[0], replace(manifest.segments[1], graphs=graphs))
    assert replace(manifest, segments=changed).fingerprint != manifest.fingerprint


def at(*place: str | int) -> Any:
    """An edit of the manifest document: set, or with `...` delete, the value at `place`."""

    def edit(value: Any) -> Any:
        def change(document: dict[str, Any]) -> dict[str, Any]:
            parent: Any = document
            for step in place[:-1]:
                parent = parent[step]
            if value is ...:
                del parent[place[-1]]
            else:
                parent[place[-1]] = value
            return document

        return change

    return edit


MALFORMED: dict[str, tuple[Any, list[str]]] = {
    "schema missing": (at("schema")(...), ["no positive integer `schema`"]),
    "schema text": (at("schema")("1"), ["no positive integer `schema`"]),
    "schema null": (at("schema")(None), ["no positive integer `schema`"]),
    "schema bool": (at("schema")(True), ["no positive integer `schema`"]),
    "schema zero": (at("schema")(0), ["no positive integer `schema`"]),
    "field missing": (at("inputs")(...), ["missing inputs"]),
    "field unknown": (at("licence")("MIT"), ["unknown licence"]),
    "deep field missing": (at("segments", 0, "graphs", "fp32", "sha256")(...), ["graphs.fp32", "missing sha256"]),
    "deep field unknown": (at("exits", 1, "depth")(3), ["exits[1]", "unknown depth"]),
    "name a number": (at("name")(5), [".name", "got int", "str"]),
    "inputs an object": (at("inputs")({}), [".inputs", "got dict"]),
    "dimensions a list": (at("dimensions")([]), [".dimensions", "got list"]),
    "segment a list": (at("segments", 0)([]), ["segments[0]", "got list, expected an object"]),
    "range of text": (at("dimensions", "rows", "max")("32"), ["dimensions.rows.max", "got str"]),
    "range of bool": (at("dimensions", "rows", "max")(True), ["dimensions.rows.max", "got bool"]),
    "dimension null": (at("inputs", 0, "shape", 0)(None), ["inputs[0].shape[0]", "got NoneType"]),
    "dimension a fraction": (at("inputs", 0, "shape", 0)(1.5), ["inputs[0].shape[0]", "got float"]),
    "text a list": (at("text")([]), [".text", "got list"]),
    "minimum text": (at("inputs", 0, "minimum")("0"), ["inputs[0].minimum", "got str"]),
    "profile flat": (at("segments", 0, "plans", 0, "profile", "ids")([1, 2, 3]), ["profile.ids[0]", "got int"]),
    "no segments": (at("segments")([]), ["0 segments and 2 exits"]),
    "an exit too few": (at("exits")([{"name": "a", "num_classes": 2}]), ["2 segments and 1 exits"]),
    "carry missing": (at("segments", 1, "carry_in")([]), ["segment 1 does not fit the one before it"]),
    "carry in segment 0": (
        at("segments", 0, "carry_in")([{"name": "a", "dtype": "float32", "shape": ["rows"]}]),
        ["segment 0 does not fit"],
    ),
    "wrong index": (at("segments", 1, "index")(2), ["segment 1 does not fit"]),
    "unknown input": (at("segments", 0, "inputs")(["ids", "y"]), ["segment 0 does not fit"]),
}


@pytest.mark.parametrize(("edit", "parts"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_manifest_is_refused(path: Path, edit: Any, parts: list[str]) -> None:
    document = edit(json.loads((path / "manifest.json").read_text()))
    (path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CorruptError) as caught:
        load_manifest(path)
    for part in ["manifest.json", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b'"x"'])
def test_a_manifest_that_is_no_object_is_refused(path: Path, content: bytes) -> None:
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        load_manifest(path)


def test_a_newer_manifest_is_told_from_a_broken_one(path: Path) -> None:
    (path / "manifest.json").write_text('{"schema": 5, "everything": "else is unknown"}')
    with pytest.raises(VersionError, match=r"schema 5, this offramp reads up to 4; upgrade"):
        load_manifest(path)


def test_a_directory_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match=r"is not a bundle: .*offramp export"):
            load_manifest(place)


def test_a_bundle_that_is_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        load_manifest(tmp_path / "model.onnx")


def test_a_file_is_read_when_it_is_the_recorded_one(path: Path) -> None:
    record = file_record("segments/00/model.onnx", b"graph")
    assert read_file(path, record) == b"graph"
    for content in (b"graph+", b"grap", b"", b"grapf"):
        (path / record.path).write_bytes(content)
        with pytest.raises(CorruptError, match=r"model\.onnx is not the file that was exported"):
            read_file(path, record)
    (path / record.path).unlink()
    with pytest.raises(CorruptError, match=r"model\.onnx is missing"):
        read_file(path, record)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "segments/../../outside", ".."])
def test_nothing_outside_the_bundle_is_opened(path: Path, name: str) -> None:
    (path.parent / "outside").write_bytes(b"secret")
    with pytest.raises(CorruptError, match="outside the bundle"):
        read_file(path, replace(file_record("", b"secret"), path=name))


def test_a_policy_is_replaced(path: Path) -> None:
    replace_policy(path, NEW)
    manifest = load_manifest(path)
    assert read_policy(path, manifest) == NEW
    assert manifest == replace(make_manifest(), policy=PolicyRecord(hashlib.sha256(NEW).hexdigest()))


def test_a_certificate_goes_with_its_policy(path: Path) -> None:
    assert read_certificate(path) == b""
    replace_policy(path, NEW, b"certificate of the new one")
    assert read_certificate(path) == b"certificate of the new one"
    replace_policy(path, OLD)
    assert not (path / "certificate.json").exists()
    (path / "certificate.json").mkdir()
    with pytest.raises(CorruptError, match="offramp calibrate"):
        read_certificate(path)


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_crash_while_replacing_both_never_leaves_a_new_certificate_with_an_old_policy(
    path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    replace_policy(path, OLD, b"of the old one")
    crash_at_write(monkeypatch, before)
    with pytest.raises(_Crash):
        replace_policy(path, NEW, b"of the new one")
    monkeypatch.undo()
    assert read_policy(path, load_manifest(path)) == (OLD if before < 2 else NEW)
    assert read_certificate(path) == b"of the old one"  # beside the new policy: it names another one


def test_a_policy_that_is_not_the_recorded_one_is_refused(path: Path) -> None:
    (path / "policy.json").write_bytes(NEW)
    with pytest.raises(CorruptError, match=r"policy\.json was altered .*offramp calibrate"):
        read_policy(path, load_manifest(path))


class _Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("again", [OLD, NEW, b'{"policy": "third"}'])
def test_a_crash_while_replacing_a_policy_leaves_a_whole_bundle(
    path: Path, monkeypatch: pytest.MonkeyPatch, before: int, again: bytes
) -> None:
    """The process ends before write number `before` of three; then somebody calibrates `again`."""
    crash_at_write(monkeypatch, before)
    with pytest.raises(_Crash):
        replace_policy(path, NEW)
    monkeypatch.undo()
    assert read_policy(path, load_manifest(path)) == (OLD if before < 2 else NEW)
    replace_policy(path, again)
    assert read_policy(path, load_manifest(path)) == again
    assert load_manifest(path).policy == PolicyRecord(hashlib.sha256(again).hexdigest())


def crash_at_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write, written = bundle_module.write_file, []

    def write_or_crash(target: Path, content: bytes) -> None:
        if len(written) == number:
            raise _Crash
        written.append(target)
        write(target, content)

    monkeypatch.setattr(bundle_module, "write_file", write_or_crash)


def test_a_reader_between_the_writes_sees_a_whole_bundle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who has read either manifest accepts whichever policy is there when he opens it."""
    write = bundle_module.write_file
    seen = []

    def write_and_read(target: Path, content: bytes) -> None:
        before = load_manifest(path)
        write(target, content)
        seen.append(read_policy(path, load_manifest(path)))
        if len(seen) > 1:  # the first write only announces the second
            assert read_policy(path, before) == NEW

    monkeypatch.setattr(bundle_module, "write_file", write_and_read)
    replace_policy(path, NEW)
    assert seen == [OLD, NEW, NEW]


def test_a_plan_is_added_and_replaced(path: Path) -> None:
    add_plan(path, 1, make_plan("second"), b"plan")
    manifest = add_plan(path, 1, make_plan("third"), b"plan")
    assert [plan.key for plan in manifest.segments[1].plans] == ["second", "third"]
    add_plan(path, 1, make_plan("second", b"rebuilt"), b"rebuilt")
    manifest = load_manifest(path)
    assert [plan.key for plan in manifest.segments[1].plans] == ["third", "second"]
    assert read_file(path, manifest.segments[1].plans[1].file) == b"rebuilt"
    assert manifest.segments[0] == make_manifest().segments[0]


def test_a_full_disk_leaves_the_bundle_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for change in (lambda: add_plan(path, 0, make_plan("new"), b"plan"), lambda: replace_policy(path, NEW)):
        with pytest.raises(StorageError, match="the disk is full"):
            change()
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_plan_whose_record_cannot_be_written_is_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_at_write(monkeypatch, 1)  # the plan is written, the manifest is not
    with pytest.raises(_Crash):
        add_plan(path, 0, make_plan("new"), b"plan")
    assert load_manifest(path) == make_manifest()
    assert not (path / make_plan("new").file.path).exists()


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_crash_while_replacing_a_plan_leaves_a_whole_bundle(
    path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """The process ends before write number `before` of three: every plan on record is the one on disk."""
    add_plan(path, 0, make_plan("new"), b"plan")
    crash_at_write(monkeypatch, before)
    with pytest.raises(_Crash):
        add_plan(path, 0, make_plan("new", b"rebuilt"), b"rebuilt")
    monkeypatch.undo()
    plans = {plan.key: plan for plan in load_manifest(path).segments[0].plans}
    assert plans.keys() == ({"first", "new"} if before == 0 else {"first"})
    if before == 0:
        assert read_file(path, plans["new"].file) == b"plan"
    add_plan(path, 0, make_plan("new", b"rebuilt"), b"rebuilt")
    assert read_file(path, load_manifest(path).segments[0].plans[-1].file) == b"rebuilt"


def test_a_plan_that_cannot_be_replaced_leaves_a_whole_bundle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_plan(path, 0, make_plan("new"), b"plan")
    write = bundle_module.write_file

    def refuse_plans(target: Path, content: bytes) -> None:
        if target.suffix == ".plan":
            raise StorageError("writing a plan: the disk is full")
        write(target, content)

    monkeypatch.setattr(bundle_module, "write_file", refuse_plans)
    with pytest.raises(StorageError, match="the disk is full"):
        add_plan(path, 0, make_plan("new", b"rebuilt"), b"rebuilt")
    manifest = load_manifest(path)
    assert manifest.segments[0].plans[0] == make_plan("first")
    assert [read_file(path, plan.file) for plan in manifest.segments[0].plans if plan.key == "new"] in ([], [b"plan"])


def test_file_records(path: Path) -> None:
    assert file_record("a/b", b"") == FileRecord("a/b", 0, hashlib.sha256(b"").hexdigest())


def test_a_bundle_of_schema_1_is_read_and_written_anew(path: Path) -> None:
    """It lacks what later ones added; whoever updates its policy writes a manifest that says which fields it has."""
    document = json.loads((path / "manifest.json").read_text())
    document["schema"] = 1
    for owner in (document, *document["exits"], *document["segments"]):
        for name in LATER_FIELDS:
            owner.pop(name, None)
    (path / "manifest.json").write_text(json.dumps(document))
    manifest = load_manifest(path)
    assert (manifest.trims, [spec.row_outputs for spec in manifest.exits]) == ({}, [{}, {}])
    replace_policy(path, NEW)
    assert json.loads((path / "manifest.json").read_text())["schema"] == 4
    assert load_manifest(path).exits == manifest.exits
