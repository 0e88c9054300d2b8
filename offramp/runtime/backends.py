"""Chooses what executes the segments of a bundle. Never imports a backend that was not chosen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from offramp.bundle import Manifest, PlanRecord
from offramp.errors import BackendError, OptionError
from offramp.gpu import compute_capability
from offramp.plan import plan_obstacle
from offramp.runtime.engine import Engine

ONNXRUNTIME = "onnxruntime"
BACKENDS = (ONNXRUNTIME, "tensorrt", "tensorrt-rtx")
_PACKAGES = {  # backend -> distributions that provide it, under any of these names
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}


class PlanWarning(UserWarning):
    """A plan of the bundle cannot run here; the bundle runs on ONNX Runtime instead."""


def open_engines(
    bundle: Path, manifest: Manifest, backend: str, precision: str, threads: int
) -> tuple[Sequence[Engine], str]:
    """The engines of `bundle` and the backend they run on. Raises OptionError, BundleError, BackendError.

    "auto" is ONNX Runtime. It warns (PlanWarning) where a TensorRT is installed and its plans in the bundle
    were built by another version, or where there is a GPU that they could or should have run on. Where
    TensorRT is not installed nobody expects plans to run, and nothing is said.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise OptionError(f"opening {bundle}: got backend {backend!r}, expected one of auto, {', '.join(BACKENDS)}")
    if not isinstance(threads, int) or threads < 0:
        raise OptionError(f"opening {bundle}: got threads={threads!r}, expected 0 (the backend decides) or more")
    if backend in _PACKAGES:
        raise BackendError(
            f"opening {bundle}: this version of offramp builds and checks {backend} plans but does not "
            f"execute them yet; use backend='{ONNXRUNTIME}'"
        )
    if backend == "auto" and (reason := plan_problem(manifest)):
        warnings.warn(f"{bundle}: {reason}; running on ONNX Runtime instead", PlanWarning, stacklevel=3)
    try:
        from offramp.runtime.onnxruntime_engine import open_onnxruntime_engines
    except ImportError as exc:
        raise BackendError(
            f"opening {bundle}: ONNX Runtime is not installed here ({exc}); run `pip install 'offramp[onnxruntime]'`"
        ) from exc
    return open_onnxruntime_engines(bundle, manifest, precision, threads), ONNXRUNTIME


def plan_problem(manifest: Manifest) -> str:
    """Why TensorRT plans of the bundle do not run here although their TensorRT is installed, or ""."""
    for backend in _PACKAGES:
        version = installed_version(backend)
        for segment in manifest.segments:
            plans = [plan for plan in segment.plans if plan.backend == backend]
            problems = [_problem(plan, version) for plan in plans] if version else []
            if problems and all(problems):
                return f"segment {segment.index}: {problems[0]}"
    return ""


def _problem(plan: PlanRecord, version: str) -> str:
    sm = compute_capability()
    if sm:
        unexecuted = "plan fits this machine, but this version of offramp does not execute plans yet"
        return plan_obstacle(plan, version, sm) or unexecuted
    on_its_gpu = [plan_obstacle(plan, version, target.rstrip("+")) for target in plan.targets]
    if all(on_its_gpu):
        return (
            f"plan was built by {plan.backend} {plan.version}, this machine has {version} and no GPU; "
            f"run `offramp build-engine BUNDLE`"
        )
    return ""


def installed_version(backend: str) -> str:
    """The version of the TensorRT package for `backend`, "" when it is not installed. Imports nothing."""
    for package in _PACKAGES.get(backend, ()):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return ""
