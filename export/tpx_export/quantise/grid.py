"""The grids of int8 and int4: zero point 0, as TensorRT for RTX requires (docs/engines.md).

A weight in int8 has one step size per output channel, and no value is clipped. In int4 it has one for each group of values
of an output channel; only a value at the far end of a group's range is clipped, by a step at most. An activation in int8 has
one step size per tensor, which is chosen from a `MagnitudeHistogram`, and values beyond 127 steps are clipped.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

QMAX = 127
_INT4_MIN, _INT4_MAX = -8, 7
# OpenVINO multiplies fast only by weights whose groups have as many values as those that it rounds activations in, 128.
_GROUPS = (128, 64, 32, 16)
BINS = 2048
_CANDIDATES = 128  # ranges that `mse` tries, evenly spaced from 1/128 of the largest value to all of it
_PERCENTILE = 99.99

Floats = npt.NDArray[np.float64]


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] -> int8 [in, out], the right operand of a matrix product, and its step sizes, float32 [out]."""
    weight = weight.float()
    step = weight.abs().amax(dim=1) / QMAX
    step = torch.where(step > 0, step, torch.ones_like(step))  # a channel of zeros
    values = (weight / step.unsqueeze(1)).round().clamp(-QMAX, QMAX).to(torch.int8)
    return values.t().contiguous(), step


def group_size(width: int) -> int | None:
    """How many of the `width` values of an output channel share a step size in int4; None if no group divides them."""
    return next((group for group in _GROUPS if width % group == 0), None)


def quantise_weight_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Weight [out, in] -> values in -8..7, int8 [in, out], and their step sizes, float32 [in / group, out].

    Steps are positive or negative, so that the value of a group that is largest in magnitude is always at -8.
    """
    groups = weight.float().t().unflatten(0, (-1, group))  # [in / group, group, out]
    steps = int4_steps(groups, dim=1)
    values = round_to_int4(groups, steps.unsqueeze(1))
    return values.flatten(0, 1).to(torch.int8).contiguous(), steps


def int4_steps(groups: Tensor, dim: int) -> Tensor:
    """The step sizes of groups of float values along `dim`, which the result does not have."""
    largest = groups.gather(dim, groups.abs().argmax(dim, keepdim=True)).squeeze(dim)
    return torch.where(largest != 0, largest / _INT4_MIN, torch.ones_like(largest))  # 1 for a group of zeros


def round_to_int4(values: Tensor, steps: Tensor) -> Tensor:
    """`values` as multiples of `steps` in -8..7, in the type of `values`."""
    return (values / steps).round().clamp(_INT4_MIN, _INT4_MAX)


def dequantise_weight(values: Tensor, steps: Tensor) -> Tensor:
    """The weight [in, out] of `quantise_weight` (steps [out]) or `quantise_weight_int4` (steps [groups, out]).

    It has the type of `steps`.
    """
    groups = values.unflatten(0, (1 if steps.dim() == 1 else len(steps), -1))
    return (groups * steps.reshape(len(groups), 1, -1)).flatten(0, 1)


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
