"""Every script of bench/ runs, and the last line it prints is one JSON object with the machine in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
SCRIPTS = {
    "chain_vs_uncut": ["--quick"],
    "cut_costs": ["--quick"],
    "runner_overhead": ["--quick"],
    "tensorrt_latency": ["--quick"],
}


def run_script(name: str) -> dict[str, Any]:
    command = [sys.executable, BENCH / f"{name}.py", *SCRIPTS[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(summary, dict)
    return summary


@pytest.mark.parametrize("name", SCRIPTS)
def test_last_line_is_json(name: str) -> None:
    summary = run_script(name)
    assert summary["bench"] == name
    assert summary["machine"]
