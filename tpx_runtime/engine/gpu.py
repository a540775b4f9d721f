"""The GPU in this machine: the properties that engines depend on."""

import ctypes
import sys
from ctypes import c_int
from dataclasses import dataclass

from ..errors import TpxError
from . import cuda

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute of the compute capability
MANAGEMENT = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"  # NVIDIA's management library


@dataclass(frozen=True)
class Gpu:
    """The GPU that an engine is built for; `name` and `driver` are None if it is not in this machine."""

    capability: int  # compute capability times ten
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


def local_gpu() -> Gpu | None:
    """The first GPU that CUDA sees, or None without a driver or a GPU."""
    try:
        return find_gpu(cuda.Driver())
    except TpxError:
        return None


def _driver_version() -> str | None:
    management, version = cuda.load_library(MANAGEMENT), ctypes.create_string_buffer(96)
    if management is None or management.nvmlInit_v2():
        return None
    failed = management.nvmlSystemGetDriverVersion(version, len(version))
    management.nvmlShutdown()
    return None if failed else version.value.decode(errors="replace")
