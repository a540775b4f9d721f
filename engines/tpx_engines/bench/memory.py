"""The peak memory of a process (its own high-water mark, or the current memory of it and its children), and of the GPUs."""

import re
import sys
from ctypes import Structure, byref, c_uint, c_uint64, c_void_p
from pathlib import Path

from tpx_runtime.engine.cuda import load_library
from tpx_runtime.engine.gpu import MANAGEMENT

_PROC = Path("/proc")


def peak_bytes(proc: Path = _PROC) -> int:
    """The larger of this process's high-water mark and the sum of the proportional set sizes of it and its live children.

    Children that have ended (such as a compiler) are not counted. Linux resets VmHWM when a program starts; `ru_maxrss`,
    used without /proc, may be inherited from the parent.
    """
    high_water = _kilobytes(proc / "self/status", "VmHWM")
    if high_water is None:
        return _usage_bytes()
    proportional = [
        _kilobytes(proc / name / "smaps_rollup", "Pss") or 0 for name in ("self", *_children(proc))
    ]
    return max(high_water, sum(proportional)) << 10


def _children(proc: Path) -> list[str]:
    """Process ids of all descendants."""
    found, queue = [], ["self"]
    while queue:
        try:
            below = (proc / queue[0] / "task").glob("*/children")
            children = [pid for listed in below for pid in listed.read_text().split()]
        except OSError:  # the process has ended
            children = []
        found += children
        queue = queue[1:] + children
    return found


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        match = re.search(rf"^{field}:\s*(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) if match else None


def _usage_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit


class _Memory(Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", c_uint64), ("free", c_uint64), ("used", c_uint64))


def gpu_bytes() -> int:
    """Memory in use on all NVIDIA GPUs together, by any process; 0 without a driver."""
    library, count, used = load_library(MANAGEMENT), c_uint(), 0
    if library is None or library.nvmlInit_v2():
        return 0
    library.nvmlDeviceGetCount_v2(byref(count))
    for number in range(count.value):
        device, memory = c_void_p(), _Memory()
        library.nvmlDeviceGetHandleByIndex_v2(number, byref(device))
        library.nvmlDeviceGetMemoryInfo(device, byref(memory))
        used += memory.used
    library.nvmlShutdown()
    return used
