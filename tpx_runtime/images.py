"""Output images: conversion of the decoder's output to PIL, and grids."""

import json
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .sampling import Array


def to_pil(pixels: Array) -> Image.Image:
    """Convert [3, height, width] in -1..1 to an RGB image; other values are clipped."""
    bytes_ = np.rint((np.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(bytes_.transpose(1, 2, 0)))


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Arrange images of one size in a grid, as square as possible; a single image is returned unchanged.

    If the images differ in nothing but consecutive seeds, the sheet has the metadata of the first, with `num_images` in
    `tpx`. Otherwise it has none.
    """
    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for position, image in enumerate(images):
        sheet.paste(image, (position % columns * width, position // columns * height))
    facts = [json.loads(image.info.get("tpx", "{}")) for image in images]
    first = facts[0]
    if first and facts == [{**first, "seed": first["seed"] + i} for i in range(len(images))]:
        sheet.info.update(images[0].info)
        sheet.info["tpx"] = json.dumps({**first, "num_images": len(images)})
    return sheet
