"""The grid of int8 activations: zero point 0, as TensorRT for RTX requires (docs/engines.md).

There is one step size per tensor, which is chosen from a `MagnitudeHistogram`, and values beyond 127 steps are clipped.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

QMAX = 127
BINS = 2048
_CANDIDATES = 128  # ranges that `mse` tries, evenly spaced from 1/128 of the largest value to all of it
_PERCENTILE = 99.99

Floats = npt.NDArray[np.float64]


class MagnitudeHistogram:
    """A histogram of |x| over all added values: BINS equal bins from 0 to `range_max`.

    For a larger value, `range_max` doubles and bins are merged in pairs, so no activation must be stored or computed again.
    """

    def __init__(self) -> None:
        self.max = 0.0
        self.range_max = 0.0
        self.counts: Floats = np.zeros(BINS)

    def add(self, x: Tensor) -> None:
        """Add values of any shape. Raises ValueError if any is not finite."""
        magnitudes = x.detach().abs().float()
        x_max = float(magnitudes.max())
        if not np.isfinite(x_max):
            raise ValueError("expected finite activations, got NaN or infinity")
        self.max = max(self.max, x_max)
        if not self.range_max and x_max:
            self.range_max = x_max
        while x_max > self.range_max:
            self.range_max *= 2
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2)])
        if self.range_max:
            self.counts += torch.histc(magnitudes, BINS, 0.0, self.range_max).double().numpy()

    def step_size(self, rule: str = "mse") -> float:
        """The step size: 1/127 of the range chosen by a rule of CLIPPING; 1 if all values are zero."""
        return (CLIPPING[rule](self) / QMAX) or 1.0


def _max(histogram: MagnitudeHistogram) -> float:
    return histogram.max


def _percentile(histogram: MagnitudeHistogram) -> float:
    cumulative = histogram.counts.cumsum()
    if not cumulative[-1]:
        return 0.0
    index = int(np.searchsorted(cumulative, _PERCENTILE / 100 * cumulative[-1]))
    return min(histogram.max, (index + 1) * histogram.range_max / BINS)


def _min_squared_error(histogram: MagnitudeHistogram) -> float:
    """The range with the smallest squared error: a smaller range rounds less and clips more."""
    centres = (np.arange(BINS) + 0.5) * histogram.range_max / BINS
    ranges = histogram.max * np.arange(1, _CANDIDATES + 1) / _CANDIDATES
    errors = [_squared_error(centres, histogram.counts, limit) for limit in ranges if limit > 0]
    return float(ranges[int(np.argmin(errors))]) if errors else 0.0


def _squared_error(values: Floats, counts: Floats, limit: float) -> float:
    step = limit / QMAX
    rounded = np.minimum(np.round(values / step), QMAX) * step
    return float(counts @ (values - rounded) ** 2)


CLIPPING: dict[str, Callable[[MagnitudeHistogram], float]] = {
    "max": _max,
    "percentile": _percentile,
    "mse": _min_squared_error,
}
