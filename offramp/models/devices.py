"""Where training computes: the CPU, or a GPU that PyTorch can use. Models come back to the CPU when it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from offramp.errors import OptionError

Precision = Literal["auto", "float32", "bfloat16"]
CPU = torch.device("cpu")


def device_from_name(name: str) -> torch.device:
    """The device called cpu, cuda, cuda:1 and so on; "auto" is the first GPU where there is one, else the CPU.

    Raises OptionError when there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise OptionError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:NUMBER") from exc
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:NUMBER")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"device: got {name!r}, and PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; "
            "train on the cpu, or install a PyTorch built for CUDA"
        )
    return device


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are, which lie together."""
    return next(model.parameters()).device


@contextmanager
def placed(device: torch.device, *models: nn.Module | None) -> Iterator[None]:
    """Have the models' weights on `device` within the block, and on the CPU behind it."""
    found = [model for model in models if model is not None]
    try:
        for model in found:
            model.to(device)
        yield
    finally:
        for model in found:
            model.to(CPU)


def precision_on(device: torch.device, precision: Precision) -> Literal["float32", "bfloat16"]:
    """Resolve "auto": bfloat16 where the device multiplies it in hardware, else float32.

    On a CPU that is AVX512_BF16 or AMX; elsewhere bfloat16 is emulated and slower than float32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities()
    in_hardware = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if in_hardware else "float32"


@contextmanager
def products(precision: Precision = "auto", device: torch.device = CPU) -> Iterator[None]:
    """Compute matrix products on `device` in `precision`, the rest in float32."""
    enabled = precision_on(device, precision) == "bfloat16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
        yield
