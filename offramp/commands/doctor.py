"""What works on this machine and why the rest does not: `offramp doctor`. Imports none of what it looks for."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

from offramp.gpu import compute_capability
from offramp.runtime.backends import installed_version

_EXTRAS = {  # what one wants to do -> distributions it takes, and the command that brings them
    "train": (("torch", "transformers", "safetensors", "tokenizers"), "pip install 'offramp[train]'"),
    "export": (("torch", "onnx", "onnxscript", "networkx", "nvidia-modelopt"), "pip install 'offramp[export]'"),
    "read texts": (("tokenizers",), "pip install 'offramp[text]'"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that works or does not, and why."""

    subject: str
    works: bool
    detail: str


def diagnose() -> list[Finding]:
    """Everything that offramp can do, in the order of its work."""
    findings = [Finding("python", True, f"{platform.python_version()} on {platform.machine()}")]
    findings += [_extra(subject, packages, cure) for subject, (packages, cure) in _EXTRAS.items()]
    findings.append(_onnxruntime())
    sm = compute_capability()
    findings.append(Finding("gpu", bool(sm), f"compute capability {sm}" if sm else "no NVIDIA driver or GPU here"))
    return [
        *findings,
        _tensorrt(sm),
        _tensorrt_rtx(),
        *(_plans(backend, sm) for backend in ("tensorrt", "tensorrt-rtx")),
    ]


def _extra(subject: str, packages: tuple[str, ...], cure: str) -> Finding:
    found = {name: _version(name) for name in packages}
    if missing := [name for name, version in found.items() if not version]:
        return Finding(subject, False, f"missing {', '.join(missing)}; {cure}")
    return Finding(subject, True, ", ".join(f"{name} {version}" for name, version in found.items()))


def _onnxruntime() -> Finding:
    found = {name: version for name in ("onnxruntime", "onnxruntime-gpu") if (version := _version(name))}
    if len(found) == 2:
        detail = "onnxruntime and onnxruntime-gpu overwrite each other; `pip uninstall` both, install one"
        return Finding("run on onnxruntime", False, detail)
    if not found:
        return Finding("run on onnxruntime", False, "not installed; pip install 'offramp[onnxruntime]'")
    return Finding("run on onnxruntime", True, ", ".join(f"{name} {version}" for name, version in found.items()))


def _tensorrt(sm: str) -> Finding:
    version = installed_version("tensorrt")
    if not version:
        return Finding("build tensorrt", False, "not installed; pip install 'offramp[tensorrt]' on a GPU machine")
    if not sm:
        return Finding("build tensorrt", False, f"{version}, but its builder needs a GPU; use --backend tensorrt-rtx")
    return Finding("build tensorrt", True, f"{version} for compute capability {sm}")


def _tensorrt_rtx() -> Finding:
    version = installed_version("tensorrt-rtx")
    if not version:
        return Finding("build tensorrt-rtx", False, "not installed; pip install 'offramp[tensorrt-rtx]'")
    return Finding("build tensorrt-rtx", True, f"{version}, ahead of time, no GPU needed")


def _plans(backend: str, sm: str) -> Finding:
    """Whether plans of a backend run here."""
    found = {"cuda-bindings": _version("cuda-bindings"), backend: installed_version(backend)}
    subject = f"run on {backend}"
    if missing := [name for name, version in found.items() if not version]:
        return Finding(subject, False, f"missing {', '.join(missing)}; pip install 'offramp[{backend}]'")
    if not sm:
        return Finding(subject, False, f"{found[backend]}, but plans run on an NVIDIA GPU with a driver; none here")
    return Finding(subject, True, f"{found[backend]} for compute capability {sm}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
