"""What a result was measured on, so that a file in bench/results/ means something a year later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

_PACKAGES = ("offramp", "numpy", "onnxruntime", "torch")


def describe_machine() -> dict[str, object]:
    """CPU model, cores, system, versions and the load average of the last minute."""
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "load_average": round(os.getloadavg()[0], 2),
    }


def cpu_model(cpuinfo: Path) -> str:
    """The processor's name as the kernel gives it; "unknown" where it gives none."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
