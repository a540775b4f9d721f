"""The int8 grid: symmetric, zero point 0, as TensorRT for RTX wants it (docs/engines.md).

A weight has one step size per output channel, and none of its values are clipped. An activation has one step size for the
whole tensor, which `Magnitudes` chooses, and values beyond 127 steps are clipped.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TOP = 127
BINS = 2048
_CANDIDATES = 128  # of ranges that `mse` tries, evenly from a 128th of the largest value to all of it
_PERCENT = 99.99

Floats = npt.NDArray[np.float64]


def weight_grid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] -> int8 [in, out], ready to be multiplied from the right, and its step sizes, float32 [out]."""
    weight = weight.float()
    step = weight.abs().amax(dim=1) / TOP
    step = torch.where(step > 0, step, torch.ones_like(step))  # a channel of zeros
    values = (weight / step.unsqueeze(1)).round().clamp(-TOP, TOP).to(torch.int8)
    return values.t().contiguous(), step


class Magnitudes:
    """A histogram of |x| over everything that was added: BINS equal bins from 0 to `reach`.

    If a larger value comes, `reach` doubles and bins are merged in pairs, so that no activation is kept or computed twice.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.reach = 0.0
        self.counts: Floats = np.zeros(BINS)

    def add(self, x: Tensor) -> None:
        """Add values of any shape. Raises ValueError if any is not finite."""
        size = x.detach().abs().float()
        largest = float(size.max())
        if not np.isfinite(largest):
            raise ValueError("expected finite activations, got NaN or infinity")
        self.largest = max(self.largest, largest)
        if not self.reach and largest:
            self.reach = largest
        while largest > self.reach:
            self.reach *= 2
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2)])
        if self.reach:
            self.counts += torch.histc(size, BINS, 0.0, self.reach).double().numpy()

    def step(self, rule: str) -> float:
        """The step size by a rule of CLIPPING, a 127th of its range; 1 if all values were zero."""
        return (CLIPPING[rule](self) / TOP) or 1.0


def _largest(seen: Magnitudes) -> float:
    return seen.largest


def _percentile(seen: Magnitudes) -> float:
    total = seen.counts.cumsum()
    if not total[-1]:
        return 0.0
    place = int(np.searchsorted(total, _PERCENT / 100 * total[-1]))
    return min(seen.largest, (place + 1) * seen.reach / BINS)


def _least_squares(seen: Magnitudes) -> float:
    """The range of least mean squared error: a shorter one rounds finer and clips more."""
    middles = (np.arange(BINS) + 0.5) * seen.reach / BINS
    ranges = seen.largest * np.arange(1, _CANDIDATES + 1) / _CANDIDATES
    errors = [_error(middles, seen.counts, end) for end in ranges if end > 0]
    return float(ranges[int(np.argmin(errors))]) if errors else 0.0


def _error(values: Floats, counts: Floats, end: float) -> float:
    step = end / TOP
    rounded = np.minimum(np.round(values / step), TOP) * step
    return float(counts @ (values - rounded) ** 2)


CLIPPING: dict[str, Callable[[Magnitudes], float]] = {
    "max": _largest,
    "percentile": _percentile,
    "mse": _least_squares,
}
