"""Chooses what executes the segments of a bundle. Never imports a backend that was not chosen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from offramp.bundle import Manifest, PlanRecord
from offramp.errors import BackendError, OptionError, PlanError
from offramp.gpu import compute_capability
from offramp.plan import choose_plans, narrowed, plan_obstacle
from offramp.runtime.engine import Engine
from offramp.runtime.tensorrt.options import TensorRtOptions

ONNXRUNTIME = "onnxruntime"
BACKENDS = (ONNXRUNTIME, "tensorrt", "tensorrt-rtx")
_PACKAGES = {  # backend -> distributions that provide it, under any of these names
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}


class PlanWarning(UserWarning):
    """A plan of the bundle cannot run here; the bundle runs on ONNX Runtime instead."""


@dataclass(frozen=True)
class EngineOptions:
    """Which engines to open. Raises OptionError."""

    backend: str = "auto"  # or one of BACKENDS
    precision: str = "auto"  # ONNX Runtime: fp32; TensorRT: what there are plans for, FP16 first
    threads: int = 0  # of ONNX Runtime; 0: it decides
    tensorrt: TensorRtOptions = TensorRtOptions()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise OptionError(
                f"opening engines: got backend {self.backend!r}, expected one of auto, {', '.join(BACKENDS)}"
            )
        if not isinstance(self.threads, int) or self.threads < 0:
            raise OptionError(
                f"opening engines: got threads={self.threads!r}, expected 0 (the backend decides) or more"
            )


class OpenedEngines(NamedTuple):
    """Engines, what they run on, the bundle's manifest with the dimensions they can run, and what they were made of."""

    engines: Sequence[Engine]
    backend: str
    precision: str
    manifest: Manifest
    files: tuple[str, ...]  # E: SHA-256 of the graph or plan of each segment


def open_engines(bundle: Path, manifest: Manifest, options: EngineOptions) -> OpenedEngines:
    """The engines of `bundle`. Raises OptionError, BundleError, BackendError.

    "auto" is TensorRT where every segment has a plan that runs here, otherwise ONNX Runtime. It then warns
    (PlanWarning) where a TensorRT is installed and its plans in the bundle were built by another version, or where
    there is a GPU that they could or should have run on. Where TensorRT is not installed nobody expects plans to run,
    and nothing is said.
    """
    if options.backend in _PACKAGES:
        return _open_tensorrt(bundle, manifest, options.backend, options)
    if options.backend == "auto":
        opened = _opened_where_plans_run(bundle, manifest, options)
        if opened is not None:
            return opened
    precision = "fp32" if options.precision == "auto" else options.precision
    try:
        from offramp.runtime.onnxruntime_engine import open_onnxruntime_engines
    except ImportError as exc:
        raise BackendError(
            f"opening {bundle}: ONNX Runtime is not installed here ({exc}); run `pip install 'offramp[onnxruntime]'`"
        ) from exc
    engines = open_onnxruntime_engines(bundle, manifest, precision, options.threads)
    files = tuple(segment.graphs[precision].sha256 for segment in manifest.segments)
    return OpenedEngines(engines, ONNXRUNTIME, precision, manifest, files)


def _open_tensorrt(bundle: Path, manifest: Manifest, backend: str, options: EngineOptions) -> OpenedEngines:
    """The engines of a TensorRT backend. Raises BackendError, PlanError, BundleError."""
    from offramp.runtime.tensorrt.engine import open_tensorrt_engines

    version, sm = installed_version(backend), compute_capability()
    if not version:
        raise BackendError(f"opening {bundle}: {backend} is not installed; run `pip install 'offramp[{backend}]'`")
    if not sm:
        raise BackendError(
            f"opening {bundle}: {backend} {version} runs on an NVIDIA GPU with a driver, and this machine has none; "
            f"use backend='{ONNXRUNTIME}'"
        )
    try:
        plans = choose_plans(manifest, backend, options.precision, version, sm)
    except PlanError as exc:
        raise PlanError(f"opening {bundle}: {exc}") from exc
    fitted = narrowed(manifest, plans)
    engines = open_tensorrt_engines(bundle, fitted, plans, options.tensorrt)
    return OpenedEngines(engines, backend, plans[0].precision, fitted, tuple(plan.file.sha256 for plan in plans))


def _opened_where_plans_run(bundle: Path, manifest: Manifest, options: EngineOptions) -> OpenedEngines | None:
    """The engines of the first TensorRT whose plans all run here, or None; says why not where somebody may wonder."""
    problem = ""
    sm = compute_capability()
    for backend in _PACKAGES if sm else ():
        try:
            choose_plans(manifest, backend, options.precision, installed_version(backend), sm)
        except PlanError:
            continue
        try:
            return _open_tensorrt(bundle, manifest, backend, options)
        except BackendError as exc:
            problem = problem or str(exc)
    if problem := problem or plan_problem(manifest, options.precision):
        warnings.warn(f"{bundle}: {problem}; running on ONNX Runtime instead", PlanWarning, stacklevel=4)
    return None


def plan_problem(manifest: Manifest, precision: str = "auto") -> str:
    """Why TensorRT plans of the bundle do not run here although their TensorRT is installed, or ""."""
    sm = compute_capability()
    for backend in _PACKAGES:
        version = installed_version(backend)
        has_plans = any(plan.backend == backend for segment in manifest.segments for plan in segment.plans)
        if not version or not has_plans:
            continue
        if sm:
            try:
                choose_plans(manifest, backend, precision, version, sm)
            except PlanError as exc:
                return str(exc)
            continue
        for segment in manifest.segments:
            plans = [plan for plan in segment.plans if plan.backend == backend]
            if plans and not any(_runs_on_its_gpu(plan, version) for plan in plans):
                return (
                    f"segment {segment.index}: plan was built by {backend} {plans[0].version}, this machine has "
                    f"{version} and no GPU; run `offramp build-engine BUNDLE`"
                )
    return ""


def _runs_on_its_gpu(plan: PlanRecord, version: str) -> bool:
    return any(not plan_obstacle(plan, version, target.rstrip("+")) for target in plan.targets)


def installed_version(backend: str) -> str:
    """The version of the TensorRT package for `backend`, "" when it is not installed. Imports nothing."""
    from importlib import metadata  # 12 ms, for those who have no plans at all

    for package in _PACKAGES.get(backend, ()):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return ""
