"""Attention with a bias added to its scores: a causal mask, or T5's relative position bias."""

from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, heads: int) -> Tensor:
    """softmax(q k^T + bias) v for q, k, v [B, L, H d] and bias float32 [..., L, L] -> [B, L, H d]; q is not scaled here.

    It computes in float32: a text encoder runs once per prompt, and T5's unscaled scores overflow float16.
    """
    q, k, v_wide = (part.float().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(2, 3) + bias
    return (scores.softmax(-1) @ v_wide).transpose(1, 2).flatten(2).to(v.dtype)
