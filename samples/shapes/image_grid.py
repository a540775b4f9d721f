"""Saves tensors of images as one PNG."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from tpx_runtime.files import make_folder
from tpx_runtime.image_files import save_image


def save_grid(images: Tensor, path: Path, columns: int = 4) -> None:
    """Save images [B, 3, H, W] in -1..1 as a grid, row by row; B must be a multiple of `columns`. Raises BadInput."""
    batch, channels, height, width = images.shape
    grid = images.float().cpu().unflatten(0, (batch // columns, columns)).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(batch // columns * height, columns * width, channels)
    make_folder(path.parent)
    save_image(Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()), path)
