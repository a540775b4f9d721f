"""What an export did, as facts that its callers show."""

from dataclasses import dataclass
from pathlib import Path

from tpx_export.quantise.report import Report
from tpx_runtime.verify import PartReport


@dataclass(frozen=True)
class Summary:
    """What an export did: the verification of each graph by spelling, seconds of each task, bytes by folder.

    In int8 also its comparison with fp32, and what speaks against it: a bundle that has such a line was kept all the same.
    """

    reports: dict[str, list[PartReport]]
    seconds: dict[str, float]
    folder_bytes: dict[str, int]
    int8: Report | None = None
    loss: str | None = None


def folder_bytes(root: Path) -> dict[str, int]:
    """Bytes of each folder, or file, right under `root`."""
    sizes: dict[str, int] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            part = path.relative_to(root).parts[0]
            sizes[part] = sizes.get(part, 0) + path.stat().st_size
    return sizes
