"""CLIP's text encoder (Radford et al., 2103.00020) as SD3 uses it: a causal transformer over 77 tokens.

Shapes: B batch, L tokens, W width, H heads, P projection.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpx_export.model.biased_attention import attend

ACTIVATIONS = ("quick_gelu", "gelu")  # of OpenAI's CLIP-L, of OpenCLIP's CLIP-G


@dataclass(frozen=True)
class CLIPTextSpec:
    """The defaults are CLIP-L's; CLIP-G has width 1280, 20 heads, 32 layers, an MLP of width 5120, and plain gelu."""

    vocabulary: int = 49_408
    tokens: int = 77
    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp_width: int = 3072
    projection: int = 768
    activation: str = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % self.heads or self.activation not in ACTIVATIONS:
            raise ValueError(
                f"expected a width divisible by the heads and an activation of {ACTIVATIONS}, found "
                f"{self.heads} heads of {self.width} and {self.activation!r}"
            )


class Layer(nn.Module):
    """Pre-norm causal self-attention and MLP, [B, L, W] -> [B, L, W]."""

    def __init__(self, spec: CLIPTextSpec) -> None:
        super().__init__()
        self.heads, self.scale = spec.heads, (spec.width // spec.heads) ** -0.5
        self.quick = spec.activation == "quick_gelu"
        self.norm1, self.norm2 = (nn.LayerNorm(spec.width, eps=spec.eps) for _ in range(2))
        self.q, self.k, self.v, self.proj = (nn.Linear(spec.width, spec.width) for _ in range(4))
        self.mlp_in = nn.Linear(spec.width, spec.mlp_width)
        self.mlp_out = nn.Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.proj(attend(self.q(h) * self.scale, self.k(h), self.v(h), mask, self.heads))
        h = self.mlp_in(self.norm2(x))
        return x + self.mlp_out(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


def causal_mask(length: int) -> Tensor:
    """float32 [L, L]: minus infinity where a token (row) would attend to a later one (column), else zero."""
    positions = torch.arange(length, dtype=torch.float32)
    return torch.zeros(length, length).masked_fill(positions > positions.unsqueeze(1), -math.inf)


def pool_at_end_of_text(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, L, W] -> [B, W] at the first position of each row's largest id, the end-of-text token.

    It does not use ArgMax: padding with the same id makes ties, and engines resolve ties differently. Nor does it compare
    floats: an engine that computes in bfloat16 cannot tell the ids of the start and the end of text apart.
    """
    positions = torch.arange(ids.shape[1])
    is_largest = ids == ids.amax(1, keepdim=True)
    first = torch.where(is_largest, positions, ids.shape[1]).amin(1, keepdim=True)
    return ((positions == first).to(x.dtype).unsqueeze(1) @ x).squeeze(1)


class CLIPText(nn.Module):
    """Ids [B, L] -> context [B, L, W] of the penultimate layer, and pooled [B, P], projected from the end of the text."""

    def __init__(self, spec: CLIPTextSpec) -> None:
        super().__init__()
        self.spec = spec
        self.words = nn.Embedding(spec.vocabulary, spec.width)
        self.places = nn.Parameter(torch.randn(spec.tokens, spec.width) * 0.01)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width, eps=spec.eps)
        self.projection = nn.Linear(spec.width, spec.projection, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        context = last = self.words(ids) + self.places[: ids.shape[1]]
        mask = causal_mask(ids.shape[1])
        for layer in self.layers:
            context, last = last, layer(last, mask)
        return context, self.projection(pool_at_end_of_text(self.norm(last), ids))
