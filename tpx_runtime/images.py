"""Output images: conversion of the decoder's output to PIL, grids, and PNG files with metadata."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, PngImagePlugin

from .errors import BadInput
from .files import atomic_file, check_writable
from .sampling import Array

METADATA_KEYS = ("parameters", "tpx")  # PNG text chunks: human-readable text, and JSON


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


def check_png_writable(path: Path) -> None:
    """Raise BadInput unless a PNG can be written to `path`."""
    check_png_suffix(path)
    check_writable(path)


def check_png_suffix(path: Path) -> None:
    """Raise BadInput for a name that does not end in .png."""
    if path.suffix.lower() != ".png":
        raise BadInput(f"expected an output name that ends in .png, found {path}")


def save_png(image: Image.Image, path: str | Path | IO[bytes], replace: bool = True) -> None:
    """Write a PNG with its metadata: atomically to a path, or to a binary file object.

    Raises BadInput, and FileExistsError if the file exists and `replace` is false.
    """
    chunks = PngImagePlugin.PngInfo()
    for key in METADATA_KEYS:
        if key in image.info:
            chunks.add_text(key, str(image.info[key]))
    if not isinstance(path, str | Path):
        image.save(path, format="PNG", pnginfo=chunks)
        return
    path = Path(path)
    check_png_suffix(path)
    try:
        with atomic_file(path, replace) as part:
            image.save(part, format="PNG", pnginfo=chunks)
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or error  # errors raised by Pillow itself have no strerror
        raise BadInput(f"expected to write {path}, found: {reason}; choose another place") from error
