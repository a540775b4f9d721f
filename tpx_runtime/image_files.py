"""Image files with the settings of their images, in the places where other programs look for such texts.

| | `parameters`: human-readable text | `tpx`: JSON |
|---|---|---|
| PNG | text chunk of that name | text chunk of that name |
| JPEG, WebP | Exif's UserComment | Exif's MakerNote |
"""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from PIL import ExifTags, Image, PngImagePlugin

from .errors import BadInput, shorten
from .files import atomic_file, check_writable, remedy
from .settings import check_int

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by suffix
DEFAULT_QUALITY = 95
_PARAMETERS, _TPX = "parameters", "tpx"  # in the `info` of an image, and in PNG files
# Bytes of texts. A JPEG has one segment of 65,533 bytes for all of its Exif.
_MOST_EXIF = {"JPEG": 65_000, "WEBP": 2**30}
_UNICODE = b"UNICODE\0"  # Exif 2.32, UserComment: the text's encoding


def check_image_writable(path: Path, suffixes: Sequence[str] = tuple(FORMATS)) -> None:
    """Raise BadInput unless the name has one of the suffixes and a file can be created there."""
    if not os.path.isdir(path):  # for a folder, check_writable has the better message
        _require_suffix(path, suffixes)
    check_writable(path)


def save_image(
    image: Image.Image,
    file: str | os.PathLike[str] | IO[bytes],
    replace: bool = True,
    format: str = "png",
    quality: int = DEFAULT_QUALITY,
) -> None:
    """Write a PNG, JPEG or WebP with the settings in its `info`: to a path, atomically, or to a binary file object.

    A path's suffix decides the format; `format` ("png", "jpg", "jpeg" or "webp") is that of a file object. `quality`, 1 to
    100, is that of JPEG and WebP. Raises BadInput, FileExistsError if the file exists and `replace` is false, and the errors
    of a file object.
    """
    quality = check_int("quality", quality, 1, 100)
    if isinstance(file, str | os.PathLike):
        path = Path(file)
        _require_suffix(path, tuple(FORMATS))
        data = _encode(image, FORMATS[path.suffix.lower()], quality)
        try:
            with atomic_file(path, replace) as part:
                part.write_bytes(data)
        except FileExistsError:
            raise
        except (OSError, ValueError) as error:
            reason, advice = getattr(error, "strerror", None) or error, remedy(error, "choose another place")
            raise BadInput(f"expected to write {path}, found: {reason}; {advice}") from error
        return
    suffix = f".{format}".lower()
    if suffix not in FORMATS:
        raise BadInput(f"expected a format of {_listed([*FORMATS])}, found {shorten(format)}")
    if not hasattr(file, "write"):
        raise BadInput(f"expected a path or a binary file object to write to, found {shorten(file)}")
    file.write(_encode(image, FORMATS[suffix], quality))


def stored_settings(image: Image.Image) -> str | None:
    """The JSON with the settings of an image, in memory or from a file that `save_image` wrote; None if it has none."""
    if isinstance(text := image.info.get(_TPX), str):
        return text
    try:
        note = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.MakerNote)
    except Exception:  # Pillow raises many kinds of errors for damaged Exif
        return None
    return note.decode("utf-8", "replace") if isinstance(note, bytes) else None


def _require_suffix(path: Path, suffixes: Sequence[str]) -> None:
    if path.suffix.lower() not in suffixes:
        raise BadInput(f"expected an output name that ends in {_listed(suffixes)}, found {path}")


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _encode(image: Image.Image, format: str, quality: int) -> bytes:
    """The content of an image file. Raises BadInput for what the format cannot hold."""
    texts = {key: str(image.info[key]) for key in (_PARAMETERS, _TPX) if key in image.info}
    options: dict[str, Any] = {"pnginfo": _png_chunks(texts)}
    if format != "PNG":
        options = {"exif": _exif(texts, _MOST_EXIF[format]), "quality": quality}
    if format == "JPEG":
        options["subsampling"] = "4:4:4"
        if image.mode not in ("RGB", "L"):
            raise BadInput(
                f"expected an image in RGB or grey for a JPEG, found mode {image.mode}; convert it, or save it as .png"
            )
    encoded = BytesIO()
    try:
        image.save(encoded, format=format, **options)
    except (OSError, ValueError) as error:  # another mode, or, in a JPEG, more than 64 KiB of Exif
        other = "convert it to RGB" if format == "PNG" else "save it as PNG"
        raise BadInput(f"expected an image to write as {format}, found: {error}; {other}") from error
    return encoded.getvalue()


def _png_chunks(texts: dict[str, str]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    return chunks


def _exif(texts: dict[str, str], most_bytes: int) -> Image.Exif:
    """The texts as Exif; the human-readable one is left out if both together are longer than `most_bytes`."""
    tags: dict[int, bytes] = {}
    if _TPX in texts:
        tags[ExifTags.Base.MakerNote] = texts[_TPX].encode()
    if _PARAMETERS in texts:
        comment = _UNICODE + texts[_PARAMETERS].encode("utf-16-be", "replace")
        if len(comment) + len(tags.get(ExifTags.Base.MakerNote, b"")) <= most_bytes:
            tags[ExifTags.Base.UserComment] = comment
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = tags  # assigned: what is added to get_ifd's result is lost in Pillow 10
    return exif
