"""Rounding weights so that a layer's outputs change little, rather than the weights (GPTQ, 2210.17323).

    weight [out, in], X^T X of calibration ─▶ the inputs' values one after another: round, and let those that follow make up
                                              for the error as far as their inputs are correlated with this one's

X are the layer's inputs over whole sampling trajectories (calibration.py). Without any correlation it is plain rounding.
"""

import torch
from torch import Tensor

from tpx_export.quantise.weight_grid import WeightGrid

# Correlations are used within so many inputs: all of them up to this width, and else X^T X would take gigabytes.
_BLOCK = 2048
# Added to the diagonal of X^T X, relative to its mean. Few timesteps and prompts do not show all correlations.
_DAMPING = 0.1
_LAZY = 32  # values after which those that follow are updated at once; a divisor or a multiple of every group


class Gram:
    """X^T X over all added inputs X of a layer, in blocks of `_BLOCK` along the diagonal."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add inputs [..., in]. Raises ValueError if any is not finite."""
        parts = x.detach().float().flatten(0, -2).split(_BLOCK, dim=1)
        if not self.blocks:
            self.blocks = [part.new_zeros(part.shape[1], part.shape[1]) for part in parts]
        for block, part in zip(self.blocks, parts, strict=True):
            block.addmm_(part.t(), part)
            if not block.diagonal().isfinite().all():
                raise ValueError("expected finite activations, got NaN or infinity")


def quantise_with_gram(weight: Tensor, grid: WeightGrid, gram: Gram) -> tuple[Tensor, Tensor]:
    """As `quantise_weight`: weight [out, in] -> int8 [in, out], and step sizes [out] or [in / group, out]."""
    columns = weight.float().t().clone(memory_format=torch.contiguous_format)
    channel_steps = grid.steps(columns, dim=0) if grid.group is None else None
    group_steps = [
        steps
        for rows, block in zip(columns.split(_BLOCK), gram.blocks, strict=True)
        for steps in _round_block(rows, _factor(block), grid, channel_steps)
    ]
    steps = torch.stack(group_steps) if channel_steps is None else channel_steps
    return columns.to(torch.int8).contiguous(), steps


def _factor(block: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of X^T X: row i says how values after i make up for an error in i."""
    block = block.double()
    damping = _DAMPING * block.diagonal().mean()
    damped = block + (damping if damping > 0 else 1) * torch.eye(len(block))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _round_block(
    rows: Tensor, factor: Tensor, grid: WeightGrid, channel_steps: Tensor | None
) -> list[Tensor]:
    """Round `rows` [in, out] in place, and return the steps [out] of each group: `channel_steps`, or its own if None."""
    group, all_steps = grid.group or len(rows), []
    for first in range(0, len(rows), group):
        steps = channel_steps
        if steps is None:
            steps = grid.steps(rows[first : first + group], dim=0)
        all_steps.append(steps)
        for start in range(first, first + group, min(group, _LAZY)):
            end = min(start + _LAZY, first + group)
            errors = torch.empty_like(rows[start:end])
            for i in range(start, end):
                rounded = grid.round(rows[i], steps)
                errors[i - start] = (rows[i] - rounded * steps) / factor[i, i]
                rows[i + 1 : end] -= factor[i, i + 1 : end, None] * errors[i - start]
                rows[i] = rounded
            rows[end:] -= factor[start:end, end:].t() @ errors
    return all_steps
