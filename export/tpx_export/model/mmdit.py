"""The multimodal diffusion transformer (Esser et al., 2403.03206), some of whose blocks think.

Shapes: B batch, N visual tokens, L text tokens, D width, H heads, d = D / H.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpx_export.model.thinking import Thinking, ThinkingSpec


@dataclass(frozen=True)
class MMDiTSpec:
    latent_channels: int = 4
    latent_size: int = 16
    patch: int = 2
    width: int = 256
    heads: int = 4
    blocks: int = 6
    context_tokens: int = 24
    context_width: int = 128
    pooled_width: int = 128
    qk_norm: bool = True
    thinking: ThinkingSpec | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads or self.latent_size % self.patch:
            raise ValueError(
                f"expected heads to divide width and patch to divide latent_size, got {self.width}/{self.heads} "
                f"and {self.latent_size}/{self.patch}"
            )
        if self.thinking and not all(0 <= b < self.blocks for b in self.thinking.blocks):
            raise ValueError(
                f"expected thinking blocks within 0..{self.blocks - 1}, got {self.thinking.blocks}"
            )

    @property
    def visual_tokens(self) -> int:
        return (self.latent_size // self.patch) ** 2

    @property
    def max_depth(self) -> int:
        """Without thinking blocks there is one step: the plain block."""
        return self.thinking.max_depth if self.thinking else 1


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """[...] -> [..., width]: cosines, then sines, at frequencies 10000^(-i / (width/2))."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=positions.device) / half)
    angles = positions.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(side: int, width: int) -> Tensor:
    """Sinusoids of column and row, half the width each: [side^2, width]."""
    steps = torch.arange(side)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.cat([sinusoid(columns.flatten(), width // 2), sinusoid(rows.flatten(), width // 2)], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: layer norm without affine, then shift and scale [B, D] of the condition."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class RMSNorm(nn.Module):
    """x / rms(x), times a weight for each channel. Squares are taken in float32: in float16 they overflow at 256."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        # Division by a root, not rsqrt: the spelling that ONNX Runtime fuses.
        return (h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype) * self.weight


class Embedder(nn.Module):
    """Two linear layers with SiLU between: [B, width_in] -> [B, width]."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Stream(nn.Module):
    """One modality's own weights in a joint block. `ends` leaves out what nothing reads after the last attention."""

    def __init__(self, width: int, head_width: int, qk_norm: bool, ends: bool = False) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, (2 if ends else 6) * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(head_width) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_width) if qk_norm else nn.Identity()
        if not ends:
            self.proj = nn.Linear(width, width)
            self.mlp_in = nn.Linear(width, 4 * width)
            self.mlp_out = nn.Linear(4 * width, width)

    def heads(self, qkv: Tensor, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n, 3D] -> q, k, v, each [B, H, n, d]."""
        q, k, v = (part.unflatten(-1, (-1, head_width)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        return self.norm_q(q), self.norm_k(k), v

    def finish(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """Output projection, gated residual, gated perceptron."""
        gate_attention, shift, scale, gate_mlp = rest
        x = x + gate_attention.unsqueeze(1) * self.proj(attended)
        hidden = F.gelu(self.mlp_in(modulate(x, shift, scale)), approximate="tanh")
        return x + gate_mlp.unsqueeze(1) * self.mlp_out(hidden)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, n, d] queries against [B, H, m, d] keys and values -> [B, n, D]."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class JointBlock(nn.Module):
    """Visual and text tokens attend to one another; the visual ones may think first."""

    def __init__(self, spec: MMDiTSpec, index: int) -> None:
        super().__init__()
        self.head_width = spec.width // spec.heads
        self.ends = index == spec.blocks - 1
        self.visual = Stream(spec.width, self.head_width, spec.qk_norm)
        self.text = Stream(spec.width, self.head_width, spec.qk_norm, ends=self.ends)
        thinks = spec.thinking is not None and index in spec.thinking.blocks
        self.thinking = Thinking(spec.width, spec.thinking) if thinks and spec.thinking else None

    def forward(self, x: Tensor, c: Tensor, y: Tensor, depth: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """x [B, N, D], c [B, L, D], y [B, D] -> both streams after the block, and the routes [B, N] of its steps."""
        act = F.silu(y).to(x.dtype)
        shift, scale, *x_rest = self.visual.modulation(act).chunk(6, dim=-1)
        c_shift, c_scale, *c_rest = self.text.modulation(act).chunk(2 if self.ends else 6, dim=-1)
        x_in, c_in = modulate(x, shift, scale), modulate(c, c_shift, c_scale)
        c_q, c_k, c_v = self.text.heads(self.text.qkv(c_in), self.head_width)

        def attend_visual(qkv: Tensor) -> Tensor:
            q, k, v = self.visual.heads(qkv, self.head_width)
            return attention(q, torch.cat([k, c_k], dim=2), torch.cat([v, c_v], dim=2))

        routes: list[Tensor] = []
        if self.thinking is None:
            qkv = self.visual.qkv(x_in)
        else:
            qkv, routes = self.thinking(x_in, y, depth, lambda: self.visual.qkv(x_in), attend_visual)
        if self.ends:
            return self.visual.finish(x, attend_visual(qkv), tuple(x_rest)), c, routes
        q, k, v = self.visual.heads(qkv, self.head_width)
        joint = attention(torch.cat([q, c_q], dim=2), torch.cat([k, c_k], dim=2), torch.cat([v, c_v], dim=2))
        visual, text = joint[:, : x.shape[1]], joint[:, x.shape[1] :]
        return self.visual.finish(x, visual, tuple(x_rest)), self.text.finish(c, text, tuple(c_rest)), routes


class MMDiT(nn.Module):
    """Velocity of the flow from data to noise, dx/dsigma = noise - data."""

    positions: Tensor

    def __init__(self, spec: MMDiTSpec) -> None:
        super().__init__()
        self.spec = spec
        patch_values = spec.latent_channels * spec.patch**2
        self.patch_in = nn.Linear(patch_values, spec.width)
        self.context_in = nn.Linear(spec.context_width, spec.width)
        self.time = Embedder(256, spec.width)
        self.pooled = Embedder(spec.pooled_width, spec.width)
        self.blocks = nn.ModuleList(JointBlock(spec, i) for i in range(spec.blocks))
        self.out_modulation = nn.Linear(spec.width, 2 * spec.width)
        self.patch_out = nn.Linear(spec.width, patch_values)
        positions = grid_positions(spec.latent_size // spec.patch, spec.width)
        self.register_buffer("positions", positions, persistent=False)
        self._zero_outputs()

    def _zero_outputs(self) -> None:
        """adaLN-zero: a fresh block is the identity, a fresh model predicts zero."""
        for block in self.blocks:
            assert isinstance(block, JointBlock)
            for stream in (block.visual, block.text):
                nn.init.zeros_(stream.modulation.weight)
                nn.init.zeros_(stream.modulation.bias)
        for layer in (self.out_modulation, self.patch_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, C, S, S], timestep [B] in 0..1000, context [B, L, W], pooled [B, P], depth in 1..max_depth.

        Returns the velocity [B, C, S, S] and the routes int64 [B, thinking blocks * depth, N], block-major.
        Raises ValueError for a depth that the model was not built for.
        """
        if not 1 <= depth <= self.spec.max_depth:
            raise ValueError(f"expected a depth of 1..{self.spec.max_depth}, got {depth}")
        y = self.time(sinusoid(timestep, 256)) + self.pooled(pooled.to(self.pooled.linear_1.weight.dtype))
        x = self.patch_in(self._patches(latents)) + self.positions.to(latents.dtype)
        c = self.context_in(context)
        routes: list[Tensor] = []
        for block in self.blocks:
            x, c, chosen = block(x, c, y, depth)
            routes += chosen
        shift, scale = self.out_modulation(F.silu(y).to(x.dtype)).chunk(2, dim=-1)
        velocity = self._unpatch(self.patch_out(modulate(x, shift, scale)))
        empty = torch.zeros(x.shape[0], 0, x.shape[1], dtype=torch.int64, device=x.device)
        return velocity, torch.stack(routes, dim=1) if routes else empty

    def _patches(self, latents: Tensor) -> Tensor:
        p, side = self.spec.patch, self.spec.latent_size // self.spec.patch
        cut = latents.unflatten(3, (side, p)).unflatten(2, (side, p))
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _unpatch(self, tokens: Tensor) -> Tensor:
        p, side = self.spec.patch, self.spec.latent_size // self.spec.patch
        cut = tokens.unflatten(2, (self.spec.latent_channels, p, p)).unflatten(1, (side, side))
        return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
