"""Summarises the samples of each configuration, using only the JSON of the record."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from .configurations import GPU_REFERENCE
from .record import COLD, batch_unit

Json = dict[str, Any]
SAME_IMAGE_DB = 35.0  # from this PSNR on, two images count as equal


@dataclass(frozen=True)
class Row:
    """Medians of one configuration's samples; None for what was not measured.

    `spread` is the interquartile range of `image_s` divided by its median. `speed_up` is the median, over the rounds that
    measured both, of the reference's seconds per image divided by this configuration's: within a round both ran under the
    same conditions. It is None if no round measured both. `gpu_mb`: held on GPUs after a batch of each size.
    `same`: every pixel equals the reference's. `peak_share` is relative to the measured peak of matrix products in the same
    precision: None for a GPU, a precision without a peak, a graph whose operations could not be counted, or cached steps.
    """

    name: str
    depth: int
    device: str  # "cpu" or "gpu"
    cold_s: float | None
    step_ms: float | None
    image_s: float | None
    spread: float | None
    speed_up: float | None
    images_per_s: dict[int, float]
    peak_mb: float | None
    gpu_mb: float | None
    psnr_db: float | None
    same: bool
    peak_share: float | None
    problem: str | None
    notes: Json

    @property
    def differs(self) -> bool:
        """Whether the image differs from the reference's, so that the figures are not comparable."""
        return self.psnr_db is not None and self.psnr_db < SAME_IMAGE_DB


def batches(data: Json) -> list[int]:
    """All batch sizes that any configuration was measured at."""
    units = {unit for entry in data["configurations"].values() for unit in entry["samples"]}
    return sorted(int(unit.split()[1]) for unit in units if unit != COLD)


def rows(data: Json) -> list[Row]:
    """One row per configuration, by depth and then in the requested order."""
    entries = sorted(data["configurations"].values(), key=lambda entry: entry["depth"])
    return [_row(entry, data) for entry in entries]


def _row(entry: Json, data: Json) -> Row:
    one, cold = entry["samples"].get(batch_unit(1), []), entry["samples"].get(COLD, [])
    image_s, step_s = _median(one, "seconds"), _median(one, "step_seconds")
    psnr = entry["psnr_db"]
    return Row(
        name=entry["name"],
        depth=entry["depth"],
        device=entry["device"],
        cold_s=_median(cold, "seconds"),
        step_ms=None if step_s is None else 1e3 * step_s,
        image_s=image_s,
        spread=_spread([sample["seconds"] for sample in one]),
        speed_up=_speed_up(
            one, _samples(data, reference(data, entry["depth"], entry["device"]), entry["depth"])
        ),
        images_per_s={
            images: images / seconds
            for images in batches(data)
            if (seconds := _median(entry["samples"].get(batch_unit(images), []), "seconds"))
        },
        peak_mb=entry["peak_bytes"] / 1e6 or None,
        gpu_mb=entry["gpu_bytes"] / 1e6 or None,
        psnr_db=None if psnr == "same" else psnr,
        same=psnr == "same",
        peak_share=_peak_share(entry, data, step_s),
        problem=entry["problem"],
        notes=entry["notes"],
    )


def peak_flops(data: Json, precision: str) -> float | None:
    """The maximum over all rounds."""
    return max(data["peaks"].get(precision, {}).get("flops", []), default=0.0) or None


def _peak_share(entry: Json, data: Json, step_s: float | None) -> float | None:
    flops, peak = data["flops"].get(str(entry["depth"])), peak_flops(data, entry["precision"])
    counted = entry["device"] == "cpu" and entry["cache_interval"] == 1 and isinstance(flops, int)
    if not counted or not peak or not step_s:
        return None
    return flops / step_s / peak


def reference(data: Json, depth: int, device: str) -> str | None:
    """Name of the configuration that speed-ups on `device` compare with: PyTorch there, else the reference of the images."""
    if device == "gpu" and _samples(data, GPU_REFERENCE, depth):
        return GPU_REFERENCE
    drawn_by: str | None = data["references"].get(str(depth), {}).get("by")
    return drawn_by


def _samples(data: Json, name: str | None, depth: int) -> list[Json]:
    """The samples of a configuration at batch 1; empty if it was not measured."""
    entry = data["configurations"].get(f"{name} depth {depth}", {"samples": {}})
    samples: list[Json] = entry["samples"].get(batch_unit(1), [])
    return samples


def _speed_up(samples: Sequence[Json], reference: Sequence[Json]) -> float | None:
    reference_seconds = {_run_and_round(sample): sample["seconds"] for sample in reference}
    ratios = [
        reference_seconds[_run_and_round(sample)] / sample["seconds"]
        for sample in samples
        if _run_and_round(sample) in reference_seconds
    ]
    return median(ratios) if ratios else None


def _run_and_round(sample: Json) -> tuple[int, int]:
    """The run and round in which a sample was taken."""
    return sample["run"], sample["round"]


def _median(samples: Sequence[Json], name: str) -> float | None:
    return median(sample[name] for sample in samples) if samples else None


def _spread(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / middle
