"""How much memory a process took: its own high-water mark, and what it and its children hold now."""

import re
import sys
from pathlib import Path

_PROC = Path("/proc")


def peak_bytes(proc: Path = _PROC) -> int:
    """Of this process and its living children: the larger of its high-water mark and of the proportional set sizes' sum.

    A child of it that ended (a compiler, say) is not counted. Linux's VmHWM begins anew with a program; `ru_maxrss`, used
    where there is no /proc, may be that of the parent, from which it was inherited.
    """
    own = _kilobytes(proc / "self/status", "VmHWM")
    if own is None:
        return _usage_bytes()
    proportional = [
        _kilobytes(proc / name / "smaps_rollup", "Pss") or 0 for name in ("self", *_children(proc))
    ]
    return max(own, sum(proportional)) << 10


def _children(proc: Path) -> list[str]:
    """Process ids of all descendants."""
    found, ahead = [], ["self"]
    while ahead:
        try:
            below = (proc / ahead[0] / "task").glob("*/children")
            own = [pid for listed in below for pid in listed.read_text().split()]
        except OSError:  # ended meanwhile
            own = []
        found += own
        ahead = ahead[1:] + own
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
