"""A linear layer in int8, in PyTorch and, by tpx_export.operator's table, in ONNX.

    tpx::quantised_linear     x ─QuantizeLinear─DequantizeLinear─┐
                                int8 weight ──DequantizeLinear───MatMul ─▶
    tpx::dequantised_linear   x ─────────────────────────────────┐
                                int8 weight ──DequantizeLinear───MatMul ─▶

Exporting folds the transposes of weights, which then lose their names. So layers are replaced in the module, by name, and
not searched for in the graph.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tpx_export.model.conditions import Modulation
from tpx_export.quantise.grid import TOP, weight_grid
from tpx_export.quantise.layers import Layers


@torch.library.custom_op("tpx::quantised_linear", mutates_args=())
def quantised_linear(x: Tensor, step: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
    """x [..., in] rounded to the grid of `step`, times int8 weight [in, out] of step sizes `steps` [out] -> [..., out]."""
    rounded = (x / step).round().clamp(-TOP - 1, TOP) * step  # half to even and saturating, as QuantizeLinear
    return rounded @ (weight.to(x.dtype) * steps)


@quantised_linear.register_fake
def _(x: Tensor, step: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@torch.library.custom_op("tpx::dequantised_linear", mutates_args=())
def dequantised_linear(x: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
    """x [..., in] times int8 weight [in, out] of step sizes `steps` [out] -> [..., out]."""
    return x @ (weight.to(x.dtype) * steps)


@dequantised_linear.register_fake
def _(x: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


class Int8Linear(nn.Module):
    """Replaces a linear layer, float32 [..., in] -> [..., out]; `step` is its activations' step size, if they are int8."""

    weight: Tensor
    steps: Tensor
    step: Tensor | None

    def __init__(self, layer: nn.Linear, step: float | None) -> None:
        super().__init__()
        weight, steps = weight_grid(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps)
        self.register_buffer("step", None if step is None else torch.tensor(step, dtype=torch.float32))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.step is None:
            y = torch.ops.tpx.dequantised_linear(x, self.weight, self.steps)
        else:
            y = torch.ops.tpx.quantised_linear(x, self.step, self.weight, self.steps)
        made: Tensor = y if self.bias is None else y + self.bias
        return made


class Int8Modulation(Modulation):
    """Replaces an adaLN's layer: weights in int8, and still a Modulation to code that looks for these."""

    def __init__(self, layer: Modulation) -> None:
        nn.Module.__init__(self)
        self.parts, self.product = layer.parts, Int8Linear(layer, None)

    def forward(self, act: Tensor) -> Tensor:
        made: Tensor = self.product(act)
        return made

    def extra_repr(self) -> str:
        return f"parts={self.parts}"


def replace(module: nn.Module, layers: Layers, steps: Mapping[str, float] | None = None) -> None:
    """Put the int8 form of each of `layers` in its place in `module`. `steps`: the step sizes of their activations, by name.

    The module has to be in float32. Without `steps` only weights are int8. Raises KeyError for a layer without a step.
    """
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        if isinstance(layer, Modulation):
            made: nn.Module = Int8Modulation(layer)
        else:
            made = Int8Linear(layer, None if steps is None else steps[name])
        setattr(module.get_submodule(parent), own, made)
