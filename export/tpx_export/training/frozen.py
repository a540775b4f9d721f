"""A base that is frozen and thinks: its weights in one precision and without gradients, its adapters in float32.

No autocast: the base's weights are turned into `precision` once, the experts' products follow it, and gates, embedders of
time and condition, adapters, their gradients and the loss are float32.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tpx_export.adapters import attach
from tpx_export.model.thinking import ThinkingSpec
from tpx_export.precision import narrow
from tpx_export.training.data import Told

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def thinking_model(
    base: nn.Module, thinking: ThinkingSpec, precision: str, device: str, seed: int
) -> nn.Module:
    """`base` itself, frozen, with fresh adapters, in training mode on `device`; its output is the same as before.

    Adapters are initialised on the CPU, so that a seed gives the same ones on every device.
    """
    narrow(base, DTYPES[precision])
    base.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach(base, thinking, dtype=torch.float32)
    return base.to(device).train()


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if ".thinking." in name and p.requires_grad}


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Gradient checkpointing: keep only the inputs of each block, and compute the rest again for its gradient.

    Routes are drawn again with the same noise, so nothing changes but memory and time. Blocks before the first that thinks
    need no gradient and keep nothing anyway.
    """
    spec: Any = model.spec
    blocks: Any = model.blocks
    for block in blocks[spec.thinking.blocks[0] :]:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=True
        )
    return model


def predict(model: nn.Module, latents: Tensor, timestep: Tensor, told: Told, depth: int) -> Tensor:
    """The model's prediction, float32, for float32 latents [B, C, S, S], timestep [B] and the conditioning `told`."""
    dtype: torch.dtype = model.patch_in.weight.dtype  # type: ignore[union-attr, assignment]
    # The condition's embedder is float32, and so is what it reads; the context goes among the base's tokens.
    given = [value.to(dtype) if value.ndim == 3 else value for value in told]
    prediction: Tensor = model(latents.to(dtype), timestep, *given, depth)[0]
    return prediction.float()
