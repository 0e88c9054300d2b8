"""How much memory does recording take, and does a recording that was killed end the same? A million rows of 12 exits.

Physics: a row's answers at 12 exits of 2 classes are 12 x (8 + 12 + 8) bytes of logits, scores and predictions, 336 MB
per million rows: what a recorder that gathers them would hold, twice while it writes. Parts of 4,096 rows hold 1.4 MB
of them. The engines are fakes whose answers follow from the row, so what is measured is the recorder: peak resident
memory of a process of its own, less what it had before the first row. Other processes are killed with SIGKILL, one
after another, the last one while it joins the parts; then one goes on to the end, and the hashes are compared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine

from offramp.runtime import fake_runner
from offramp.runtime.fake import MAX_ROWS
from offramp.runtime.record import RecordOptions, Rows, record_to_file

EXITS = 12
PART_ROWS = 4096  # as record.py has it


def answer(exit_index: int) -> Any:
    """Two logits from the row's number: later exits are surer."""
    return lambda inputs: np.stack([np.sin(inputs["x"]), np.cos(inputs["x"] * 0.7)], axis=1) * (1 + exit_index)


def rows(num_rows: int) -> Iterator[Rows]:
    for start in range(0, num_rows, MAX_ROWS):
        numbers = np.arange(start, min(start + MAX_ROWS, num_rows))
        sources = np.array(["kiosk", "mail"], np.str_)[numbers % 2]
        yield Rows({"x": numbers.astype(np.float32)}, numbers % 2, sources)


def record(path: Path, num_rows: int, found: Any) -> None:
    """Record in this process; puts seconds, peak memory above the start's, and the hash."""
    runner = fake_runner([answer(k) for k in range(EXITS)])
    for engine in runner.engines:
        engine.calls = Forgetful()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    sha256 = record_to_file(runner, rows(num_rows), path, RecordOptions(budget_s=0.0))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found.put(
        {"seconds": seconds, "peak_mib": peak / 1024, "above_start_mib": (peak - before) / 1024, "sha256": sha256}
    )


class Forgetful(list[Any]):
    """What a fake engine notes its calls in, without keeping them."""

    def append(self, call: Any) -> None:
        pass


def recorded(path: Path, num_rows: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=record, args=(path, num_rows, found))
    process.start()
    result: dict[str, Any] = found.get()
    process.join()
    return result


def killed(path: Path, num_rows: int, after_parts: int) -> bool:
    """Start a recording and kill it as soon as that many parts are there; was it still at it?"""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=record, args=(path, num_rows, found))
    process.start()
    parts = path.with_name(f".{path.name}.parts")
    while process.is_alive() and len(list(parts.glob("*.npz"))) < after_parts:
        time.sleep(0.001)
    was_alive = process.is_alive()
    process.kill()
    process.join()
    return was_alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--killed-rows", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few rows and one kill: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.killed_rows, options.kills = 20_000, 10_000, 2
    with tempfile.TemporaryDirectory() as folder:
        whole = recorded(Path(folder) / "whole.npz", options.rows)
        whole["file_mb"] = (Path(folder) / "whole.npz").stat().st_size / 1e6
        tenth = recorded(Path(folder) / "tenth.npz", options.rows // 10)
        plain = recorded(Path(folder) / "plain.npz", options.killed_rows)
        path, num_parts = Path(folder) / "killed.npz", -(-options.killed_rows // PART_ROWS)
        kills = sum(
            killed(path, options.killed_rows, 1 + kill * (num_parts - 1) // max(1, options.kills - 1))
            for kill in range(options.kills)
        )
        resumed = recorded(path, options.killed_rows)
    result = {
        "bench": "trace_memory",
        "machine": describe_machine(),
        "rows": options.rows,
        "exits": EXITS,
        "whole": whole,
        "a_tenth": tenth,
        "kills": kills,
        "killed_rows": options.killed_rows,
        "seconds_without_kills": plain["seconds"],
        "seconds_after_the_kills": resumed["seconds"],
        "same_content": resumed["sha256"] == plain["sha256"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
