"""Formats a record as Markdown: machine, settings, a table per depth and device, and what could not be measured and why."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tpx_runtime.image_size import format_size

from .configurations import GPU_REFERENCE, REFERENCE
from .summary import SAME_IMAGE_DB, Row, batches, peak_flops, reference, rows

Json = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]  # by heading
DEVICES = ("cpu", "gpu")


def as_text(data: Json) -> str:
    """The whole report."""
    every, sizes = rows(data), batches(data)
    parts = [_heading(data)]
    for depth in sorted({row.depth for row in every}):
        at_depth = [row for row in every if row.depth == depth]
        measured = [row for row in at_depth if row.image_s is not None]
        parts.append(f"## Depth {depth}{_flops(data, depth)}")
        for device in DEVICES:
            if there := [row for row in measured if row.device == device]:
                parts.append(_table(there, _columns(device, sizes, reference(data, depth, device))))
        parts += _remarks(measured, data, depth)
        if notes := [_compiled(row) for row in measured if "setting" in row.notes]:
            parts.append("\n".join(notes))
        if failed := [row for row in at_depth if row.problem]:
            parts.append("Not measured:\n\n" + "\n".join(f"- {row.name}: {row.problem}" for row in failed))
    return "\n\n".join(parts)


def _heading(data: Json) -> str:
    settings, machine = data["settings"], data["settings"]["machine"]
    subject = f'"{settings["prompt"]}"' if settings["class_id"] is None else f"class {settings['class_id']}"
    size = format_size(settings["image_size_px"])
    taken = [
        len(samples) for entry in data["configurations"].values() for samples in entry["samples"].values()
    ]
    peaks = [
        f"{precision} {peak / 1e9:.0f} GFLOP/s ({data['peaks'][precision]['by']})"
        for precision in data["peaks"]
        if (peak := peak_flops(data, precision))
    ]
    return "\n".join(
        [
            f"# {settings['bundle']} ({settings['precision']}), {size} pixels",
            "",
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"{machine['gpu'] or 'no NVIDIA GPU'}, {machine['system']}. "
            f"{subject}, seed {settings['seed']}, {settings['steps']} steps of {settings['sampler']}, "
            f"guidance {settings['guidance']:g}. "
            f"Medians of up to {max(taken, default=0)} interleaved rounds.",
            f"Peak of matrix products here: {', '.join(peaks) or 'not measured'}.",
        ]
    )


def _flops(data: Json, depth: int) -> str:
    flops = data["flops"].get(str(depth))
    if isinstance(flops, int):
        return f": {flops / 1e9:.2f} GFLOP per step"
    return f" (operations not counted: {flops})" if flops else ""


def _columns(device: str, sizes: list[int], reference: str | None) -> Columns:
    known = {REFERENCE: "eager fp32", GPU_REFERENCE: "eager fp32, GPU"}.get(
        reference or "", reference or "none"
    )
    columns: Columns = {
        {"cpu": "configuration", "gpu": "on the GPU"}[device]: lambda row: row.name,
        "cold start, s": lambda row: _number(row.cold_s, ".2f"),
        "ms/step": lambda row: _number(row.step_ms, ".2f"),
        "s/image": lambda row: _number(row.image_s, ".3f"),
        "spread": lambda row: _number(row.spread, ".0%"),
        f"speed-up over {known}": lambda row: _number(row.speed_up, ".2f"),
    }
    columns |= {f"images/s, batch {size}": partial(_images_per_s, size=size) for size in sizes if size > 1}
    columns["peak MB"] = lambda row: _number(row.peak_mb, ".0f")
    if device == "gpu":
        columns["GPU MB"] = lambda row: _number(row.gpu_mb, ".0f")
    columns["PSNR, dB"] = _psnr
    if device == "cpu":
        columns["of GEMM peak"] = lambda row: _number(row.peak_share, ".0%")
    return columns


def _images_per_s(row: Row, size: int) -> str:
    return _number(row.images_per_s.get(size), ".2f")


def _psnr(row: Row) -> str:
    return "same image" if row.same else _number(row.psnr_db, ".1f") + ", different image" * row.differs


def _table(measured: list[Row], columns: Columns) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in measured]
    return "\n".join(lines)


def _remarks(measured: list[Row], data: Json, depth: int) -> list[str]:
    """Warnings about figures that cannot be compared."""
    remarks = []
    drawn_by = reference(data, depth, "cpu")
    if differing := [row.name for row in measured if row.differs]:
        remarks.append(
            f"Different image than {drawn_by} (PSNR below {SAME_IMAGE_DB:g} dB): {'; '.join(differing)}. These figures are "
            "not of the same model: check that the bundle was exported from the checkpoint --ckpt, then run tpx-verify."
        )
    if any(row.device == "gpu" for row in measured):
        remarks.append(
            "Peak MB is the system's memory. GPU MB is what the process holds on the GPU after a batch of each size."
        )
    for device in DEVICES:
        name = reference(data, depth, device)
        compared = any(row.name == name for row in measured)
        if without := [r.name for r in measured if compared and r.device == device and r.speed_up is None]:
            remarks.append(
                f"No speed-up for {'; '.join(without)}: measured in another run than {name}, when the machine may have been "
                "slower or faster; measure all with a new --json to compare them."
            )
    return remarks


def _compiled(row: Row) -> str:
    tried = ", ".join(f"{name} {ms:.2f} ms" for name, ms in row.notes["tried"].items())
    return f"- {row.name}: {row.notes['setting']} was the fastest ({tried}); compiled in {row.notes['compile_s']:.0f} s"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
