"""From samples to the figures of one configuration. Everything here is a function of the record's JSON alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from .record import COLD, draw_unit

Facts = dict[str, Any]
SAME_DB = 35.0  # from here on two pictures count as equal


@dataclass(frozen=True)
class Row:
    """Medians of one configuration's samples; what was not measured is None.

    `spread` is the interquartile range over the median of `image_s`. `speed_up` is the median, over the rounds of one run
    that measured both, of the reference's seconds an image over this one's: both of one round met the same machine. It is
    None where no run measured both.
    `same` says that every pixel is the reference's. `peak_share` is of the machine's measured matrix products in the same
    precision: None for a GPU, a precision without a peak, or a graph that could not be counted.
    """

    name: str
    depth: int
    cold_s: float | None
    step_ms: float | None
    image_s: float | None
    spread: float | None
    speed_up: float | None
    images_per_s: dict[int, float]
    peak_mb: float | None
    psnr_db: float | None
    same: bool
    peak_share: float | None
    problem: str | None
    notes: Facts

    @property
    def other(self) -> bool:
        """It drew another picture than the reference: its figures are of other work."""
        return self.psnr_db is not None and self.psnr_db < SAME_DB


def batches(facts: Facts) -> list[int]:
    """Every batch size that somebody was measured at."""
    units = {unit for entry in facts["configurations"].values() for unit in entry["samples"]}
    return sorted(int(unit.split()[1]) for unit in units if unit != COLD)


def rows(facts: Facts) -> list[Row]:
    """Of every configuration, by depth, in the order in which they were asked for."""
    entries = sorted(facts["configurations"].values(), key=lambda entry: entry["depth"])
    return [_row(entry, facts) for entry in entries]


def _row(entry: Facts, facts: Facts) -> Row:
    one, cold = entry["samples"].get(draw_unit(1), []), entry["samples"].get(COLD, [])
    image_s, step_s = _median(one, "seconds"), _median(one, "step_seconds")
    psnr = entry["psnr_db"]
    return Row(
        name=entry["name"],
        depth=entry["depth"],
        cold_s=_median(cold, "seconds"),
        step_ms=None if step_s is None else 1e3 * step_s,
        image_s=image_s,
        spread=_spread([sample["seconds"] for sample in one]),
        speed_up=_speed_up(one, _reference(facts, entry["depth"])),
        images_per_s={
            images: images / seconds
            for images in batches(facts)
            if (seconds := _median(entry["samples"].get(draw_unit(images), []), "seconds"))
        },
        peak_mb=entry["peak_bytes"] / 1e6 or None,
        psnr_db=None if psnr == "same" else psnr,
        same=psnr == "same",
        peak_share=_share(entry, facts, step_s),
        problem=entry["problem"],
        notes=entry["notes"],
    )


def peak_flops(facts: Facts, precision: str) -> float | None:
    """The most that was reached in any round."""
    return max(facts["peaks"].get(precision, {}).get("flops", []), default=0.0) or None


def _share(entry: Facts, facts: Facts, step_s: float | None) -> float | None:
    flops, peak = facts["flops"].get(str(entry["depth"])), peak_flops(facts, entry["precision"])
    if entry["device"] != "cpu" or not isinstance(flops, int) or not peak or not step_s:
        return None
    return flops / step_s / peak


def _reference(facts: Facts, depth: int) -> list[Facts]:
    """Its samples at batch 1, none where it was not measured."""
    drawn_by = facts["references"].get(str(depth), {}).get("by")
    entry = facts["configurations"].get(f"{drawn_by} depth {depth}", {"samples": {}})
    samples: list[Facts] = entry["samples"].get(draw_unit(1), [])
    return samples


def _speed_up(own: Sequence[Facts], reference: Sequence[Facts]) -> float | None:
    theirs = {_moment(sample): sample["seconds"] for sample in reference}
    ratios = [theirs[_moment(sample)] / sample["seconds"] for sample in own if _moment(sample) in theirs]
    return median(ratios) if ratios else None


def _moment(sample: Facts) -> tuple[int, int]:
    """The run and the round in which it was taken."""
    return sample["run"], sample["round"]


def _median(samples: Sequence[Facts], name: str) -> float | None:
    return median(sample[name] for sample in samples) if samples else None


def _spread(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / middle
