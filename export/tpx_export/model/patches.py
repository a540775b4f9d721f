"""Latents to patch tokens and back."""

from torch import Tensor


def to_patches(latents: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C patch^2]: patches in row-major order, each as (channel, row, column)."""
    cut = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_patches(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """[B, N, C patch^2] -> [B, C, H, W]: the inverse of `to_patches`; `grid` is the number of (rows, columns) of patches."""
    cut = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, grid)
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
