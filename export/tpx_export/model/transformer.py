"""The base class of MMDiT and DiT: latents to tokens before the blocks, tokens to the prediction after them.

    latents ─patch_in, positions─▶ tokens ─blocks─▶ tokens, routes ─out_modulation, patch_out─▶ prediction, routes

Shapes: B batch, C latent channels, H x W latent size, N visual tokens, D width.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tpx_export.model.attention import modulate
from tpx_export.model.conditions import Modulation
from tpx_export.model.patches import from_patches, to_patches
from tpx_export.model.thinking import Thinking, ThinkingSpec


class TransformerSpec:
    """Base class of MMDiTSpec and DiTSpec: properties derived from the fields that both have."""

    latent_size: tuple[int, int]  # (height, width)
    patch: int
    width: int
    blocks: int
    thinking: ThinkingSpec | None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.latent_size
        return height // self.patch, width // self.patch

    @property
    def visual_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def max_depth(self) -> int:
        """The most latent steps; 1 without thinking blocks."""
        return self.thinking.max_depth if self.thinking else 1

    def thinking_at(self, block: int) -> Thinking | None:
        """New adapters for a block; None unless it thinks."""
        if self.thinking is None or block not in self.thinking.blocks:
            return None
        return Thinking(self.width, self.thinking)

    @property
    def num_modulations(self) -> int:
        """How many shifts, scales and gates, each of `width` values, the blocks and the output take."""
        raise NotImplementedError

    @property
    def conditions_width(self) -> int:
        """The length of a row of conditions (conditions.py)."""
        return self.num_modulations * self.width + (self.thinking.conditions_width if self.thinking else 0)

    def require_whole_patches(self) -> None:
        """Raise ValueError unless the latents consist of whole patches, at least one."""
        if min(self.latent_size) < 1 or any(size % self.patch for size in self.latent_size):
            raise ValueError(
                f"expected latent_size divisible by patch, got {list(self.latent_size)} and {self.patch}"
            )

    def require_blocks(self, kind: str, chosen: Sequence[int]) -> None:
        """Raise ValueError unless the model has all `chosen` blocks."""
        if not all(0 <= b < self.blocks for b in chosen):
            raise ValueError(f"expected {kind} blocks within 0..{self.blocks - 1}, got {chosen}")


class DiffusionTransformer(nn.Module):
    """Base class. A subclass creates the layers named here, and `blocks` between them."""

    spec: TransformerSpec
    patch_in: nn.Linear
    positions: Tensor
    out_modulation: Modulation
    patch_out: nn.Linear

    def zero_outputs(self) -> None:
        """adaLN-zero: a new block is the identity, a new model predicts zero."""
        modulations = [module for module in self.modules() if isinstance(module, Modulation)]
        for layer in (*modulations, self.patch_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def embed_latents(self, latents: Tensor, depth: int) -> Tensor:
        """Latents [B, C, H, W] -> visual tokens [B, N, D] with position embeddings.

        Raises ValueError for a depth that the model was not built for.
        """
        spec = self.spec
        if not 1 <= depth <= spec.max_depth:
            raise ValueError(f"expected a depth of 1..{spec.max_depth}, got {depth}")
        return self.patch_in(to_patches(latents, spec.patch)) + self.positions.to(latents.dtype)

    def predict(
        self, x: Tensor, modulations: Iterator[Tensor], routes: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Visual tokens x [B, N, D] after all blocks -> the prediction [B, out channels, H, W] and the stacked routes.

        `modulations` has only the output's shift and scale left, each [B, 1, D]. Each of `routes` is int64 [B, N]; stacked
        they are [B, routes, N].
        """
        shift, scale = modulations
        tokens = self.patch_out(modulate(x, shift, scale))
        predicted = from_patches(tokens, self.spec.patch, self.spec.grid)
        empty = torch.zeros(x.shape[0], 0, x.shape[1], dtype=torch.int64, device=x.device)
        return predicted, torch.stack(list(routes), dim=1) if routes else empty
