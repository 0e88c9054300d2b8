"""What this CPU can do, as far as ONNX Runtime's INT8 kernels ask. Standard library only."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_X86 = {"x86_64", "amd64", "i386", "i686"}


@functools.cache
def saturates_bytes(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether sums of unsigned x signed bytes saturate at 16 bits in ONNX Runtime's kernels: on x86 without VNNI.

    Where the flags of an x86 CPU cannot be read the answer is yes: right answers before fast ones.
    """
    if platform.machine().lower() not in _X86:
        return False
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    flags = next((line.split(":", 1)[-1].split() for line in lines if line.startswith("flags")), [])
    return not any(flag in ("avx512_vnni", "avx_vnni") for flag in flags)
