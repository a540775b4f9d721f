"""Image files with the settings of their images, in the places where other programs look for such texts.

| | `parameters`: human-readable text | `tpx`: JSON |
|---|---|---|
| PNG | text chunk of that name | text chunk of that name |
| JPEG, WebP | Exif's UserComment | Exif's MakerNote |
"""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from PIL import ExifTags, Image, PngImagePlugin

from .errors import BadInput, shorten
from .files import atomic_file, check_writable

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by suffix
_QUALITY: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"quality": 95},
}
_PARAMETERS, _TPX = "parameters", "tpx"  # in the `info` of an image, and in PNG files
_UNICODE = b"UNICODE\0"  # Exif 2.32, UserComment: the text's encoding


def check_image_writable(path: Path, suffixes: Sequence[str] = tuple(FORMATS)) -> None:
    """Raise BadInput unless the name has one of the suffixes and a file can be created there."""
    if path.suffix.lower() not in suffixes:
        raise BadInput(f"expected an output name that ends in {' or '.join(suffixes)}, found {path}")
    check_writable(path)


def save_image(
    image: Image.Image, file: str | Path | IO[bytes], replace: bool = True, format: str = "PNG"
) -> None:
    """Write a PNG, JPEG or WebP with the settings in its `info`: to a path, atomically, or to a binary file object.

    A path's suffix decides the format, and `format` that of a file object. JPEG and WebP are written in quality 95. Raises
    BadInput, and FileExistsError if the file exists and `replace` is false.
    """
    if not isinstance(file, str | Path):
        if format not in _QUALITY:
            raise BadInput(f"expected a format of {', '.join(_QUALITY)}, found {shorten(format)}")
        _write(image, file, format)
        return
    path = Path(file)
    if path.suffix.lower() not in FORMATS:
        raise BadInput(f"expected an output name that ends in {' or '.join(FORMATS)}, found {path}")
    try:
        with atomic_file(path, replace) as part:
            _write(image, part, FORMATS[path.suffix.lower()])
    except FileExistsError:
        raise
    except ValueError as error:  # a JPEG holds at most 64 KiB of Exif
        raise BadInput(f"expected to write {path}, found: {error}; save it as .png") from error
    except OSError as error:
        reason = error.strerror or error  # errors raised by Pillow itself have no strerror
        raise BadInput(f"expected to write {path}, found: {reason}; choose another place") from error


def stored_settings(image: Image.Image) -> str | None:
    """The JSON with the settings of an image, in memory or from a file that `save_image` wrote; None if it has none."""
    if isinstance(text := image.info.get(_TPX), str):
        return text
    try:
        note = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.MakerNote)
    except Exception:  # Pillow raises many kinds of errors for damaged Exif
        return None
    return note.decode("utf-8", "replace") if isinstance(note, bytes) else None


def _write(image: Image.Image, file: Path | IO[bytes], format: str) -> None:
    texts = {key: str(image.info[key]) for key in (_PARAMETERS, _TPX) if key in image.info}
    metadata = {"pnginfo": _png_chunks(texts)} if format == "PNG" else {"exif": _exif(texts)}
    image.save(file, format=format, **_QUALITY[format], **metadata)


def _png_chunks(texts: dict[str, str]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    return chunks


def _exif(texts: dict[str, str]) -> Image.Exif:
    exif = Image.Exif()
    tags = exif.get_ifd(ExifTags.IFD.Exif)
    if _PARAMETERS in texts:
        tags[ExifTags.Base.UserComment] = _UNICODE + texts[_PARAMETERS].encode("utf-16-be", "replace")
    if _TPX in texts:
        tags[ExifTags.Base.MakerNote] = texts[_TPX].encode()
    return exif
