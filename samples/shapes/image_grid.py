"""Saves tensors of images as one PNG."""

from pathlib import Path

from PIL import Image
from torch import Tensor


def save_grid(images: Tensor, path: Path, columns: int = 4) -> None:
    """Save images [B, 3, H, W] in -1..1 as a grid, row by row; B must be a multiple of `columns`."""
    batch, channels, height, width = images.shape
    grid = images.float().cpu().unflatten(0, (batch // columns, columns)).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(batch // columns * height, columns * width, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).save(path)
