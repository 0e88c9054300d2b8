"""mypy really checks the modules that nobody can run here: it knows the names of CUDA and TensorRT, and their types."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import mypy.api
import pytest
from cuda.bindings import runtime

ROOT = Path(__file__).parents[2]
SOURCES = [(ROOT / "offramp/runtime/tensorrt" / name).read_text() for name in ("cuda_device.py", "loaded_plan.py")]
BREAKS = {  # what is written in the place of what -> what mypy says
    "a method of TensorRT": ("execute_async_v3", "execute_async_v4", '"execute_async_v4"; maybe "execute_async_v3"'),
    "a property": ("device_memory_size_v2", "device_memory_size", '"ICudaEngine" has no attribute'),
    "a member": ("WHOLE_GRAPH_CAPTURE", "WHOLE_CAPTURE", '"type[CudaGraphStrategy]" has no attribute "WHOLE_CAPTURE"'),
    "a class of the module": ("type[trt.ILogger]", "type[trt.ILogging]", 'Name "trt.ILogging" is not defined'),
    "an argument": ("(int(stream.handle))", '("compute")', 'incompatible type "str"; expected "SupportsInt"'),
    "a function of CUDA": ("cuda.cudaMalloc(", "cuda.cudaMallocate(", 'Module has no attribute "cudaMallocate"'),
    "its arguments": (
        "cudaGraphInstantiate(captured, 0)",
        "cudaGraphInstantiate(captured)",
        "Missing positional argument",
    ),
    "its results": ("error, captured = cuda", "captured = cuda", "tuple[cudaError_t, cudaGraph_t]"),
    "a result unchecked": ("_value(cuda.cudaMalloc", "_check(cuda.cudaMalloc", '"_check" has incompatible type'),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What mypy says of the module that uses it, by break; "" are both modules as they are."""
    folder = tmp_path_factory.mktemp("broken")
    files = {}
    for name, (old, new, _) in {**BREAKS, "": ("import", "import", "")}.items():
        sources = [source for source in SOURCES if old in source]
        assert sources, f"{old} is no longer used: break something else"
        files[name] = folder / f"broken_{len(files)}.py"
        files[name].write_text(sources[0].replace(old, new))
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    out, err, _ = mypy.api.run([*config, *map(str, files.values())])
    assert not err, err
    return {name: "\n".join(re.findall(rf"^.*{path.name}.* error: (.*)$", out, re.M)) for name, path in files.items()}


@pytest.mark.parametrize("broken", BREAKS)
def test_mypy_reports_a_break(reports: dict[str, str], broken: str) -> None:
    assert BREAKS[broken][2] in reports[broken]


def test_and_nothing_without_one(reports: dict[str, str]) -> None:
    assert reports[""] == ""


def test_the_stub_of_tensorrt_is_that_of_the_installed_package() -> None:
    first = (ROOT / "typings/tensorrt_rtx/__init__.pyi").read_text().splitlines()[0]
    assert f" {metadata.version('tensorrt_rtx_cu12')};" in first, "run `python typings/make_stubs.py`"


def test_the_stub_of_cuda_names_nothing_that_is_not_there() -> None:
    stub = (ROOT / "typings/cuda/bindings/runtime.pyi").read_text()
    names = re.findall(r"^(?:def |class )?(cuda\w+)", stub, re.M)
    assert len(names) > 25
    assert [name for name in names if not hasattr(runtime, name)] == []
