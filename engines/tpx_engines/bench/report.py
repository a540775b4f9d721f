"""Formats a record as Markdown: machine and settings, one table per depth, and what could not be measured and why."""

from typing import Any

from tpx_runtime.image_size import format_size

from .configurations import REFERENCE
from .summary import SAME_IMAGE_DB, Row, batches, peak_flops, rows

Json = dict[str, Any]


def as_text(data: Json) -> str:
    """The whole report."""
    every, sizes = rows(data), batches(data)
    parts = [_heading(data)]
    for depth in sorted({row.depth for row in every}):
        at_depth = [row for row in every if row.depth == depth]
        measured = [row for row in at_depth if row.image_s is not None]
        parts.append(f"## Depth {depth}{_flops(data, depth)}")
        reference = data["references"].get(str(depth), {}).get("by")
        if measured:
            parts.append(_table(measured, sizes, reference))
        parts += _remarks(measured, reference)
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
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}. "
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


def _table(measured: list[Row], sizes: list[int], reference: str | None) -> str:
    known = {REFERENCE: "eager fp32"}.get(reference or "", reference or "none")
    columns = ["configuration", "cold start, s", "ms/step", "s/image", "spread", f"speed-up over {known}"]
    columns += [f"images/s, batch {size}" for size in sizes if size > 1] + [
        "peak MB",
        "PSNR, dB",
        "of GEMM peak",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in measured:
        cells = [
            row.name,
            _number(row.cold_s, ".2f"),
            _number(row.step_ms, ".2f"),
            _number(row.image_s, ".3f"),
        ]
        cells += [_number(row.spread, ".0%"), _number(row.speed_up, ".2f")]
        cells += [_number(row.images_per_s.get(size), ".2f") for size in sizes if size > 1]
        psnr = "same image" if row.same else _number(row.psnr_db, ".1f") + ", different image" * row.differs
        cells += [_number(row.peak_mb, ".0f"), psnr, _number(row.peak_share, ".0%")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _remarks(measured: list[Row], reference: str | None) -> list[str]:
    """Warnings about figures that cannot be compared."""
    remarks = []
    if differing := [row.name for row in measured if row.differs]:
        remarks.append(
            f"Different image than {reference} (PSNR below {SAME_IMAGE_DB:g} dB): {'; '.join(differing)}. These figures are "
            "not of the same model: check that the bundle was exported from the checkpoint --ckpt, then run tpx-verify."
        )
    if on_gpu := [row.name for row in measured if row.device == "gpu"]:
        remarks.append(
            f"On the GPU: {'; '.join(on_gpu)}. All others, and so the reference of the speed-up, are on the CPU. Peak MB is "
            "the system's memory, not the GPU's."
        )
    compared = any(row.name == reference for row in measured)
    if without_speed_up := [row.name for row in measured if compared and row.speed_up is None]:
        remarks.append(
            f"No speed-up for {'; '.join(without_speed_up)}: measured in another run than {reference}, when the machine may "
            "have been slower or faster; measure all with a new --json to compare them."
        )
    return remarks


def _compiled(row: Row) -> str:
    tried = ", ".join(f"{name} {ms:.2f} ms" for name, ms in row.notes["tried"].items())
    return f"- {row.name}: {row.notes['setting']} was the fastest ({tried}); compiled in {row.notes['compile_s']:.0f} s"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
