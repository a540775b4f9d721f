"""Latents to patch tokens and back."""

from torch import Tensor


def to_patches(latents: Tensor, patch: int) -> Tensor:
    """[B, C, S, S] -> [B, N, C patch^2]: patches in row-major order, each as (channel, row, column)."""
    side = latents.shape[-1] // patch
    cut = latents.unflatten(3, (side, patch)).unflatten(2, (side, patch))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_patches(tokens: Tensor, patch: int, side: int) -> Tensor:
    """[B, side^2, C patch^2] -> [B, C, side * patch, side * patch]: the inverse of `to_patches`."""
    cut = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, (side, side))
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
