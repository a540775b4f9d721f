"""What an export did, as facts that its callers show."""

from dataclasses import dataclass
from pathlib import Path

from tpx_export.quantise.report import Report
from tpx_runtime.verify import PartReport


@dataclass(frozen=True)
class Summary:
    """The result of an export: each graph's verification by variant, the seconds of each task, the bytes of each folder.

    Of an int8 export `int8` is the comparison with fp32, and `loss` one line on why the bundle is not worth having, None if
    it is; a bundle with such a line was kept because the user accepts it.
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
