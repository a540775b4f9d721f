"""Pictures: from the decoder's output to PIL, into a grid, and onto disk with the settings that made them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from .errors import BadInput
from .files import check_place, whole_file
from .sampling import Array

METADATA_KEYS = ("parameters", "tpx")  # PNG text chunks: a line that a person reads, and JSON


def to_pil(pixels: Array) -> Image.Image:
    """[3, height, width] in -1..1 to an RGB picture; values beyond are clipped."""
    bytes_ = np.rint((np.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(bytes_.transpose(1, 2, 0)))


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in rows, as square as their number allows; one is itself.

    The metadata is the first one's and, in `tpx`, how many there are: their seeds rise by 1.
    """
    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for position, image in enumerate(images):
        sheet.paste(image, (position % columns * width, position // columns * height))
    sheet.info.update(images[0].info)
    if "tpx" in sheet.info:
        sheet.info["tpx"] = json.dumps({**json.loads(sheet.info["tpx"]), "num_images": len(images)})
    return sheet


def check_writable(path: Path) -> None:
    """Raise BadInput unless a PNG can be made at `path`."""
    check_suffix(path)
    check_place(path)


def check_suffix(path: Path) -> None:
    """Raise BadInput for a name that is no PNG's."""
    if path.suffix.lower() != ".png":
        raise BadInput(f"expected an output name that ends in .png, found {path}")


def save_png(image: Image.Image, path: str | Path, replace: bool = True) -> None:
    """Write a PNG with its metadata; the file appears whole or not at all.

    Raises BadInput, and FileExistsError for a file that is there already, unless it may `replace` it.
    """
    path = Path(path)
    check_suffix(path)
    chunks = PngImagePlugin.PngInfo()
    for key in METADATA_KEYS:
        if key in image.info:
            chunks.add_text(key, str(image.info[key]))
    try:
        with whole_file(path, replace) as part:
            image.save(part, format="PNG", pnginfo=chunks)
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or error  # Pillow's own errors have no strerror
        raise BadInput(f"expected to write {path}, found: {reason}; choose another place") from error
