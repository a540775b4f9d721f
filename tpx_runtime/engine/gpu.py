"""Which GPU is in this machine, as far as an engine depends on it."""

import ctypes
import os
import sys
from ctypes import c_int
from dataclasses import dataclass

from ..errors import TpxError
from . import cuda

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute of the compute capability
GRAPHS_VARIABLE, LOOP_VARIABLE = "TPX_CUDA_GRAPHS", "TPX_DEVICE_LOOP"
_MANAGEMENT = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Gpu:
    """What an engine is built for; `name` and `driver` are None for a GPU that is not in this machine."""

    capability: int  # times ten
    name: str | None = None
    driver: str | None = None


def find_gpu(driver: cuda.Driver) -> Gpu:
    """The first GPU that CUDA sees. Raises CudaFailed."""
    device, name = driver.handle("cuDeviceGet", 0, kind=c_int), ctypes.create_string_buffer(256)
    driver.call("cuDeviceGetName", name, len(name), device)
    major, minor = (
        driver.handle("cuDeviceGetAttribute", which, device, kind=c_int) for which in (_MAJOR, _MINOR)
    )
    return Gpu(major * 10 + minor, name.value.decode(errors="replace"), _driver_version())


def gpu_here() -> Gpu | None:
    """The same; None without a driver or a GPU."""
    try:
        return find_gpu(cuda.Driver())
    except TpxError:
        return None


def graphs_wanted() -> bool | None:
    """Whether each graph is to be launched as one CUDA graph, by TPX_CUDA_GRAPHS=1 or 0; None where that says nothing."""
    said = os.environ.get(GRAPHS_VARIABLE, "")
    return said != "0" if said else None


def loop_wanted() -> bool:
    """Whether latents are to stay on the device for a whole loop, by TPX_DEVICE_LOOP=1."""
    return os.environ.get(LOOP_VARIABLE, "") not in ("", "0")


def _driver_version() -> str | None:
    management, version = cuda.library(_MANAGEMENT), ctypes.create_string_buffer(96)
    if management is None or management.nvmlInit_v2():
        return None
    failed = management.nvmlSystemGetDriverVersion(version, len(version))
    management.nvmlShutdown()
    return None if failed else version.value.decode(errors="replace")
