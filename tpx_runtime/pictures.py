"""Pictures that a user brings: read from files, turned upright, flattened, and cut to the model's size."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import BadInput


def open_picture(path: Path) -> Image.Image:
    """The picture in a file, wholly read. Raises BadInput."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a large photograph, no bomb yet
            with Image.open(path) as picture:
                picture.load()
                return picture
    except Image.DecompressionBombError:
        raise BadInput(
            f"expected a picture of at most {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels in {path}, "  # type: ignore[operator]
            "found more; scale it down"
        ) from None
    except Exception as error:  # over a damaged file Pillow's readers raise whatever they stumble on
        # Pillow's own errors have no strerror, and may repeat the path.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "none that can be read"
        raise BadInput(
            f"expected a picture in {path}, found: {reason}; name a PNG, JPEG or WebP file"
        ) from None


def flat(picture: Image.Image, background: str) -> Image.Image:
    """The picture upright, in RGB, on `background` where it is transparent; its metadata stays behind.

    Raises BadInput for what is no picture, or one of no pixels or of a colour space that Pillow does not convert.
    """
    if not isinstance(picture, Image.Image):
        raise BadInput(
            f"expected a PIL image, found {type(picture).__name__}; open a file with PIL.Image.open"
        )
    if not all(picture.size):
        raise BadInput(f"expected a picture, found one of {picture.width}x{picture.height} pixels")
    try:
        turned = ImageOps.exif_transpose(picture)
        if turned.mode == "F":
            raise _no_levels(turned.mode)
        if turned.mode.startswith("I"):  # which convert() would clip
            levels = np.asarray(turned).astype(np.float32)
            if levels.max() > 65535:
                raise _no_levels(turned.mode)
            if turned.mode != "I" or levels.max() > 255:  # of 16 bits, also where they stand in 32
                levels /= 257
            turned = Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8))
        opaque = turned.convert("RGBA")
    except BadInput:
        raise
    except Exception as error:  # a file that was opened and not yet read may be damaged anywhere
        raise BadInput(
            f"expected a picture that converts to RGB, found one of mode {picture.mode} that does not; "
            "save it as RGB first"
        ) from error
    made = Image.new("RGB", opaque.size, background)
    made.paste(opaque, mask=opaque.getchannel("A"))
    return made


def _no_levels(mode: str) -> BadInput:
    return BadInput(
        f"expected a picture of 8 or 16 bits, found one of mode {mode} whose range is not known; scale it to 0..255 and "
        "save it as RGB"
    )


def fit(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """A picture of (height, width), scaled and cropped about its middle."""
    height, width = size_px
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def fit_mask(mask: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """A mask of (height, width), black or white, scaled and cropped as `fit` does it. Raises BadInput where it is black."""
    height, width = size_px
    grey = ImageOps.fit(mask.convert("L"), (width, height), Image.Resampling.BILINEAR)
    made = grey.point(lambda value: 255 if value >= 128 else 0)
    if made.getextrema() == (0, 0):
        raise BadInput(
            "expected a mask with white where to paint, found none of it at least half white, and what is transparent "
            "counts as black; invert it, or paint it white"
        )
    return made
