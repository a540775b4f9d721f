"""Scores and their 95% intervals: the bootstrap over prompts, plain and paired."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
FEWEST = 20  # of a row's prompts: fewer are drawn anew too much alike, one always alike, and the interval is too narrow


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95% interval; the smallest row had `fewest` prompts."""

    mean: float
    low: float
    high: float
    fewest: int

    @property
    def interval(self) -> str | None:
        """In signed points of a hundred; None where prompts are too few for one."""
        return f"{100 * self.low:+.1f} to {100 * self.high:+.1f}" if self.fewest >= FEWEST else None


def bootstrap(rows: Sequence[npt.NDArray[np.float64]]) -> Estimate:
    """The unweighted mean of the rows' means, each row [prompts], with its percentile interval.

    Prompts are drawn anew with replacement within each row (Efron 1979), always with the same random numbers. Fed with
    differences of two runs on the same prompts, it is the paired bootstrap.
    """
    rng = np.random.default_rng(0)
    drawn = [row[rng.integers(len(row), size=(RESAMPLES, len(row)))].mean(axis=1) for row in rows]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    mean = float(np.mean([row.mean() for row in rows]))
    return Estimate(mean, float(low), float(high), min(map(len, rows)))
