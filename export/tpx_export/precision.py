"""Lower precisions of a model, and how much error each may cause."""

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

# Greatest relative error of each graph against PyTorch in float32, least share of tokens sent to the same expert.
TOLERANCES = {
    "fp32": Tolerance(text_encoder=1e-4, conditions=1e-4, transformer=1e-4, vae=1e-4, routing_agreement=1.0),
    # Conditions: the weights of adaLN are rounded, nothing else.
    "fp16": Tolerance(text_encoder=5e-3, conditions=1e-3, transformer=1e-2, vae=1e-2, routing_agreement=0.98),
    # Two to three times what the sample loses (docs/int8.md).
    "int8": Tolerance(text_encoder=1e-4, conditions=1e-4, transformer=6e-2, vae=1e-4, routing_agreement=0.95),
    "int8-weights": Tolerance(
        text_encoder=3e-2, conditions=3e-2, transformer=5e-2, vae=1e-4, routing_agreement=0.98
    ),
}
# What the weights of a checkpoint or an adapter file may be stored in.
STORED = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
QUANTISED = ("int8", "int8-weights")


def around(precision: str, stored: str) -> str:
    """The precision of parts that int8 leaves alone, such as the autoencoder: the one that their weights are stored in."""
    return stored if precision in QUANTISED else precision


def tolerance_of(precision: str, stored: str) -> Tolerance:
    """The tolerances of a bundle in `precision` of a model whose weights are stored in the precision `stored`."""
    own, rest = TOLERANCES[precision], TOLERANCES[around(precision, stored)]
    return replace(own, text_encoder=max(own.text_encoder, rest.text_encoder), vae=max(own.vae, rest.vae))


def at_precision(module: M, precision: str) -> M:
    """Convert the weights of `module` in place, as `narrow` does, and return it."""
    narrow(module, DTYPES[precision])
    return module


def narrow(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert floating-point weights and buffers to `dtype` in place, those of gates and of embedders to float32.

    A rounded gate sends tokens elsewhere, and timesteps up to 1,000 lose their sinusoids' phases: these are never rounded.
    """
    if isinstance(module, Gate | Embedder):
        module.float()
        return
    for child in module.children():
        narrow(child, dtype)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Within it `module` computes in float32, whatever its weights are stored in; layers are widened one at a time."""
    stored: dict[nn.Module, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def widen(part: nn.Module, inputs: Any) -> None:
        stored[part] = [(p, p.data) for p in part.parameters(recurse=False)]
        for parameter, _ in stored[part]:
            parameter.data = parameter.data.float()

    def narrow(part: nn.Module, inputs: Any, outputs: Any) -> None:
        for parameter, data in stored.pop(part):
            parameter.data = data

    hooks = []
    for part in module.modules():
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in part.parameters(recurse=False)):
            hooks.append(part.register_forward_pre_hook(widen))
            hooks.append(part.register_forward_hook(narrow, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
