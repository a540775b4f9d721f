"""What int8 costs and gains, as numbers and as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tpx_runtime.evaluation.statistics import Estimate


@dataclass(frozen=True)
class DepthReport:
    """int8 against fp32 at one depth, in one engine: `calls` transformer calls on the same inputs, along trajectories of
    fp32, then the pictures of both.

    Errors are max|a - b| / max|b| of a call's prediction. `agreement` is the share of equal routes, None without thinking
    blocks. PSNR in dB is infinite for equal pictures.
    """

    engine: str
    depth: int
    calls: int
    error_median: float
    error_worst: float
    agreement: float | None
    pictures: int
    psnr_median_db: float
    psnr_worst_db: float


@dataclass(frozen=True)
class SpeedReport:
    """Median milliseconds of a transformer call of `rows` rows on one engine, in interleaved rounds."""

    engine: str
    depth: int
    rows: int
    fp32_ms: float
    int8_ms: float


def fastest(speeds: Sequence[SpeedReport]) -> tuple[SpeedReport, SpeedReport]:
    """The reports of the engine that is fastest with fp32, and of the one that is fastest with int8."""
    return min(speeds, key=lambda one: one.fp32_ms), min(speeds, key=lambda one: one.int8_ms)


@dataclass(frozen=True)
class ScoreReport:
    """Scores in 0..1, each bundle's on its fastest engine; `change` is int8 minus fp32, paired over pictures."""

    name: str
    pictures: int
    fp32_engine: str
    int8_engine: str
    fp32: float
    int8: float
    change: Estimate


@dataclass(frozen=True)
class NotScored:
    """Why there is no score."""

    why: str


@dataclass(frozen=True)
class Report:
    """int8 against fp32. `sizes` are the bytes of folders, (fp32, int8).

    `layers` counts what was quantised, `trajectories` what calibrated it (0 for weights alone), by the rule `clipping`.
    """

    precision: str
    layers: int
    trajectories: int
    clipping: str
    depths: tuple[DepthReport, ...]
    speeds: tuple[SpeedReport, ...]
    score: ScoreReport | NotScored
    sizes: dict[str, tuple[int, int]]

    @property
    def bytes(self) -> tuple[int, int]:
        """The total of `sizes`, (fp32, int8)."""
        changed = list(self.sizes.values())
        return sum(size[0] for size in changed), sum(size[1] for size in changed)


def as_text(report: Report) -> str:
    """Several short tables."""
    calibrated = (
        f", calibrated over {report.trajectories} trajectories ({report.clipping})"
        if report.trajectories
        else ""
    )
    lines = [f"{report.precision} against fp32: {report.layers} layers{calibrated}", ""]
    lines.append(f"{'depth':<8}{'error':>9}{'worst':>9}{'same route':>12}{'PSNR, dB':>10}{'worst':>8}")
    for one in report.depths:
        route = "" if one.agreement is None else f"{one.agreement:.2%}"
        psnr, worst = _decibels(one.psnr_median_db), _decibels(one.psnr_worst_db)
        lines.append(
            f"{one.depth:<8}{one.error_median:>9.1e}{one.error_worst:>9.1e}{route:>12}{psnr:>10}{worst:>8}"
        )
    if report.depths:
        first = report.depths[0]
        lines.append(f"({first.calls} calls and {first.pictures} pictures a depth, both in {first.engine})")
    lines += ["", f"{'engine':<20}{'fp32, ms':>10}{'int8, ms':>10}{'int8/fp32':>11}"]
    for speed in report.speeds:
        ratio = speed.int8_ms / speed.fp32_ms
        lines.append(f"{speed.engine:<20}{speed.fp32_ms:>10.2f}{speed.int8_ms:>10.2f}{ratio:>11.2f}")
    if report.speeds:
        lines.append(f"(a call of {report.speeds[0].rows} rows at depth {report.speeds[0].depth}; medians)")
    lines.append("")
    for name, (before, after) in report.sizes.items():
        lines.append(f"{name:<20}{before / 1e6:>8.2f} MB{after / 1e6:>8.2f} MB{after / before:>11.2f}")
    lines += ["", _score(report.score)]
    return "\n".join(lines)


def _score(score: ScoreReport | NotScored) -> str:
    if isinstance(score, NotScored):
        return f"score: not measured, {score.why}"
    return (
        f"{score.name}, {score.pictures} pictures: {100 * score.fp32:.1f} in fp32 on {score.fp32_engine}, "
        f"{100 * score.int8:.1f} in int8 on {score.int8_engine}, {100 * score.change.mean:+.1f} points "
        f"(95% interval {score.change.interval or 'not known, too few pictures'})"
    )


def _decibels(value: float) -> str:
    return "same" if math.isinf(value) else f"{value:.1f}"
