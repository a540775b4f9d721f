"""The parts of a joint attention block: modulated norms, one modality's weights, and attention itself.

Shapes: B batch, n and m tokens, D width, H heads, d = D / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpx_export.model.conditions import Modulation


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: layer norm without affine, then shift and scale [B, 1, D] of the condition."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, n, d] queries against [B, H, m, d] keys and values -> [B, n, D]."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / rms(x), times a weight for each channel. Squares are taken in float32: in float16 they overflow at 256."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        # Division by a root, not rsqrt: the variant that ONNX Runtime fuses.
        return (h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype) * self.weight


class Heads(nn.Module):
    """The layer that makes q, k and v of tokens, and how they become heads."""

    def __init__(self, width: int, head_width: int, qk_norm: bool) -> None:
        super().__init__()
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(head_width) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_width) if qk_norm else nn.Identity()

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n, 3D] -> q, k, v, each [B, H, n, d]; q and k normed."""
        # All turned together: one transposition, which ONNX Runtime does not move into the norms, so that it fuses them all.
        q, k, v = qkv.unflatten(-1, (-1, self.head_width)).transpose(1, 2).chunk(3, dim=1)
        return self.norm_q(q), self.norm_k(k), v


class Stream(Heads):
    """One modality's own weights in a joint block.

    `modulation` makes shift, scale, gate (attention), shift, scale, gate (perceptron) and, where `dual`, shift, scale, gate
    of a second attention. `ends`: after the last attention nothing reads this modality, so only the first two are made.
    """

    def __init__(
        self, width: int, head_width: int, qk_norm: bool, ends: bool = False, dual: bool = False
    ) -> None:
        super().__init__(width, head_width, qk_norm)
        self.modulation = Modulation(width, parts=2 if ends else 9 if dual else 6)
        if not ends:
            self.proj = nn.Linear(width, width)
            self.mlp_in = nn.Linear(width, 4 * width)
            self.mlp_out = nn.Linear(4 * width, width)

    def finish(
        self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...], second: Tensor | None = None
    ) -> Tensor:
        """Output projection, gated residual, the residual of the second attention, gated perceptron; `rest` are the
        modulations behind the first two."""
        gate_attention, shift, scale, gate_mlp = rest
        x = x + gate_attention * self.proj(attended)
        if second is not None:
            x = x + second
        hidden = F.gelu(self.mlp_in(modulate(x, shift, scale)), approximate="tanh")
        return x + gate_mlp * self.mlp_out(hidden)


class SelfAttention(Heads):
    """Attention of one modality to itself, [B, n, D] -> the same: the second attention of a dual block (SD3.5-medium)."""

    def __init__(self, width: int, head_width: int, qk_norm: bool) -> None:
        super().__init__(width, head_width, qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*self.heads(self.qkv(x))))
