"""`tpx::RoutedLora`: the low-rank product of each token with the expert that it is routed to.

    out[n] = x[n] @ A[expert[n]] @ B[expert[n]]

`routed_lora` is the operator for inference: hard routing, and a single node in an exported graph. `mixed_lora` is the
differentiable form for training: it runs every expert and weights their outputs.
"""

import torch
from torch import Tensor


@torch.library.custom_op("tpx::RoutedLora", mutates_args=())
def routed_lora(x: Tensor, expert: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x [B, N, D], expert int64 [B, N] in 0..M-1, a [M, D, r], b [M, r, O] -> [B, N, O].

    Tokens of all samples are grouped by expert, then put back in place (arXiv 2604.25299, routing).
    """
    tokens, expert = x.flatten(0, 1), expert.flatten()
    out = x.new_zeros(tokens.shape[0], b.shape[2])
    for e in range(a.shape[0]):
        rows = (expert == e).nonzero().squeeze(1)
        product = tokens.index_select(0, rows) @ a[e] @ b[e]
        out.index_copy_(
            0, rows, product.to(out.dtype)
        )  # autocast may have chosen another type for the products
    return out.unflatten(0, x.shape[:2])


@routed_lora.register_fake
def _(x: Tensor, expert: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], b.shape[2])


def mixed_lora(x: Tensor, weights: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x [B, N, D], weights [B, N, M], a [M, D, r], b [M, r, O] -> [B, N, O], the sum over m of weights[m] x A[m] B[m]."""
    experts, width, rank = a.shape
    low = x @ a.transpose(0, 1).reshape(width, experts * rank)
    low = (low.unflatten(-1, (experts, rank)) * weights.unsqueeze(-1)).flatten(-2)
    return low @ b.reshape(experts * rank, -1)
