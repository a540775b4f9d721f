"""The parts of a joint attention block: modulated norms, the weights of one modality, and attention.

Shapes: B batch, n and m tokens, D width, H heads, d = D / H.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpx_export.model.conditions import Modulation


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: layer norm without affine weights, then the condition's scale and shift, each [B, 1, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries [B, H, n, d], keys and values [B, H, m, d] -> [B, n, D]."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / rms(x) times a weight per channel. Squares are computed in float32: in float16 they overflow at 256."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        # Division by a square root instead of rsqrt: ONNX Runtime fuses this form.
        return (h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype) * self.weight


class QKVProjection(nn.Module):
    """The linear layer that projects tokens to q, k and v, and their split into heads."""

    def __init__(self, width: int, head_width: int, qk_norm: bool) -> None:
        super().__init__()
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(head_width) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_width) if qk_norm else nn.Identity()

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n, 3D] -> q, k, v, each [B, H, n, d]; q and k are normalised."""
        # One transpose for all three: in graphs without fused attention (fusion/attention.py), ONNX Runtime does not move
        # it into the norms, so it can fuse every norm.
        q, k, v = qkv.unflatten(-1, (-1, self.head_width)).transpose(1, 2).chunk(3, dim=1)
        return self.norm_q(q), self.norm_k(k), v


class Stream(QKVProjection):
    """The weights of one modality in a joint block.

    `modulation` computes shift, scale, gate (attention), shift, scale, gate (MLP) and, if `dual`, shift, scale, gate of a
    second attention. With `pre_only` the modality is not used after this attention, so only the first shift and scale are
    computed (diffusers' `context_pre_only`).
    """

    def __init__(
        self, width: int, head_width: int, qk_norm: bool, pre_only: bool = False, dual: bool = False
    ) -> None:
        super().__init__(width, head_width, qk_norm)
        self.modulation = Modulation(width, parts=2 if pre_only else 9 if dual else 6)
        if not pre_only:
            self.proj = nn.Linear(width, width)
            self.mlp_in = nn.Linear(width, 4 * width)
            self.mlp_out = nn.Linear(4 * width, width)

    def finish(
        self, x: Tensor, attended: Tensor, modulations: Sequence[Tensor], second: Tensor | None = None
    ) -> Tensor:
        """Output projection, gated residual, the residual `second` of a second attention, gated MLP.

        `modulations` are the attention's gate and the MLP's shift, scale and gate.
        """
        gate_attention, shift, scale, gate_mlp = modulations
        x = x + gate_attention * self.proj(attended)
        if second is not None:
            x = x + second
        hidden = F.gelu(self.mlp_in(modulate(x, shift, scale)), approximate="tanh")
        return x + gate_mlp * self.mlp_out(hidden)


class SelfAttention(QKVProjection):
    """Self-attention within one modality, [B, n, D] -> [B, n, D]: the second attention of a dual block (SD3.5-medium)."""

    def __init__(self, width: int, head_width: int, qk_norm: bool) -> None:
        super().__init__(width, head_width, qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*self.split_heads(self.qkv(x))))
