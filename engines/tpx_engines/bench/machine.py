"""Describes the machine that measurements apply to: processor, cores, memory and GPU."""

import os
import platform
import re
from pathlib import Path
from typing import Any

from tpx_runtime.engine.gpu import local_gpu

# Variables that limit the threads of some libraries, which would make the comparison unfair.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def describe() -> dict[str, Any]:
    """The description that a record stores; only the same machine can continue it. Contains no host or user name."""
    gpu = local_gpu()
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "memory_gib": _memory_gib(),
        "gpu": gpu.name if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def available_cores() -> int:
    """Number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = [
        re.search(rf"^{field}\s*:\s*(.+)$", text, re.M) for field in ("model name", "cpu family", "model")
    ]
    name, family, model = (match[1] if match else "" for match in found)
    return f"{name} (family {family}, model {model})" if name and family else name or platform.processor()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError, AttributeError):
        return None
