"""Rounding weights to int4 so that a layer's outputs change little, rather than the weights (GPTQ, 2210.17323).

    weight [out, in], X^T X of calibration ─▶ the inputs' values one after another: round, and let those that follow make up
                                              for the error as far as their inputs are correlated with this one's

X are the layer's inputs over whole sampling trajectories (calibration.py). Without any correlation it is plain rounding.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tpx_export.quantise.grid import int4_steps, round_to_int4

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


def quantise_with_gram(weight: Tensor, group: int, gram: Gram) -> tuple[Tensor, Tensor]:
    """As `quantise_weight_int4`: weight [out, in] -> int8 [in, out] in -8..7, and steps [in / group, out]."""
    rounded = [
        part
        for rows, block in zip(weight.float().t().split(_BLOCK), gram.blocks, strict=True)
        for part in _round_block(rows.clone(), _factor(block), group)
    ]
    values, steps = zip(*rounded, strict=True)
    return torch.cat(values).to(torch.int8), torch.stack(steps)


def _factor(block: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of X^T X: row i says how values after i make up for an error in i."""
    block = block.double()
    damping = _DAMPING * block.diagonal().mean()
    damped = block + (damping if damping > 0 else 1) * torch.eye(len(block))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _round_block(rows: Tensor, factor: Tensor, group: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each group of `rows` [in, out], which are overwritten: its values [group, out] and steps [out]."""
    lazy = min(group, _LAZY)
    for first in range(0, len(rows), group):
        values = torch.empty(group, rows.shape[1])
        steps = int4_steps(rows[first : first + group], dim=0)
        for start in range(first, first + group, lazy):
            end = start + lazy
            errors = torch.empty(lazy, rows.shape[1])
            for i in range(start, end):
                rounded = round_to_int4(rows[i], steps)
                values[i - first] = rounded
                errors[i - start] = (rows[i] - rounded * steps) / factor[i, i]
                rows[i + 1 : end] -= factor[i, i + 1 : end, None] * errors[i - start]
            rows[end:] -= factor[start:end, end:].t() @ errors
        yield values, steps
