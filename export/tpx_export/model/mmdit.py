"""The multimodal diffusion transformer (MMDiT; Esser et al., 2403.03206) with optional thinking blocks.

Shapes: B batch, N visual tokens, L text tokens, D width, H heads, d = D / H.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from tpx_export.model.attention import SelfAttention, Stream, attention, modulate
from tpx_export.model.checks import check_layers, check_positive
from tpx_export.model.conditions import Modulation, compute_conditions, split_conditions
from tpx_export.model.embedder import Embedder, sinusoid
from tpx_export.model.thinking import ThinkingSpec
from tpx_export.model.transformer import DiffusionTransformer, TransformerSpec


@dataclass(frozen=True)
class MMDiTSpec(TransformerSpec):
    """Sizes of the transformer. The defaults are the sample model's; base/sd3.py reads those of SD3 and SD3.5.

    `dual_blocks` have a second attention, among the visual tokens only (SD3.5-medium). With `stored_positions` the position
    table is a tensor of the state dict, cropped to this latent size, instead of being computed.
    """

    latent_channels: int = 4
    latent_size: tuple[int, int] = (16, 16)
    patch: int = 2
    width: int = 256
    heads: int = 4
    blocks: int = 6
    context_tokens: int = 24
    context_width: int = 128
    pooled_width: int = 128
    qk_norm: bool = True
    thinking: ThinkingSpec | None = None
    dual_blocks: tuple[int, ...] = ()
    stored_positions: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "latent_channels", "patch", "width", "heads")
        check_layers(self, "blocks")
        check_positive(self, "context_tokens", "context_width", "pooled_width")
        if self.width % self.heads:
            raise ValueError(f"expected width divisible by heads, got {self.width} and {self.heads} heads")
        if self.width % 4 and not self.stored_positions:  # for the sines and cosines of two coordinates
            raise ValueError(f"expected width divisible by 4, got {self.width}")
        self.require_whole_patches()
        self.require_blocks("thinking", self.thinking.blocks if self.thinking else ())
        self.require_blocks("dual", self.dual_blocks)

    @property
    def num_modulations(self) -> int:
        """6 per stream, except 2 for the last text stream; 3 more per dual block, and 2 for the output."""
        return 12 * self.blocks + 3 * len(self.dual_blocks) - 2


def grid_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Sinusoidal embeddings of column and row, half the width each: [rows columns, width]."""
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    return torch.cat([sinusoid(columns.flatten(), width // 2), sinusoid(rows.flatten(), width // 2)], dim=-1)


class JointBlock(nn.Module):
    """Joint attention of visual and text tokens, and an MLP for each.

    The visual tokens think first if this is a thinking block, and have a second attention if it is a dual block.
    """

    def __init__(self, spec: MMDiTSpec, index: int) -> None:
        super().__init__()
        head_width = spec.width // spec.heads
        self.context_pre_only = index == spec.blocks - 1
        dual = index in spec.dual_blocks
        self.visual = Stream(spec.width, head_width, spec.qk_norm, dual=dual)
        self.text = Stream(spec.width, head_width, spec.qk_norm, pre_only=self.context_pre_only)
        self.second = SelfAttention(spec.width, head_width, spec.qk_norm) if dual else None
        self.thinking = spec.thinking_at(index)

    @property
    def num_modulations(self) -> int:
        """How many shifts, scales and gates the block takes."""
        return self.visual.modulation.parts + self.text.modulation.parts

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        modulations: Sequence[Tensor],
        gate_condition: Tensor | None,
        depth: int,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """x [B, N, D], c [B, L, D] -> both streams after the block, and the routes [B, N] of each latent step.

        `modulations` are those of the visual stream, then of the text stream, each [B, 1, D]; `gate_condition`, [B, 1, 64],
        is the expert gate's projection of the condition.
        """
        parts = self.visual.modulation.parts
        shift, scale, *rest = modulations[:parts]
        c_shift, c_scale, *c_rest = modulations[parts:]
        x_in, c_in = modulate(x, shift, scale), modulate(c, c_shift, c_scale)
        c_q, c_k, c_v = self.text.split_heads(self.text.qkv(c_in))

        def attend_visual(qkv: Tensor) -> Tensor:
            q, k, v = self.visual.split_heads(qkv)
            return attention(q, torch.cat([k, c_k], dim=2), torch.cat([v, c_v], dim=2))

        routes: list[Tensor] = []
        if self.thinking is None:
            qkv = self.visual.qkv(x_in)
        else:
            qkv, routes = self.thinking(
                x_in, gate_condition, depth, lambda: self.visual.qkv(x_in), attend_visual
            )
        second = None
        if self.second is not None:
            *rest, shift, scale, gate = rest
            second = gate * self.second(modulate(x, shift, scale))
        if self.context_pre_only:
            return self.visual.finish(x, attend_visual(qkv), rest, second), c, routes
        q, k, v = self.visual.split_heads(qkv)
        joint = attention(torch.cat([q, c_q], dim=2), torch.cat([k, c_k], dim=2), torch.cat([v, c_v], dim=2))
        visual, text = joint[:, : x.shape[1]], joint[:, x.shape[1] :]
        return (
            self.visual.finish(x, visual, rest, second),
            self.text.finish(c, text, c_rest),
            routes,
        )


class MMDiT(DiffusionTransformer):
    """Predicts the velocity of the flow from data to noise, dx/dsigma = noise - data."""

    spec: MMDiTSpec

    def __init__(self, spec: MMDiTSpec) -> None:
        super().__init__()
        self.spec = spec
        patch_values = spec.latent_channels * spec.patch**2
        self.patch_in = nn.Linear(patch_values, spec.width)
        self.context_in = nn.Linear(spec.context_width, spec.width)
        self.time = Embedder(256, spec.width)
        self.pooled = Embedder(spec.pooled_width, spec.width)
        self.blocks = nn.ModuleList(JointBlock(spec, i) for i in range(spec.blocks))
        self.out_modulation = Modulation(spec.width, parts=2)
        self.patch_out = nn.Linear(spec.width, patch_values)
        positions = grid_positions(spec.grid, spec.width)
        self.register_buffer("positions", positions, persistent=spec.stored_positions)
        self.zero_outputs()

    def forward(
        self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, C, H, W], timestep [B] in 0..1000, context [B, L, W], pooled [B, P], depth in 1..max_depth.

        Computes `conditions` and returns the result of `denoise`.
        """
        return self.denoise(latents, self.conditions(timestep, pooled), context, depth)

    def conditions(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """Timestep [B] and pooled [B, P] -> float32 [B, K]: everything that depends only on them (conditions.py)."""
        pooled = pooled.to(self.pooled.linear_1.weight.dtype)
        return compute_conditions(self, self.time(sinusoid(timestep, 256)) + self.pooled(pooled))

    def denoise(
        self, latents: Tensor, conditions: Tensor, context: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, C, H, W], conditions [B, K], context [B, L, W], depth in 1..max_depth.

        Returns the velocity [B, C, H, W] and the routes int64 [B, thinking blocks * depth, N], block-major.
        Raises ValueError for a depth that the model was not built for.
        """
        spec = self.spec
        x = self.embed_latents(latents, depth)
        c = self.context_in(context)
        modulations, gates = split_conditions(conditions, spec.num_modulations, spec.width, x.dtype)
        routes: list[Tensor] = []
        for block in self.blocks:
            assert isinstance(block, JointBlock)
            block_modulations = list(islice(modulations, block.num_modulations))
            gate_condition = next(gates, None) if block.thinking else None
            x, c, block_routes = block(x, c, block_modulations, gate_condition, depth)
            routes += block_routes
        return self.predict(x, modulations, routes)
