"""How long does the runtime take to import, beyond numpy and ONNX Runtime, and `offramp --help` in all?

Physics: Python reads and runs every module that an import reaches, some 0.1 to 1 ms each; torch alone is over a
second. So the figure says what is reached. Fresh interpreters, the two sides of each difference taken in turn.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

ROUNDS = 3 if "--quick" in sys.argv else 15
BASE = "import numpy, onnxruntime"
CASES = {
    "python_ms": ["-c", "pass"],
    "numpy_and_onnxruntime_ms": ["-c", BASE],
    "runtime_with_them_ms": ["-c", f"{BASE}; import offramp.runtime, offramp.runtime.onnxruntime_engine"],
    "help_ms": ["-m", "offramp", "--help"],
}


def wall_ms(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, arguments in CASES.items():
            times[name].append(wall_ms(arguments))
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    beyond = medians["runtime_with_them_ms"] - medians["numpy_and_onnxruntime_ms"]
    print(json.dumps({**medians, "runtime_beyond_ms": round(beyond, 1), "rounds": ROUNDS}))


if __name__ == "__main__":
    main()
