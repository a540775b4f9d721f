"""Everything in a transformer that depends only on the timestep and the prompt or class: one row per sample.

    row = [ shift, scale, gate, ... of every adaLN, D each | each expert gate's projection of the condition, 64 each ]

It does not depend on the latents, so it is computed once for all steps. Both groups are in the order of the model's modules.
Shapes: B batch, D width, K row length.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATE_WIDTH = 64
_MAX_JOINED = 32  # tensors in one concatenation; ONNX Runtime captures no longer one in a CUDA graph


class ConditionProjection(nn.Linear):
    """SiLU of the condition, float32 [B, D] -> its slice of a row, float32 [B, parts * part_width].

    The product is computed in the precision of the weights.
    """

    def __init__(self, width: int, parts: int, part_width: int, bias: bool = True) -> None:
        super().__init__(width, parts * part_width, bias=bias)
        self.parts = parts

    def forward(self, act: Tensor) -> Tensor:
        return F.linear(act.to(self.weight.dtype), self.weight, self.bias).float()


class Modulation(ConditionProjection):
    """The shifts, scales and gates of an adaLN, each as wide as the tokens."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(width, parts, width)


def compute_conditions(model: nn.Module, y: Tensor) -> Tensor:
    """The rows float32 [B, K] of the condition y [B, D], the sum of the time and the text or class embedding."""
    act = F.silu(y)
    layers = [layer for layer in model.modules() if isinstance(layer, ConditionProjection)]
    layers.sort(key=lambda layer: not isinstance(layer, Modulation))  # stable: modules keep their order
    parts = [layer(act) for layer in layers]
    while len(parts) > 1:
        groups = [parts[start : start + _MAX_JOINED] for start in range(0, len(parts), _MAX_JOINED)]
        parts = [torch.cat(group, dim=-1) for group in groups]
    return parts[0]


def split_conditions(
    rows: Tensor, num_modulations: int, width: int, dtype: torch.dtype
) -> tuple[Iterator[Tensor], ...]:
    """Iterators over the parts of the rows [B, K], in the order of the model's modules.

    The first is over all shifts, scales and gates of adaLN, each `dtype` [B, 1, D], the second over the expert gates'
    conditions, each float32 [B, 1, 64].
    """
    rows, end = rows.unsqueeze(1), num_modulations * width
    modulations, conditions = rows[..., :end], rows[..., end:]
    gate_conditions = conditions.split(GATE_WIDTH, dim=-1) if conditions.shape[-1] else ()
    return iter(modulations.to(dtype).split(width, dim=-1)), iter(gate_conditions)
