"""The sample model's text encoder: a small transformer over words."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpx_export.model.checks import check_layers, check_positive


@dataclass(frozen=True)
class TextEncoderSpec:
    """`vocabulary` is in id order and begins with <pad>, <bos> and <eos>; prompts contain no entry that begins with "<"."""

    vocabulary: tuple[str, ...]
    tokens: int = 24
    width: int = 128
    heads: int = 4
    layers: int = 3

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "width", "heads")
        check_layers(self, "layers")
        if self.width % self.heads:
            raise ValueError(f"expected width divisible by heads, got {self.width} and {self.heads} heads")


class Layer(nn.Module):
    """Pre-norm self-attention and MLP, [B, L, W] -> [B, L, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh"))


class TextEncoder(nn.Module):
    """Ids [B, L] -> context [B, L, W] and pooled [B, W], that of the first token. Padding is attended to, as in SD3."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.words = nn.Embedding(len(spec.vocabulary), spec.width)
        self.places = nn.Parameter(torch.randn(spec.tokens, spec.width) * 0.02)
        self.layers = nn.ModuleList(Layer(spec.width, spec.heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(ids) + self.places
        for layer in self.layers:
            x = layer(x)
        context = self.norm(x)
        return context, context[:, 0]
