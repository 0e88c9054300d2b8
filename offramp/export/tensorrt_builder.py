"""The door to TensorRT's and TensorRT-RTX's builder: one ONNX graph in, one plan out.

The only module that imports `tensorrt` or `tensorrt_rtx`, when a builder is opened and not before. It knows
nothing of bundles, writes no plan to disk and runs none.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from offramp.errors import BackendError, BuildError, OptionError, StorageError
from offramp.export.build_progress import OnProgress, progress_monitor
from offramp.export.profile import Profile
from offramp.gpu import compute_capability
from offramp.plan import RTX_GPUS, is_same_version, plan_header
from offramp.storage import storage_error, write_file

BACKENDS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> module
MAX_OPT_LEVEL = 5  # IBuilderConfig.builder_optimization_level
RTX_TARGETS = RTX_GPUS[1:]  # where no compute capability is named: TensorRT-RTX builds for Turing (7.5) on request only
_MAX_MESSAGES = 8
# Layers by what they do: those that move or convert values say nothing about where the arithmetic happens.
_MOVES = {"CONCATENATION", "GATHER", "SELECT", "SHUFFLE", "SLICE", "SQUEEZE", "UNSQUEEZE"}
_CONVERTS = {"CAST", "CONSTANT", "IDENTITY", "SHAPE"}
_HEAVY = {"ATTENTION_OUTPUT", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "MATRIX_MULTIPLY"}
_LOCK = threading.Lock()  # one build at a time: the logger and its messages belong to the process


@dataclass(frozen=True)
class BuilderOptions:
    """How to build, whatever the graph. Raises OptionError when an option does nothing on the backend."""

    backend: str = "tensorrt-rtx"
    workspace_mib: int = 0  # 0: as much as the GPU has
    timing_cache: Path | None = None
    opt_level: int = 3
    compute_capabilities: tuple[str, ...] = ()  # TensorRT-RTX only; none named: RTX_TARGETS
    hardware_compat: bool = False  # TensorRT only: any GPU from SM 8.0 on, at the cost of speed
    version_compatible: bool = False  # TensorRT only: this version and later ones, at the cost of speed

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise OptionError(f"--backend {self.backend}: expected one of {', '.join(BACKENDS)}")
        if self.workspace_mib < 0:
            raise OptionError(f"--workspace {self.workspace_mib}: expected MiB, at least 0 (0: no limit)")
        if not 0 <= self.opt_level <= MAX_OPT_LEVEL:
            raise OptionError(f"--opt-level {self.opt_level}: expected 0 to {MAX_OPT_LEVEL}")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise OptionError(f"--compute-capability {','.join(self.compute_capabilities)}: one is given twice")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise OptionError(f"--compute-capability {capability}: expected a number such as 8.6")
        self._check_backend()

    def _check_backend(self) -> None:
        if self.backend == "tensorrt":
            if self.compute_capabilities:
                raise OptionError(
                    "--compute-capability: the tensorrt backend builds for the GPU it runs on; drop the "
                    "option, or use `--backend tensorrt-rtx` or `--hardware-compat`"
                )
            return
        reasons = {
            "--timing-cache": (self.timing_cache is not None, "TensorRT-RTX times nothing when it builds"),
            "--hardware-compat": (
                self.hardware_compat,
                f"TensorRT-RTX plans already run on SM {', '.join(RTX_TARGETS)}",
            ),
            "--version-compatible": (
                self.version_compatible,
                "TensorRT-RTX plans run on the very version that built them",
            ),
        }
        for option, (is_set, reason) in reasons.items():
            if is_set:
                raise OptionError(f"{option}: {reason}; drop the option, or use `--backend tensorrt`")


@dataclass(frozen=True)
class Backend:
    """A TensorRT that can build here: its module, its version and the GPUs that its plans will run on."""

    options: BuilderOptions
    module: Any
    version: str  # as plans record it: with "+" when later versions can run them too
    targets: tuple[str, ...]


@dataclass(frozen=True)
class BuiltPlan:
    """A plan in memory, with the share of the parsed network's layers that compute in FP16."""

    content: bytes
    fp16_share: float
    seconds: float


def open_backend(options: BuilderOptions) -> Backend:
    """Find the package and, for TensorRT, the GPU. Raises BackendError or OptionError; makes no builder."""
    sm = ""
    if options.backend == "tensorrt":
        sm = compute_capability()
        if not sm:  # a Builder or a Runtime without a driver ends the process: never get that far
            raise BackendError(
                "opening the tensorrt backend: it builds on the GPU, and this machine has no NVIDIA GPU with "
                "a driver; use `--backend tensorrt-rtx`, which needs none, or build on the target machine"
            )
    module = _module(options.backend)
    version = str(module.__version__) + ("+" if options.version_compatible else "")
    if options.backend == "tensorrt":
        return Backend(options, module, version, ("8.0+" if options.hardware_compat else sm,))
    known = {_capability_name(c): c for c in module.ComputeCapability.__members__ if c.startswith("SM")}
    for capability in options.compute_capabilities:
        if capability not in known:
            raise OptionError(
                f"--compute-capability {capability}: TensorRT-RTX {version} builds for {', '.join(known)}"
            )
    return Backend(options, module, version, options.compute_capabilities or RTX_TARGETS)


def plan_from_onnx(
    model: bytes, profile: Profile, precision: str, backend: Backend, on_progress: OnProgress
) -> BuiltPlan:
    """Build the plan of a self-contained ONNX graph for one optimization profile.

    `precision` is what the graph was lowered to, "fp16" or "fp32". Ctrl-C in the main thread, or anything
    raised by `on_progress`, cancels the build. Raises BuildError with the parser's nodes or the builder's
    messages, when an FP16 graph would compute in FP32, and when cancelled.
    """
    started = time.perf_counter()
    with _LOCK:
        log = _logger(backend.options.backend)
        log.messages.clear()
        monitor = progress_monitor(backend.module, on_progress)  # outlives the builder, which is made below
        try:
            with _stdout_spared():
                content, fp16_share = _build(model, profile, precision, backend, (log, monitor))
            on_progress(1.0, "Built")  # TensorRT leaves out the last steps
        except KeyboardInterrupt as exc:
            raise BuildError("building a plan: cancelled; run the command again to go on") from exc
    _check_header(content, backend)
    return BuiltPlan(content, fp16_share, time.perf_counter() - started)


@contextlib.contextmanager
def _stdout_spared() -> Iterator[None]:
    """Send what the builder's C++ prints to stderr: past its logger it warns of lossy casts where JSON should go."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _build(
    model: bytes, profile: Profile, precision: str, backend: Backend, watchers: tuple[Any, Any]
) -> tuple[bytes, float]:
    """The plan and its FP16 share; every TensorRT object made here dies with this frame."""
    log, monitor = watchers
    trt = backend.module
    builder = trt.Builder(log)
    if not builder:
        raise BuildError(f"making a builder: {_said(log)}")
    network = _parsed_network(model, builder, backend, log)
    fp16_share, is_fp16 = _fp16_share(trt, network)
    if precision == "fp16" and not is_fp16:
        raise BuildError(
            "building an FP16 plan: the graph's matrix multiplications and convolutions all compute in FP32; "
            "lower it again with `offramp export --precision fp16`, or build with `--precision fp32`"
        )
    _decompose_attentions(trt, network)
    config = _config(builder, backend, profile)
    config.progress_monitor = monitor
    cache = _attach_timing_cache(config, backend.options)
    plan = _run_cancellable(functools.partial(builder.build_serialized_network, network, config), monitor)
    if plan is None:
        raise BuildError(f"building a plan: {_said(log)}; change the graph or the options, or run with ONNX Runtime")
    if cache is not None and backend.options.timing_cache is not None:
        write_file(backend.options.timing_cache, bytes(cache.serialize()))
    return bytes(plan), fp16_share


def _module(backend: str) -> ModuleType:
    try:
        return importlib.import_module(BACKENDS[backend])
    except (ImportError, OSError, RuntimeError) as exc:
        raise BackendError(
            f"opening the {backend} backend: importing {BACKENDS[backend]} failed: {exc}; "
            f"run `pip install 'offramp[{backend}]'`"
        ) from exc


def _parsed_network(model: bytes, builder: Any, backend: Backend, log: Any) -> Any:
    """The strongly typed network of the graph. Raises BuildError that names every node refused."""
    trt = backend.module
    # Required on TensorRT 10.x, ignored on 11, where there is nothing else (docs/log.md).
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if parser.parse(model):
        return network
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors[:_MAX_MESSAGES]]
    raise BuildError(
        f"parsing the graph with {backend.options.backend} {backend.version}: "
        f"{'; '.join(lines) or _said(log)}; replace the operator, or run this bundle with ONNX Runtime"
    )


def _config(builder: Any, backend: Backend, profile: Profile) -> Any:
    """A builder configuration with the options and the profile. Raises BuildError, OptionError."""
    trt, options = backend.module, backend.options
    config = builder.create_builder_config()
    config.builder_optimization_level = options.opt_level
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.hardware_compat:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            value = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
            if not config.set_compute_capability(value, index):
                raise BuildError(f"--compute-capability {capability}: refused by TensorRT-RTX")
    if profile:
        _add_profile(builder, config, profile)
    return config


def _add_profile(builder: Any, config: Any, profile: Profile) -> None:
    shapes = builder.create_optimization_profile()
    for name, (low, opt, high) in profile.items():
        try:
            shapes.set_shape(name, low, opt, high)
        except ValueError as exc:
            raise BuildError(f"optimization profile of input {name!r}, {low} {opt} {high}: {exc}") from exc
    if config.add_optimization_profile(shapes) < 0:
        raise BuildError(f"optimization profile {profile}: refused by TensorRT; check the --…-shapes options")


def _fp16_share(trt: Any, network: Any) -> tuple[float, bool]:
    """Share of the computing layers that are FP16, and whether one that costs (or, without any, all) is."""
    floats = (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16)
    computing: list[bool] = []  # per layer with floating-point output: is it FP16?
    heavy: list[bool] = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind, output = layer.type.name, layer.get_output(0)
        if kind in _MOVES | _CONVERTS or output is None or output.dtype not in floats:
            continue
        is_half = output.dtype == trt.DataType.HALF
        computing.append(is_half)
        if kind in _HEAVY:
            heavy.append(is_half)
    share = sum(computing) / len(computing) if computing else 0.0
    return share, any(heavy or computing)


def _decompose_attentions(trt: Any, network: Any) -> None:
    """Let TensorRT fall back to plain matrix products where it has no fused kernel for an Attention node."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # TensorRT-RTX 1.7; older ones lack it
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings hand out the base class
            layer.attention.decomposable = True


def _attach_timing_cache(config: Any, options: BuilderOptions) -> Any:
    """Give the builder the timing cache in the file, an empty one at first; None without the option."""
    if options.timing_cache is None:
        return None
    try:
        content = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
    except OSError as exc:
        raise storage_error(f"reading the timing cache {options.timing_cache}", exc) from exc
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise StorageError(
            f"reading the timing cache {options.timing_cache}: it is not one, or another GPU or TensorRT "
            "wrote it; remove the file or name another one"
        )
    return cache


def _run_cancellable(build: Callable[[], Any], monitor: Any) -> Any:
    """Run `build` in a thread, so that Ctrl-C reaches this one while the builder blocks in C++."""
    with concurrent.futures.ThreadPoolExecutor(1, "offramp-build") as pool:
        future = pool.submit(build)
        try:
            while not future.done():  # short waits: on Windows a wait without end cannot be interrupted
                concurrent.futures.wait([future], timeout=0.2)
        except KeyboardInterrupt:
            monitor.is_cancelled.set()  # leaving the block waits for the builder to notice
            raise
    if monitor.raised is not None:
        raise monitor.raised
    return future.result()


def _check_header(content: bytes, backend: Backend) -> None:
    """Raise BuildError when the plan does not say that this backend in this version wrote it."""
    header = plan_header(content)
    if header.backend != backend.options.backend or not is_same_version(header.version, backend.version):
        raise BuildError(
            f"reading back the plan: its header says {header.backend} {header.version}, "
            f"expected {backend.options.backend} {backend.version}; see what is installed: `offramp doctor`"
        )


def _said(log: Any) -> str:
    return "; ".join(log.messages[-_MAX_MESSAGES:]) or "TensorRT gave no reason"


def _capability_name(member: str) -> str:
    """ComputeCapability.SM86 as "8.6"."""
    digits = member.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


@functools.cache
def _logger(backend: str) -> Any:
    """The logger of a backend: TensorRT may use it as long as the process lives, so it does too."""
    trt: Any = _module(backend)

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong; warnings and progress are not errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.messages.append(message.strip())

    return Log()
