"""Embeddings of timesteps and pooled text: sinusoids and a small MLP."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding, [...] -> [..., width]: cosines, then sines, at frequencies 10000^(-i / (width/2))."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=positions.device) / half)
    angles = positions.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    """Two linear layers with SiLU in between: [B, width_in] -> [B, width]."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
