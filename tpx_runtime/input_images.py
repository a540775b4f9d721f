"""Input images and masks: reading files, flattening to upright RGB, resizing to the model's size."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import BadInput

# Not all of Pillow's: for EPS it runs Ghostscript.
_READABLE = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")


def load_image(path: Path) -> Image.Image:
    """Read an image file completely. Raises BadInput.

    For large photographs Pillow warns with its DecompressionBombWarning; the filter of warnings is the application's.
    """
    try:
        Image.init()  # registers AVIF, if this Pillow has it
        with Image.open(path, formats=[format for format in _READABLE if format in Image.OPEN]) as image:
            image.load()
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        assert Image.MAX_IMAGE_PIXELS is not None
        limit = Image.MAX_IMAGE_PIXELS * (1 if isinstance(error, Warning) else 2)
        raise BadInput(
            f"expected an image of at most {limit / 1e6:.0f} megapixels in {path}, found more; scale it down"
        ) from None
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        # Errors raised by Pillow itself have no strerror and may repeat the path.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no readable image"
        raise BadInput(
            f"expected an image in {path}, found: {reason}; name a PNG, JPEG or WebP file"
        ) from None


def flatten_to_rgb(image: Image.Image, background: str) -> Image.Image:
    """The image in RGB without metadata, upright by its EXIF orientation, transparent areas filled with `background`.

    Raises BadInput if it is not an image, has no pixels, or has a colour mode that Pillow cannot convert.
    """
    if not isinstance(image, Image.Image):
        raise BadInput(f"expected a PIL image, found {type(image).__name__}; open a file with PIL.Image.open")
    if not all(image.size):
        raise BadInput(f"expected an image, found one of {image.width}x{image.height} pixels")
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F":
            raise _unknown_range(upright.mode)
        if upright.mode.startswith("I"):  # convert() would clip these
            levels = np.asarray(upright).astype(np.float32)
            if levels.max() > 65535:
                raise _unknown_range(upright.mode)
            if upright.mode != "I" or levels.max() > 255:  # 16 bits, or 16-bit values stored in 32
                levels /= 257
            upright = Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8))
        rgba = upright.convert("RGBA")
    except BadInput:
        raise
    except Exception as error:  # a lazily opened file may turn out to be damaged here
        raise BadInput(
            f"expected an image that converts to RGB, found one of mode {image.mode} that does not; "
            "save it as RGB first"
        ) from error
    flattened = Image.new("RGB", rgba.size, background)
    flattened.paste(rgba, mask=rgba.getchannel("A"))
    return flattened


def _unknown_range(mode: str) -> BadInput:
    return BadInput(
        f"expected an image of 8 or 16 bits, found one of mode {mode} with unknown range; scale it to 0..255 and "
        "save it as RGB"
    )


def resize_and_crop(image: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """Resize and centre-crop an image to `size_px` = (height, width)."""
    height, width = size_px
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def resize_and_crop_mask(mask: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """Resize and centre-crop a mask to (height, width) and make it black and white. Raises BadInput if no pixel is white."""
    height, width = size_px
    grey = ImageOps.fit(mask.convert("L"), (width, height), Image.Resampling.BILINEAR)
    binary = grey.point(lambda value: 255 if value >= 128 else 0)
    if binary.getextrema() == (0, 0):
        raise BadInput(
            "expected a mask that is white where to repaint, found no pixel that is at least half white in the middle, to "
            "which images are cropped (transparent pixels count as black); invert the mask, or paint the area white"
        )
    return binary
