"""The class-conditional diffusion transformer (DiT; Peebles and Xie, 2212.09748) with optional thinking blocks.

Shapes: B batch, C latent channels, H x W latent size, N visual tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from tpx_export.model.attention import Stream, attention, modulate
from tpx_export.model.checks import check_layers, check_positive
from tpx_export.model.conditions import Modulation, compute_conditions, split_conditions
from tpx_export.model.embedder import Embedder, sinusoid
from tpx_export.model.thinking import ThinkingSpec
from tpx_export.model.transformer import DiffusionTransformer, TransformerSpec


@dataclass(frozen=True)
class DiTSpec(TransformerSpec):
    """Sizes of the transformer. The defaults are those of DiT-XL/2 at 256 x 256 pixels; base/dit.py reads others.

    With `learned_sigma` the model also predicts, in as many channels after epsilon, the position of the log variance within
    its range (Nichol and Dhariwal, 2102.09672).
    """

    latent_channels: int = 4
    latent_size: tuple[int, int] = (32, 32)
    patch: int = 2
    width: int = 1152
    heads: int = 16
    blocks: int = 28
    classes: int = 1000
    learned_sigma: bool = True
    qk_norm: bool = False
    thinking: ThinkingSpec | None = None

    def __post_init__(self) -> None:
        check_positive(self, "latent_channels", "patch", "width", "heads", "classes")
        check_layers(self, "blocks")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"expected width divisible by heads and by 4, got {self.width} and {self.heads} heads"
            )
        self.require_whole_patches()
        self.require_blocks("thinking", self.thinking.blocks if self.thinking else ())

    @property
    def out_channels(self) -> int:
        return self.latent_channels * (2 if self.learned_sigma else 1)

    @property
    def num_modulations(self) -> int:
        """6 per block, and 2 for the output."""
        return 6 * self.blocks + 2


def position_table(grid: tuple[int, int], width: int) -> Tensor:
    """[rows columns, width]: half of each for the column, half for the row; sines, then cosines, at 10000^(-i / (width/4)).

    It is computed in float64, as the table in DiT's checkpoints was.
    """
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    steps = (torch.arange(size, dtype=torch.float64) for size in grid)
    rows, columns = torch.meshgrid(*steps, indexing="ij")
    angles = [positions.flatten().unsqueeze(-1) * frequencies for positions in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1).float()


class Block(nn.Module):
    """Self-attention of the visual tokens, after thinking if this is a thinking block, and an MLP."""

    def __init__(self, spec: DiTSpec, index: int) -> None:
        super().__init__()
        head_width = spec.width // spec.heads
        self.visual = Stream(spec.width, head_width, spec.qk_norm)
        self.thinking = spec.thinking_at(index)

    def forward(
        self, x: Tensor, modulations: Sequence[Tensor], gate_condition: Tensor | None, depth: int
    ) -> tuple[Tensor, list[Tensor]]:
        """x [B, N, D] -> x after the block, and the routes [B, N] of each latent step.

        `modulations` are each [B, 1, D]; `gate_condition`, [B, 1, 64], is the expert gate's projection of the condition.
        """
        shift, scale, *rest = modulations
        x_in = modulate(x, shift, scale)

        def attend(qkv: Tensor) -> Tensor:
            return attention(*self.visual.split_heads(qkv))

        routes: list[Tensor] = []
        if self.thinking is None:
            qkv = self.visual.qkv(x_in)
        else:
            qkv, routes = self.thinking(x_in, gate_condition, depth, lambda: self.visual.qkv(x_in), attend)
        return self.visual.finish(x, attend(qkv), rest), routes


class DiT(DiffusionTransformer):
    """Predicts epsilon, where x = sqrt(abar) x0 + sqrt(1 - abar) epsilon, and with `learned_sigma` the log variance."""

    spec: DiTSpec

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patch_in = nn.Linear(spec.latent_channels * spec.patch**2, spec.width)
        self.time = Embedder(256, spec.width)
        self.classes = nn.Embedding(spec.classes + 1, spec.width)
        self.blocks = nn.ModuleList(Block(spec, i) for i in range(spec.blocks))
        self.out_modulation = Modulation(spec.width, parts=2)
        self.patch_out = nn.Linear(spec.width, spec.out_channels * spec.patch**2)
        self.register_buffer("positions", position_table(spec.grid, spec.width))
        self.zero_outputs()

    def forward(
        self, latents: Tensor, timestep: Tensor, class_id: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, C, H, W], timestep [B] in 0..1000, class_id int64 [B] in 0..classes, depth in 1..max_depth.

        The class id `classes` means "no class". Computes `conditions` and returns the result of `denoise`.
        """
        return self.denoise(latents, self.conditions(timestep, class_id), depth)

    def conditions(self, timestep: Tensor, class_id: Tensor) -> Tensor:
        """Timestep [B] and class_id [B] -> float32 [B, K]: everything that depends only on them (conditions.py)."""
        time = self.time(sinusoid(timestep, 256))
        return compute_conditions(self, time + self.classes(class_id).to(time.dtype))

    def denoise(self, latents: Tensor, conditions: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Latents [B, C, H, W], conditions [B, K], depth in 1..max_depth.

        Returns the prediction [B, C or 2C, H, W], epsilon first, and the routes int64 [B, thinking blocks * depth, N],
        block-major. Raises ValueError for a depth that the model was not built for.
        """
        spec = self.spec
        x = self.embed_latents(latents, depth)
        modulations, gates = split_conditions(conditions, spec.num_modulations, spec.width, x.dtype)
        routes: list[Tensor] = []
        for block in self.blocks:
            gate_condition = next(gates, None) if block.thinking else None
            x, block_routes = block(x, list(islice(modulations, 6)), gate_condition, depth)
            routes += block_routes
        return self.predict(x, modulations, routes)
