"""The grids of weights in int8 and int4: zero point 0, as TensorRT for RTX requires (docs/engines.md).

    int8, with int8 activations     -64..64, one step size per output channel
    int8, with float activations  -127..127, the same
    int4                             -8..7, one for each group of values of an output channel

In int8 the value of a channel that is largest in magnitude is at an end of the grid, so none is clipped. In int4 that of a
group is at -8, so that steps are positive or negative, and only a value at the far end is clipped, by a step at most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightGrid:
    """Multiples `lowest` to `highest` of a step, which `group` values of an output channel share; None: all of them."""

    lowest: int
    highest: int
    group: int | None = None

    def steps(self, values: Tensor, dim: int) -> Tensor:
        """The step sizes of float values that share one along `dim`, which the result does not have."""
        largest = values.gather(dim, values.abs().argmax(dim, keepdim=True)).squeeze(dim)
        if self.lowest == -self.highest:
            largest = -largest.abs()
        return torch.where(largest != 0, largest / self.lowest, torch.ones_like(largest))  # 1 if all are zero

    def round(self, values: Tensor, steps: Tensor) -> Tensor:
        """`values` as multiples of `steps`, in the type of `values`."""
        return (values / steps).round().clamp(self.lowest, self.highest)


INT8 = WeightGrid(-127, 127)
# On x86 CPUs without VNNI, engines shift int8 activations to uint8 and add two products in int16, which saturates at 32,767:
# with weights up to 64 no sum exceeds 2 x 255 x 64, with 127 it may (docs/quantisation.md).
INT8_BY_INT8 = WeightGrid(-64, 64)
# OpenVINO multiplies fast only by weights whose groups have as many values as those that it rounds activations in, 128.
_INT4_GROUPS = (128, 64, 32, 16)


def int4(group: int) -> WeightGrid:
    """The grid of int4 with a step for each `group` values of an output channel."""
    return WeightGrid(-8, 7, group)


def int4_grid(width: int) -> WeightGrid | None:
    """The grid of a layer of `width` inputs in int4; None if no group divides them."""
    return next((int4(group) for group in _INT4_GROUPS if width % group == 0), None)


def quantise_weight(weight: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor]:
    """Weight [out, in] rounded to the grid -> int8 [in, out], the right operand of a product, and float32 step sizes.

    The step sizes are [out], or [in / group, out] for a grid with groups.
    """
    columns = weight.float().t()
    if grid.group is None:
        steps = grid.steps(columns, dim=0)
        values = grid.round(columns, steps)
    else:
        groups = columns.unflatten(0, (-1, grid.group))
        steps = grid.steps(groups, dim=1)
        values = grid.round(groups, steps.unsqueeze(1)).flatten(0, 1)
    return values.to(torch.int8).contiguous(), steps


def dequantise_weight(values: Tensor, steps: Tensor) -> Tensor:
    """The weight [in, out] of `quantise_weight`, in the type of `steps`."""
    groups = values.unflatten(0, (1 if steps.dim() == 1 else len(steps), -1))
    return (groups * steps.reshape(len(groups), 1, -1)).flatten(0, 1)
