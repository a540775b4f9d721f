"""The result of an export."""

from dataclasses import dataclass
from pathlib import Path

from tpx_export.quantise.report import Report
from tpx_runtime.verify import PartReport


@dataclass(frozen=True)
class Summary:
    """The verification reports of each graph variant, the seconds of each task, and the bytes of each folder.

    For a quantised export, `quantisation` is the comparison with fp32, and `rejection` is one line that says why the bundle
    would be refused without --accept-loss, or None.
    """

    reports: dict[str, list[PartReport]]
    seconds: dict[str, float]
    folder_bytes: dict[str, int]
    quantisation: Report | None = None
    rejection: str | None = None


def folder_bytes(root: Path) -> dict[str, int]:
    """Bytes of each folder and file directly in `root`."""
    sizes: dict[str, int] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            part = path.relative_to(root).parts[0]
            sizes[part] = sizes.get(part, 0) + path.stat().st_size
    return sizes
