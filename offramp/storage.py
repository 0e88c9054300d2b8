"""Writes that are whole or not there: one file, or one directory, replaced atomically. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from offramp.errors import StorageError

_CURES = {
    errno.ENOSPC: "the disk is full: free some space and run the command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the command again",
    errno.EROFS: "the file system is read-only: choose another output directory",
    errno.EACCES: "no permission to write there: choose another output directory",
    errno.EPERM: "no permission to write there: choose another output directory",
}
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


def storage_error(doing: str, exc: OSError) -> StorageError:
    """A StorageError that says what was being done, what the system answered and what mends it."""
    cure = _CURES.get(exc.errno or 0, "nothing was changed")
    return StorageError(f"{doing}: {exc.strerror or exc}; {cure}")


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one. Raises StorageError."""
    with replaced_file(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` when the block ends well, and vanishes otherwise.

    Raises StorageError when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as exc:
        raise storage_error(f"writing {path}", exc) from exc
    finally:
        remove_file(temporary)


def remove_file(path: Path) -> None:
    """Remove `path` if it is there; a file that cannot be removed stays."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends well, and vanishes otherwise.

    Raises StorageError when the disk refuses.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".staging", dir=target.parent))
        staging.chmod(0o755)
    except OSError as exc:
        raise storage_error(f"making {target}", exc) from exc
    try:
        yield staging
        _swap_into_place(staging, target)
    except OSError as exc:
        raise storage_error(f"writing {target}", exc) from exc
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap_into_place(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; what was there ends up at `staging`."""
    if not target.exists():
        os.rename(staging, target)
    elif not _exchange(staging, target):  # no atomic exchange here: two renames, undone if the second fails
        aside = target.with_name(f".{target.name}.{os.getpid()}.old")
        os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError:
            os.rename(aside, target)
            raise
        os.rename(aside, staging)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two directories in one step where the system can (Linux renameat2); say whether it did."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE)
    return bool(renameat2(*arguments) == 0)
