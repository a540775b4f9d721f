"""What int8 costs and gains, as numbers and as lines that a person reads."""

import math
from dataclasses import dataclass

from tpx_runtime.evaluation.statistics import Estimate


@dataclass(frozen=True)
class DepthReport:
    """One depth against fp32 on the same inputs, along `calls` of fp32's own trajectories, and the pictures of both.

    Errors are max|a - b| / max|b| of a call's prediction. `agreement` is the share of equal routes, None without thinking
    blocks. PSNR in dB is infinite for equal pictures.
    """

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


@dataclass(frozen=True)
class ScoreReport:
    """ShapesEval in parts of 1: `change` is int8 minus fp32, paired over prompts, with its 95% interval."""

    prompts: int
    fp32: float
    int8: float
    change: Estimate


@dataclass(frozen=True)
class Report:
    """`sizes` are bytes of folders, (fp32, int8); `score` is None where ShapesEval does not fit the model.

    `layers` were quantised, after `trajectories` of calibration (0 for weights alone), cut by the rule `clipping`.
    """

    precision: str
    layers: int
    trajectories: int
    clipping: str
    depths: tuple[DepthReport, ...]
    speeds: tuple[SpeedReport, ...]
    score: ScoreReport | None
    sizes: dict[str, tuple[int, int]]

    @property
    def bytes(self) -> tuple[int, int]:
        """Of all folders whose size changed, (fp32, int8)."""
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
        lines.append(f"({first.calls} calls and {first.pictures} pictures a depth)")
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


def _score(score: ScoreReport | None) -> str:
    if score is None:
        return (
            "ShapesEval: not measured, it does not fit this model; look at pictures, or run tpx-eval geneval"
        )
    change = score.change
    return (
        f"ShapesEval, {score.prompts} prompts: {100 * score.fp32:.1f} in fp32, {100 * score.int8:.1f} in int8, "
        f"{100 * change.mean:+.1f} points (95% interval {100 * change.low:+.1f} to {100 * change.high:+.1f})"
    )


def _decibels(value: float) -> str:
    return "same" if math.isinf(value) else f"{value:.1f}"
