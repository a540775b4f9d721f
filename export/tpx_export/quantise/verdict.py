"""Whether int8 was worth it."""

from tpx_export.quantise.report import Report, ScoreReport, fastest
from tpx_export.summary import Summary
from tpx_runtime.errors import TpxError

MOST_LOST = 0.01  # of the score, in parts of 1
SMALL = 0.5  # of fp32's bytes: fp16 has that for less error


class Refused(TpxError):
    """A bundle in int8 that loses too much or gains nothing. `summary` is what the export would have returned."""

    exit_code = 7

    def __init__(self, line: str, summary: Summary) -> None:
        super().__init__(line)
        self.summary = summary


def verdict(report: Report) -> str | None:
    """Why the bundle is not worth having, in one line; None if it is."""
    faults = []
    score = report.score
    if isinstance(score, ScoreReport) and score.change.mean < -MOST_LOST:
        faults.append(
            f"{100 * score.change.mean:+.1f} points of {score.name} on {score.int8_engine} "
            f"(95% interval {score.change.interval or 'not known, too few pictures'})"
        )
    wanted = f"at most {100 * MOST_LOST:.0f} point of score lost"
    if report.precision == "int8":
        wanted += " and the best engine faster than with fp32"
        fp32, int8 = fastest(report.speeds)
        if int8.int8_ms >= fp32.fp32_ms:
            faults.append(
                f"{int8.int8_ms:.2f} ms a call on {int8.engine}, where fp32 takes {fp32.fp32_ms:.2f} ms on {fp32.engine}"
            )
    else:
        wanted += f" and less than {SMALL:.0%} of fp32's bytes"
        before, after = report.bytes
        if after >= SMALL * before:
            faults.append(f"{after / before:.0%} of fp32's bytes")
    if not faults:
        return None
    return f"expected of {report.precision} {wanted}, found {' and '.join(faults)}"
