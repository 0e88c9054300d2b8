"""run --monitor: a monitor whose snapshot is kept in a file. monitor: snapshots of several processes, added up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from offramp.errors import DataError
from offramp.runtime import Monitor, Runner
from offramp.runtime.monitor_snapshot import Snapshot, merged
from offramp.storage import write_file


@contextmanager
def monitored(runner: Runner, path: Path, say: Callable[[str], None]) -> Iterator[Monitor]:
    """Watch `runner` for the block; the snapshot is in `path` at every change of state, and at the end.

    Without a certificate that holds it only counts, and says so. Raises StorageError at the end when the disk refuses.
    """
    writing = threading.Lock()

    def write() -> None:
        with writing:
            write_file(path, monitor.snapshot().to_json().encode())

    certificate = runner.certificate
    if certificate is None:
        say("monitor: no certificate holds for these engines and this policy; it counts, and tests nothing")
        monitor = Monitor()
    else:
        labels = runner.manifest.labels
        monitor = Monitor.from_certificate(certificate, labels=labels, on_change=lambda change: write())
    runner.monitor = monitor
    try:
        yield monitor
    finally:
        runner.monitor = None
        monitor.wait_told()
        write()


def load_snapshots(paths: Sequence[Path]) -> Snapshot:
    """The snapshots in `paths`, added up. Raises DataError."""
    found = []
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise DataError(f"reading {path}: {exc}; expected a snapshot of `offramp run BUNDLE --monitor`") from exc
        found.append(Snapshot.from_json(content, str(path)))
    return merged(found)
