"""Quantised linear layers, in PyTorch and, with the translations of tpx_export.operator, in ONNX.

    tpx::quantised_linear     x ─QuantizeLinear─DequantizeLinear─┐
                                int8 weight ──DequantizeLinear───MatMul ─▶
    tpx::dequantised_linear   x ─────────────────────────────────┐
                        int8 or int4 weight ──DequantizeLinear───MatMul ─▶

Layers are replaced by name in the module and not in the graph, because the export folds the transposes of weights, which
then lose their names.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tpx_export.model.conditions import Modulation
from tpx_export.quantise.activation_grid import QMAX
from tpx_export.quantise.gptq import Gram, quantise_with_gram
from tpx_export.quantise.layers import Layers
from tpx_export.quantise.weight_grid import (
    INT8,
    INT8_BY_INT8,
    dequantise_weight,
    int4_grid,
    quantise_weight,
)


@torch.library.custom_op("tpx::quantised_linear", mutates_args=())
def quantised_linear(x: Tensor, step: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
    """x [..., in] rounded to multiples of `step`, times int8 weight [in, out] with steps `steps` [out] -> [..., out]."""
    rounded = (x / step).round().clamp(-QMAX - 1, QMAX) * step  # half to even, saturating, as QuantizeLinear
    return rounded @ dequantise_weight(weight, steps)


@quantised_linear.register_fake
def _(x: Tensor, step: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@torch.library.custom_op("tpx::dequantised_linear", mutates_args=())
def dequantised_linear(x: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
    """x [..., in] times weight [in, out] -> [..., out].

    Step sizes `steps` are [out] for an int8 weight, or [groups, out] for an int4 weight, whose values are int8 here too.
    """
    return x @ dequantise_weight(weight, steps)


@dequantised_linear.register_fake
def _(x: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


class QuantisedLinear(nn.Module):
    """Replaces a linear layer, float32 [..., in] -> [..., out]; `step` is the step size of activations, None for float32.

    Weights have `bits` 8 or 4, but 8 in layers of a width that no group of int4 divides. With a `gram` of the layer's inputs
    they are rounded so that its outputs change little.
    """

    weight: Tensor
    steps: Tensor
    step: Tensor | None

    def __init__(self, layer: nn.Linear, step: float | None, bits: int = 8, gram: Gram | None = None) -> None:
        super().__init__()
        grid = INT8 if step is None else INT8_BY_INT8
        if bits == 4:
            grid = int4_grid(layer.in_features) or grid
        weight = layer.weight.detach()
        weight, steps = (
            quantise_weight(weight, grid) if gram is None else quantise_with_gram(weight, grid, gram)
        )
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps.clone())  # a view could not change its type
        self.register_buffer("step", None if step is None else torch.tensor(step, dtype=torch.float32))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.step is None:
            y = torch.ops.tpx.dequantised_linear(x, self.weight, self.steps)
        else:
            y = torch.ops.tpx.quantised_linear(x, self.step, self.weight, self.steps)
        output: Tensor = y if self.bias is None else y + self.bias
        return output


class QuantisedModulation(Modulation):
    """Replaces the layer of an adaLN, weights only. It is a Modulation because other code searches for this class."""

    def __init__(self, layer: Modulation, bits: int, gram: Gram | None) -> None:
        nn.Module.__init__(self)
        self.parts, self.product = layer.parts, QuantisedLinear(layer, None, bits, gram)

    def forward(self, act: Tensor) -> Tensor:
        output: Tensor = self.product(act)
        return output

    def extra_repr(self) -> str:
        return f"parts={self.parts}"


def replace_layers(
    module: nn.Module,
    layers: Layers,
    steps: Mapping[str, float] | None = None,
    bits: int = 8,
    grams: Mapping[str, Gram] | None = None,
) -> None:
    """Replace each of `layers` of a float32 `module` by its quantised form. `steps` are the activations' step sizes by name.

    Without `steps` only weights are quantised, to `bits` 8 or 4. `grams` are Gram matrices of the layers' inputs by name.
    Raises KeyError for a layer without a step size or Gram matrix.
    """
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        gram = None if grams is None else grams[name]
        if isinstance(layer, Modulation):
            quantised: nn.Module = QuantisedModulation(layer, bits, gram)
        else:
            step = None if steps is None else steps[name]
            quantised = QuantisedLinear(layer, step, bits, gram)
        setattr(module.get_submodule(parent), attribute, quantised)
