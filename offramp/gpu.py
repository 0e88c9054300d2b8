"""Whether this machine has an NVIDIA GPU, asked of the driver itself. Standard library only.

TensorRT's builder and runtime end the process when there is no driver, so this is asked before either is
made. It allocates nothing on the GPU and makes no context.
"""

from __future__ import annotations

import ctypes
import sys

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def compute_capability(device: int = 0) -> str:
    """The compute capability of a GPU as "8.6", or "" when there is no driver or no such GPU."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return ""
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value <= device:
        return ""
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR: 75 and 76 in cuda.h
    for value, attribute in ((major, 75), (minor, 76)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return ""
    return f"{major.value}.{minor.value}"
