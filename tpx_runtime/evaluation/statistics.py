"""Scores and their 95% intervals: the bootstrap over prompts, unpaired and paired."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
# Per row. The bootstrap interval of fewer prompts is too narrow, and that of one prompt has no width.
MIN_PROMPTS = 20


@dataclass(frozen=True)
class Estimate:
    """A mean and the bounds of its 95% interval; `smallest_row` is the number of prompts in the smallest row."""

    mean: float
    low: float
    high: float
    smallest_row: int

    @property
    def has_interval(self) -> bool:
        """Whether every row has MIN_PROMPTS prompts or more."""
        return self.smallest_row >= MIN_PROMPTS

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The interval, or twice None without one."""
        return (self.low, self.high) if self.has_interval else (None, None)


def interval_text(
    low: float | None, high: float | None, sign: str = "", unknown: str = "too few prompts"
) -> str:
    """An interval in percentage points, with both signs if `sign` is "+"; `unknown` for bounds of None."""
    if low is None or high is None:
        return unknown
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def bootstrap(rows: Sequence[npt.NDArray[np.float64]]) -> Estimate:
    """The unweighted mean of the means of rows [prompts], with its percentile interval.

    Prompts are resampled with replacement within each row (Efron 1979), with a fixed seed. Given the differences between
    two runs on the same prompts, this is the paired bootstrap.
    """
    rng = np.random.default_rng(0)
    resampled = [row[rng.integers(len(row), size=(RESAMPLES, len(row)))].mean(axis=1) for row in rows]
    low, high = np.percentile(np.mean(resampled, axis=0), [2.5, 97.5])
    mean = float(np.mean([row.mean() for row in rows]))
    return Estimate(mean, float(low), float(high), min(map(len, rows)))
