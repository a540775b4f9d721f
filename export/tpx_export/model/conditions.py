"""The part of a transformer that depends on time and condition alone: a row of numbers for each sample.

    row = [ shift, scale, gate, ... of every adaLN, D each | what each expert gate sees of the condition, 64 each ]

It does not depend on latents, so a loop computes it once for all steps. Layers come in the order of the model's modules, and
`handed_out` iterates over their numbers in that order.
Shapes: B batch, D width, K numbers of a row.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATE_WIDTH = 64


class Condition(nn.Linear):
    """SiLU of the condition, float32 [B, D] -> `parts` of a row, float32 [B, parts * each].

    The product is computed in the precision of the weights.
    """

    def __init__(self, width: int, parts: int, each: int, bias: bool = True) -> None:
        super().__init__(width, parts * each, bias=bias)
        self.parts = parts

    def forward(self, act: Tensor) -> Tensor:
        return F.linear(act.to(self.weight.dtype), self.weight, self.bias).float()


class Modulation(Condition):
    """The shifts, scales and gates of an adaLN, each as wide as the tokens."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(width, parts, width)


def table(model: nn.Module, y: Tensor) -> Tensor:
    """The rows [B, K], float32, of the condition y [B, D]."""
    act = F.silu(y)
    layers = [layer for layer in model.modules() if isinstance(layer, Condition)]
    layers.sort(key=lambda layer: not isinstance(layer, Modulation))  # stable: else in the modules' order
    return torch.cat([layer(act) for layer in layers], dim=-1)


def handed_out(
    rows: Tensor, modulations: int, width: int, dtype: torch.dtype
) -> tuple[Iterator[Tensor], ...]:
    """Rows [B, K] -> all shifts, scales and gates, each `dtype` [B, 1, D]; the expert gates' inputs, float32 [B, 1, 64]."""
    shared, seen = rows.unsqueeze(1).tensor_split([modulations * width], dim=-1)
    gates = seen.split(GATE_WIDTH, dim=-1) if seen.shape[-1] else ()
    return iter(shared.to(dtype).split(width, dim=-1)), iter(gates)
