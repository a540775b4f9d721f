"""Conversion of a model's weights to a precision, and the tolerances of each precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from tpx_export.model.embedder import Embedder
from tpx_export.model.thinking import Gate
from tpx_runtime.manifest import Tolerance

M = TypeVar("M", bound=nn.Module)

# The largest relative error of each graph against PyTorch in float32, and the smallest share of equal routes.
TOLERANCES = {
    "fp32": Tolerance(text_encoder=1e-4, conditions=1e-4, transformer=1e-4, vae=1e-4, routing_agreement=1.0),
    # Conditions: only the weights of adaLN are rounded. VAE: twice the largest error of an image of 1,024 pixels on a GPU,
    # which is nearly that of PyTorch in float16 (docs/gpu.md).
    "fp16": Tolerance(text_encoder=5e-3, conditions=1e-3, transformer=1e-2, vae=2e-2, routing_agreement=0.98),
    # docs/quantisation.md compares them with the errors of the sample model.
    "int8": Tolerance(text_encoder=1e-4, conditions=1e-4, transformer=6e-2, vae=1e-4, routing_agreement=0.95),
    "int8-weights": Tolerance(
        text_encoder=5e-2, conditions=3e-2, transformer=5e-2, vae=1e-4, routing_agreement=0.98
    ),
    "int4-weights": Tolerance(
        text_encoder=5e-2, conditions=2e-1, transformer=4e-1, vae=1e-4, routing_agreement=0.93
    ),
}
# The types that the weights of a checkpoint or an adapter file may be stored in.
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
WEIGHT_BITS = {"int8-weights": 8, "int4-weights": 4}  # the precisions in which only weights are quantised
QUANTISED_PRECISIONS = ("int8", *WEIGHT_BITS)
CALIBRATED_PRECISIONS = ("int8", "int4-weights")


def unquantised_precision(precision: str, stored: str) -> str:
    """The precision of parts that no precision quantises, such as the autoencoder: `stored`, which is Pipeline.precision."""
    return stored if precision in QUANTISED_PRECISIONS else precision


def tolerance_of(precision: str, stored: str) -> Tolerance:
    """The tolerances of a bundle in `precision` whose Pipeline.precision is `stored`."""
    tolerance, unquantised = TOLERANCES[precision], TOLERANCES[unquantised_precision(precision, stored)]
    return replace(
        tolerance,
        text_encoder=max(tolerance.text_encoder, unquantised.text_encoder),
        vae=max(tolerance.vae, unquantised.vae),
    )


def cast_to_precision(module: M, precision: str) -> M:
    """Convert the weights of `module` in place with `cast_weights` and return it."""
    cast_weights(module, DTYPES[precision])
    return module


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert floating-point weights and buffers to `dtype` in place, but those of gates and embedders to float32.

    These are never rounded: a rounded gate would route tokens differently, and the sinusoids of timesteps up to 1,000 would
    lose their phase.
    """
    if isinstance(module, Gate | Embedder):
        module.float()
        return
    for child in module.children():
        cast_weights(child, dtype)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Let `module` compute in float32 whatever its stored precision; only one layer at a time is converted."""
    stored: dict[nn.Module, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def convert(layer: nn.Module, inputs: Any) -> None:
        stored[layer] = [(p, p.data) for p in layer.parameters(recurse=False)]
        for parameter, _ in stored[layer]:
            parameter.data = parameter.data.float()

    def restore(layer: nn.Module, inputs: Any, outputs: Any) -> None:
        for parameter, data in stored.pop(layer):
            parameter.data = data

    hooks = []
    for layer in module.modules():
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in layer.parameters(recurse=False)):
            hooks.append(layer.register_forward_pre_hook(convert))
            hooks.append(layer.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
