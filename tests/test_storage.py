"""Atomic writes: the old content or the new one, whatever the disk does."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from offramp import storage
from offramp.errors import StorageError
from offramp.storage import staged_directory, write_file

DISK = {
    "full": (errno.ENOSPC, "the disk is full"),
    "quota": (errno.EDQUOT, "quota"),
    "read-only": (errno.EROFS, "read-only"),
    "forbidden": (errno.EACCES, "no permission"),
    "broken": (errno.EIO, "nothing was changed"),
}


def names(directory: Path) -> list[str]:
    """Everything in there, hidden leftovers included."""
    return sorted(os.listdir(directory))


def fail_with(number: int) -> Any:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directories" / "file"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(("number", "cure"), DISK.values(), ids=DISK)
def test_a_disk_that_refuses_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, cure: str
) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    monkeypatch.setattr(os, step, fail_with(number))
    with pytest.raises(StorageError, match=rf"writing .*file: .*; .*{cure}"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_an_interruption_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_file(path, b"old")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def fill(directory: Path, content: str) -> None:
    (directory / "inner").mkdir()
    (directory / "inner" / "file").write_text(content)


def read(directory: Path) -> str:
    return (directory / "inner" / "file").read_text()


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with staged_directory(target) as staging:
        fill(staging, "new")
        assert not target.exists()
        assert staging.parent == target.parent  # same file system: the rename is atomic
    assert read(target) == "new"
    assert names(target.parent) == ["target"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(storage, "_exchange", lambda left, right: False)
    for content in ("old", "new", "newer"):
        with staged_directory(tmp_path / "target") as staging:
            fill(staging, content)
        assert read(tmp_path / "target") == content
        assert names(tmp_path) == ["target"]


def test_two_directories_are_exchanged_in_one_step(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    for directory in (left, right):
        directory.mkdir()
        fill(directory, directory.name)
    if not storage._exchange(left, right):
        pytest.skip("this file system cannot exchange directories: the atomic path was not shown")
    assert (read(left), read(right)) == ("right", "left")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_directory(tmp_path: Path, error: type[BaseException]) -> None:
    with staged_directory(tmp_path / "target") as staging:
        fill(staging, "old")
    with pytest.raises(error):  # noqa: PT012, SIM117
        with staged_directory(tmp_path / "target") as staging:
            fill(staging, "new")
            raise error
    assert read(tmp_path / "target") == "old"
    assert names(tmp_path) == ["target"]


def test_a_second_rename_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with staged_directory(tmp_path / "target") as staging:
        fill(staging, "old")
    rename, calls = os.rename, []

    def rename_but_the_second(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "I/O error")
        rename(source, target)

    monkeypatch.setattr(storage, "_exchange", lambda left, right: False)
    monkeypatch.setattr(os, "rename", rename_but_the_second)
    with pytest.raises(StorageError, match=r"writing .*target"), staged_directory(tmp_path / "target") as staging:
        fill(staging, "new")
    assert read(tmp_path / "target") == "old"
    assert names(tmp_path) == ["target"]


def test_a_full_disk_inside_the_block_is_a_storage_error(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"writing .*target: .*the disk is full"),
        staged_directory(tmp_path / "target"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_target_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"making .*target"),
        staged_directory(tmp_path / "file" / "target"),
    ):
        raise AssertionError("never reached")
    assert names(tmp_path) == ["file"]
