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
    "ablation": ["--quick"],
    "against_alternatives": ["--quick"],
    "against_earlyon": ["--quick"],  # one line that says so where earlyon is not installed
    "calibration_speed": ["--quick"],
    "certified": ["--quick"],
    "chain_vs_uncut": ["--quick"],
    "coverage": ["--quick"],
    "cuda_overhead": ["--quick"],
    "cut_costs": ["--quick"],
    "eat": ["--quick"],
    "fixed_depth": ["--quick"],
    "int8": ["--quick"],
    "placement": ["--quick"],
    "pool": ["--quick"],
    "ideal": ["--quick"],
    "monitor": ["--quick"],
    "monitor_overhead": ["--quick"],
    "runner_overhead": ["--quick"],
    "strategies": ["--quick"],
    "trimming": ["--quick"],
    "tensorrt_latency": ["--quick"],
    "tightness": ["--quick"],
    "trace_memory": ["--quick"],
}


def run_script(name: str) -> dict[str, Any]:
    command = [sys.executable, BENCH / f"{name}.py", *SCRIPTS[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(summary, dict)
    return summary


@pytest.mark.parametrize("name", SCRIPTS)
def test_last_line_is_json(name: str) -> None:
    summary = run_script(name)
    assert summary["bench"] == name
    assert summary["machine"]
    if name == "trace_memory":
        assert summary["same_content"]
    if name == "pool":
        random_load = summary["random_load"]
        assert [random_load[fault] for fault in ("lost", "duplicated", "mixed", "rows_left")] == [0] * 4
        assert random_load["answered"] > 0
