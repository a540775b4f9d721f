"""The comparison of a quantised bundle with fp32, as data and as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tpx_runtime.evaluation.statistics import Estimate, interval_text


@dataclass(frozen=True)
class DepthReport:
    """A quantised bundle against fp32 at one depth in one engine.

    Errors are max|a - b| / max|b| of a call's prediction, over `calls` transformer calls with the same inputs along fp32's
    trajectories. `agreement` is the share of equal routes, None without thinking blocks. PSNR (dB) compares the images of
    both, and is infinite for equal images.
    """

    engine: str
    depth: int
    calls: int
    error_median: float
    error_worst: float
    agreement: float | None
    images: int
    psnr_median_db: float
    psnr_worst_db: float


@dataclass(frozen=True)
class SpeedReport:
    """Median milliseconds of a transformer call with `rows` rows in one engine, measured in interleaved rounds."""

    engine: str
    depth: int
    rows: int
    fp32_ms: float
    quantised_ms: float


def fastest(speeds: Sequence[SpeedReport]) -> tuple[SpeedReport, SpeedReport]:
    """The reports of the engine that is fastest with fp32 and of the engine that is fastest quantised."""
    return min(speeds, key=lambda speed: speed.fp32_ms), min(speeds, key=lambda speed: speed.quantised_ms)


@dataclass(frozen=True)
class ScoreReport:
    """Scores in 0..1, each bundle's in its fastest engine; `change` is quantised minus fp32, paired over images."""

    name: str
    images: int
    fp32_engine: str
    quantised_engine: str
    fp32: float
    quantised: float
    change: Estimate


@dataclass(frozen=True)
class NotScored:
    """The reason why there is no score."""

    reason: str


@dataclass(frozen=True)
class Report:
    """A quantised bundle against fp32. `sizes` are the bytes of folders, (fp32, quantised).

    `layers` is the number of quantised layers, `trajectories` that of calibration trajectories (0 if it needs none).
    """

    precision: str
    layers: int
    trajectories: int
    depths: tuple[DepthReport, ...]
    speeds: tuple[SpeedReport, ...]
    score: ScoreReport | NotScored
    sizes: dict[str, tuple[int, int]]

    @property
    def bytes(self) -> tuple[int, int]:
        """The total of `sizes`, (fp32, quantised)."""
        sizes = list(self.sizes.values())
        return sum(size[0] for size in sizes), sum(size[1] for size in sizes)


def as_text(report: Report) -> str:
    """The report as several short tables."""
    calibrated = f", calibrated over {report.trajectories} trajectories" if report.trajectories else ""
    lines = [f"{report.precision} against fp32: {report.layers} layers{calibrated}", ""]
    lines.append(f"{'depth':<8}{'error':>9}{'worst':>9}{'same route':>12}{'PSNR, dB':>10}{'worst':>8}")
    for depth in report.depths:
        route = "" if depth.agreement is None else f"{depth.agreement:.2%}"
        psnr, worst = _decibels(depth.psnr_median_db), _decibels(depth.psnr_worst_db)
        errors = f"{depth.error_median:>9.1e}{depth.error_worst:>9.1e}"
        lines.append(f"{depth.depth:<8}{errors}{route:>12}{psnr:>10}{worst:>8}")
    if report.depths:
        first = report.depths[0]
        lines.append(f"({first.calls} calls and {first.images} images per depth, all in {first.engine})")
    lines += ["", f"{'engine':<20}{'fp32, ms':>10}{report.precision + ', ms':>18}{'ratio':>8}"]
    for speed in report.speeds:
        ratio = speed.quantised_ms / speed.fp32_ms
        lines.append(f"{speed.engine:<20}{speed.fp32_ms:>10.2f}{speed.quantised_ms:>18.2f}{ratio:>8.2f}")
    if report.speeds:
        lines.append(
            f"(median of a call with {report.speeds[0].rows} rows at depth {report.speeds[0].depth})"
        )
    lines.append("")
    for name, (before, after) in report.sizes.items():
        lines.append(f"{name:<20}{before / 1e6:>8.2f} MB{after / 1e6:>8.2f} MB{after / before:>11.2f}")
    lines += ["", _score(report.score)]
    return "\n".join(lines)


def _score(score: ScoreReport | NotScored) -> str:
    if isinstance(score, NotScored):
        return f"score: not measured, {score.reason}"
    return (
        f"{score.name}, {score.images} images: {100 * score.fp32:.1f} in fp32 in {score.fp32_engine}, "
        f"{100 * score.quantised:.1f} quantised in {score.quantised_engine}, {100 * score.change.mean:+.1f} points "
        f"(95% interval {interval_text(*score.change.bounds, '+', 'not known, too few images')})"
    )


def _decibels(value: float) -> str:
    return "same" if math.isinf(value) else f"{value:.1f}"
