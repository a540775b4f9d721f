"""Plots a record: seconds per image of every configuration, with one panel per depth."""

import importlib
import io
from pathlib import Path
from typing import Any

from tpx_runtime.errors import BadInput
from tpx_runtime.image_files import check_image_writable
from tpx_runtime.records import write_atomic

from .summary import rows


def check(path: Path) -> None:
    """Check before the measurement that a PNG can be written at `path` and matplotlib is installed. Raises BadInput."""
    check_image_writable(path, (".png",))
    _matplotlib()


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw bars of seconds per image, with error bars of half the spread on both sides. Raises BadInput."""
    figures = _matplotlib()
    measured = [row for row in rows(data) if row.image_s is not None]
    depths = sorted({row.depth for row in measured})
    if not depths:
        raise BadInput("expected at least one measurement to plot, found none; the table has the reasons")
    max_rows = max(sum(row.depth == depth for row in measured) for depth in depths)
    size = (8.0, len(depths) * (0.9 + 0.32 * max_rows))
    figure = figures.Figure(figsize=size, dpi=150, layout="constrained")
    for axes, depth in zip(figure.subplots(len(depths), squeeze=False)[:, 0], depths, strict=True):
        at_depth = sorted(
            (row for row in measured if row.depth == depth), key=lambda row: -(row.image_s or 0)
        )
        seconds = [row.image_s or 0.0 for row in at_depth]
        errors = [0.5 * (row.spread or 0.0) * (row.image_s or 0.0) for row in at_depth]
        bars = axes.barh(
            [row.name for row in at_depth], seconds, xerr=errors, color="#4c78a8", ecolor="#333333"
        )
        axes.bar_label(bars, fmt="%.3f", padding=4)
        axes.set_xlim(0, 1.15 * max(s + e for s, e in zip(seconds, errors, strict=True)))
        axes.set_xlabel("seconds per image")
        axes.set_title(f"{data['settings']['bundle']}, depth {depth}", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomic(path, content.getvalue())


def _matplotlib() -> Any:
    """matplotlib.figure, which needs no display. Raises BadInput."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise BadInput("expected matplotlib for --plot, found none; pip install 'tpx[bench]'") from None
