"""Available memory."""

import re
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process can still allocate, within the limit of its container if any. None if unknown."""
    limits = []
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", (root / "proc/meminfo").read_text())
        limits += [int(found[1]) << 10] if found else []
        group = root / "sys/fs/cgroup"
        used = int((group / "memory.current").read_text())
        spare = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        limits.append(int((group / "memory.max").read_text()) - used + (int(spare[1]) if spare else 0))
    except (OSError, ValueError):  # not Linux, no cgroup, or a cgroup whose limit is "max"
        pass
    return min(limits, default=None)
