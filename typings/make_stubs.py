"""Writes the stubs in this folder from the packages installed here: `python typings/make_stubs.py`. Needs no GPU.

tensorrt_rtx        mypy's stubgen in inspect mode over tensorrt_rtx_bindings: names and signatures, no docstrings.
cuda.bindings       the functions in CUDA_FUNCTIONS only; their arguments and results as their own docstrings list them.

`tensorrt` 11 has the same classes but for what only TensorRT-RTX knows (runtime cache, its own CUDA graphs; compared
with the bindings of 11.4), so there is one stub for both.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from cuda.bindings import runtime

HERE = Path(__file__).parent
CUDA_FUNCTIONS = (
    *("cudaGetDeviceCount", "cudaGetErrorName", "cudaGetErrorString", "cudaGetLastError"),
    *("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost", "cudaMemcpyAsync", "cudaMemsetAsync"),
    *("cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamSynchronize", "cudaStreamWaitEvent"),
    *("cudaEventCreateWithFlags", "cudaEventDestroy", "cudaEventRecord", "cudaEventSynchronize"),
    *("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphDestroy"),
    *("cudaGraphInstantiate", "cudaGraphLaunch", "cudaGraphExecDestroy"),
)
CUDA_HANDLES = ("cudaStream_t", "cudaEvent_t", "cudaGraph_t", "cudaGraphExec_t")
CUDA_ENUMS = ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode")
CUDA_FLAGS = ("cudaStreamNonBlocking", "cudaEventDisableTiming", "cudaHostAllocDefault")
MENDED = {
    r" = \.\.\.(?=.*, \w+: [^=]*\) ->)": "",  # a default before a parameter that has none
    r"(?<=[ \[(])bool\b": "builtins.bool",  # the module has a variable of that name
    r"\Aimport": "import builtins\nimport",
    r"(_runtime_cache\(self), \*args, \*\*kwargs\):": r"\1) -> IRuntimeCache:",  # a signature in C++
}
_C_TYPES = {"size_t": "int", "int": "int", "unsigned int": "int", "unsigned long long": "int"}
_HANDLE_ARGUMENTS = {  # what the docstrings leave untyped
    "stream": "cudaStream_t",
    "event": "cudaEvent_t",
    "graph": "cudaGraph_t",
    "graphExec": "cudaGraphExec_t",
}


def header(distribution: str) -> str:
    version = importlib.metadata.version(distribution)
    return f"# Made by typings/make_stubs.py from {distribution} {version}; names and signatures only. Do not edit.\n"


def tensorrt_stub() -> str:
    """Stubgen's output, with what it gets wrong mended: see MENDED."""
    with tempfile.TemporaryDirectory() as folder:
        package = "tensorrt_rtx_bindings"
        command = [str(Path(sys.executable).parent / "stubgen"), "-q", "--inspect-mode", "-p", package, "-o", folder]
        subprocess.run(command, check=True)
        text = (Path(folder) / package / "tensorrt_rtx.pyi").read_text()
    for pattern, replacement in MENDED.items():
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert count, pattern
    return header("tensorrt_rtx_cu12") + "# mypy: ignore-errors\n__version__: str\n" + text


def cuda_stub() -> str:
    lines = [header("cuda-bindings"), "from enum import IntEnum", "from typing import Any", ""]
    for name in CUDA_ENUMS:
        lines.append(f"class {name}(IntEnum):")
        lines += [f"    {member.name} = {int(member)}" for member in getattr(runtime, name)]
    for name in CUDA_HANDLES:
        assert isinstance(getattr(runtime, name), type)
        lines += [f"class {name}:", "    def __int__(self) -> int: ..."]
    lines += [f"{name}: int" for name in CUDA_FLAGS if isinstance(getattr(runtime, name), int)]
    lines += [cuda_function(name) for name in CUDA_FUNCTIONS]
    return "\n".join(lines) + "\n"


def cuda_function(name: str) -> str:
    """One function: every call returns a tuple that begins with the error, which is no exception."""
    documentation = str(getattr(runtime, name).__doc__)
    arguments = re.match(rf"{name}\((.*?)\)\n", documentation)
    assert arguments, name
    parameters = ", ".join(map(parameter, filter(None, arguments[1].split(", "))))
    section = re.search(r"\nReturns\n-------\n(.*?)(\n\n|\Z)", documentation, re.DOTALL)
    assert section, name
    # an entry is not indented; `bytes` and `cudaError_t` have no name before them
    entries = [line.split(" : ")[-1] for line in section[1].splitlines() if line[:1].strip()]
    kinds = [re.sub(r":py:obj:`~\.(\w+)`", r"\1", entry).removesuffix(".cudaSuccess") for entry in entries]
    kinds = ["int" if kind == "Any" else kind for kind in kinds]  # addresses
    return f"def {name}({parameters}) -> tuple[{', '.join(kinds)}]: ..."


def parameter(text: str) -> str:
    """`size_t count`, `kind: cudaMemcpyKind` or `stream` as a typed parameter."""
    if ": " in text:
        return text
    kind, _, name = text.rpartition(" ")
    return f"{name}: {_C_TYPES[kind] if kind else _HANDLE_ARGUMENTS.get(name, 'Any')}"


if __name__ == "__main__":
    for path, content in {
        "tensorrt_rtx/__init__.pyi": tensorrt_stub(),
        "cuda/bindings/runtime.pyi": cuda_stub(),
    }.items():
        (HERE / path).parent.mkdir(parents=True, exist_ok=True)
        (HERE / path).write_text(content)
