"""The decision whether a quantised bundle is kept."""

from tpx_export.quantise.report import Report, ScoreReport, fastest
from tpx_export.summary import Summary
from tpx_runtime.errors import TpxError
from tpx_runtime.evaluation.statistics import interval_text

MAX_SCORE_LOSS = 0.01  # as a fraction of 1
# Of fp32's bytes. fp16 has half of them and int8-weights at least a quarter, with smaller errors.
MAX_SIZE = {"int8-weights": 0.5, "int4-weights": 0.35}


class Refused(TpxError):
    """A quantised bundle that loses too much or gains nothing. `summary` is what the export would have returned."""

    exit_code = 7

    def __init__(self, message: str, summary: Summary) -> None:
        super().__init__(message)
        self.summary = summary


def rejection(report: Report) -> str | None:
    """One line that says why the bundle loses too much or gains nothing, or None."""
    faults = []
    score = report.score
    if isinstance(score, ScoreReport) and score.change.mean < -MAX_SCORE_LOSS:
        faults.append(
            f"{100 * score.change.mean:+.1f} points of {score.name} in {score.quantised_engine} "
            f"(95% interval {interval_text(*score.change.bounds, '+', 'not known, too few images')})"
        )
    expected = f"a loss of at most {100 * MAX_SCORE_LOSS:.0f} point of score"
    if report.precision == "int8":
        expected += " and a fastest engine that beats fp32's"
        fp32, fast = fastest(report.speeds)
        if fast.quantised_ms >= fp32.fp32_ms:
            found = f"{fast.quantised_ms:.2f} ms per call in {fast.engine}"
            faults.append(f"{found}, while fp32 takes {fp32.fp32_ms:.2f} ms in {fp32.engine}")
    else:
        largest = MAX_SIZE[report.precision]
        expected += f" and less than {largest:.0%} of fp32's bytes"
        fp32_bytes, quantised_bytes = report.bytes
        if quantised_bytes >= largest * fp32_bytes:
            faults.append(f"{quantised_bytes / fp32_bytes:.0%} of fp32's bytes")
    if not faults:
        return None
    return f"expected of {report.precision} {expected}, found {' and '.join(faults)}"
