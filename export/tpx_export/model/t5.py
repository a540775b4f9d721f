"""The encoder of T5 version 1.1 (Raffel et al., 1910.10683; Shazeer, 2002.05202), SD3's third text encoder.

Shapes: B batch, L tokens, W width, H heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpx_export.model.biased_attention import attend


@dataclass(frozen=True)
class T5Spec:
    """The defaults are T5-XXL's. `buckets` and `max_distance` are those of the relative position bias."""

    vocabulary: int = 32_128
    width: int = 4096
    heads: int = 64
    head_width: int = 64
    mlp_width: int = 10_240
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"expected buckets divisible by 4 and a max_distance above a quarter of them, found {self.buckets} and "
                f"{self.max_distance}"
            )


class Linear(nn.Linear):
    """A linear layer without bias, float32 -> float32, that multiplies in the precision of the weights.

    T5's activations exceed the range of float16, so for float16 weights each row is scaled to at most 1 and back afterwards.
    Nothing overflows while the columns times the largest weight stay below 65,504.
    """

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype != torch.float16:
            return F.linear(x.to(self.weight.dtype), self.weight).float()
        row_max = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        return F.linear((x / row_max).half(), self.weight).float() * row_max


class Norm(nn.Module):
    """x / rms(x) times a weight per channel, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # Division by a square root instead of rsqrt: ONNX Runtime fuses this form.
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight.float()


def relative_position_bucket(distance: int, buckets: int, max_distance: int) -> int:
    """The bucket of a key `distance` tokens after its query. Half of the buckets are for later keys, half for the others.

    In each half, the first half are for one distance each, and the rest widen logarithmically up to `max_distance`.
    """
    half, exact = buckets // 2, buckets // 4
    offset, distance = (half if distance > 0 else 0), abs(distance)
    if distance < exact:
        return offset + distance
    steps = math.log(distance / exact) / math.log(max_distance / exact) * (half - exact)
    return offset + min(exact + int(steps), half - 1)


class Layer(nn.Module):
    """Pre-norm self-attention without scaling, then a gated MLP; x float32 [B, L, W] -> [B, L, W]."""

    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        self.heads, inner = spec.heads, spec.heads * spec.head_width
        self.norm1, self.norm2 = Norm(spec.width, spec.eps), Norm(spec.width, spec.eps)
        self.q, self.k, self.v = (Linear(spec.width, inner) for _ in range(3))
        self.proj = Linear(inner, spec.width)
        self.gate, self.mlp_in = (Linear(spec.width, spec.mlp_width) for _ in range(2))
        self.mlp_out = Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.proj(attend(self.q(h), self.k(h), self.v(h), bias, self.heads))
        h = self.norm2(x)
        return x + self.mlp_out(F.gelu(self.gate(h), approximate="tanh") * self.mlp_in(h))


class T5Encoder(nn.Module):
    """Ids [B, L] -> (context float32 [B, L, W],). Padding is attended to, as in SD3."""

    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        self.spec = spec
        self.words = nn.Embedding(spec.vocabulary, spec.width)
        self.distances = nn.Embedding(spec.buckets, spec.heads)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = Norm(spec.width, spec.eps)

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        x, bias = self.words(ids).float(), self.position_bias(ids.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return (self.norm(x),)

    def position_bias(self, length: int) -> Tensor:
        """The relative position bias that every layer adds to its scores: float32 [H, L queries, L keys]."""
        distances = range(1 - length, length)
        buckets = [relative_position_bucket(d, self.spec.buckets, self.spec.max_distance) for d in distances]
        by_distance = self.distances(torch.tensor(buckets)).float()  # [2L - 1, H]
        positions = torch.arange(length)
        # An embedding lookup instead of indexing: engines run Gather faster than GatherND.
        return F.embedding(positions - positions.unsqueeze(1) + length - 1, by_distance).permute(2, 0, 1)
