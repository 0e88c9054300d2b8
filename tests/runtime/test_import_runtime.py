"""What importing the runtime drags in, seen in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

FORBIDDEN = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "tokenizers", "rich", "transformers"}


def modules_after(statements: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statements`."""
    code = f"{statements}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_runtime_imports_neither_torch_nor_a_backend() -> None:
    assert modules_after("import offramp.runtime").isdisjoint(FORBIDDEN)


def test_the_package_itself_imports_nothing_heavy() -> None:
    assert modules_after("import offramp").isdisjoint(FORBIDDEN | {"numpy"})
    assert modules_after("import offramp; assert offramp.__version__").isdisjoint(FORBIDDEN | {"numpy"})
    assert modules_after("from offramp import Policy").isdisjoint(FORBIDDEN)


def test_the_onnxruntime_engine_imports_onnxruntime_and_no_more() -> None:
    found = modules_after("import offramp.runtime.onnxruntime_engine") & FORBIDDEN
    assert found == {"onnxruntime"}


def test_importing_the_runtime_is_quick() -> None:
    """At most 0.25 s beyond numpy; the best of three, as other processes share the machine."""
    code = "import time, numpy; start = time.perf_counter(); import offramp.runtime; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) <= 0.25


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import offramp

    assert offramp.Policy.full_depth().limits == ()
    with pytest.raises(AttributeError, match="has no attribute 'Polcy'"):
        offramp.Polcy  # noqa: B018
