"""Image sizes as text, WIDTHxHEIGHT in pixels. In code a size is (height, width), like the shape of an array."""

import re

from .errors import BadInput, shorten


def format_size(size_px: tuple[int, int]) -> str:
    """(height, width) -> WIDTHxHEIGHT."""
    height, width = size_px
    return f"{width}x{height}"


def parse_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT, or one number for a square, -> (height, width). Raises BadInput."""
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text.strip(), re.ASCII | re.IGNORECASE)
    if not found or not (width := int(found[1])) or not (height := int(found[2] or found[1])):
        raise BadInput(
            f"expected an image size in pixels such as 512 or 768x512 (width x height), found {shorten(text)}"
        )
    return height, width
