"""A frozen base with trainable thinking adapters: base weights in one precision without gradients, adapters in float32.

There is no autocast: the base's weights are cast to `precision` once, and the experts' products are computed in it. Gates,
embedders, adapters, their gradients and the loss are float32.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tpx_export.adapters import attach
from tpx_export.model.thinking import ThinkingSpec
from tpx_export.precision import cast_weights
from tpx_export.training.data import Conditioning

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def thinking_model(
    base: nn.Module, thinking: ThinkingSpec, precision: str, device: str, seed: int
) -> nn.Module:
    """Freeze `base`, attach new adapters, move it to `device` and return it in training mode. Its output does not change.

    Adapters are initialised on the CPU, so that a seed gives the same adapters on every device.
    """
    cast_weights(base, DTYPES[precision])
    base.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach(base, thinking, dtype=torch.float32)
    return base.to(device).train()


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if ".thinking." in name and p.requires_grad}


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Gradient checkpointing: store only the inputs of each block and recompute the rest in the backward pass.

    Routes are sampled again with the same noise, so only memory and time change. Blocks before the first thinking block need
    no gradient and store nothing anyway.
    """
    spec: Any = model.spec
    blocks: Any = model.blocks
    for block in blocks[spec.thinking.blocks[0] :]:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=True
        )
    return model


def predict(
    model: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, depth: int
) -> Tensor:
    """The model's prediction, float32, for float32 latents [B, C, H, W], timestep [B] and conditioning."""
    dtype: torch.dtype = model.patch_in.weight.dtype  # type: ignore[union-attr, assignment]
    # The context is in the base's precision; pooled stays float32, as its embedder does.
    inputs = [value.to(dtype) if value.ndim == 3 else value for value in conditioning]
    prediction: Tensor = model(latents.to(dtype), timestep, *inputs, depth)[0]
    return prediction.float()
