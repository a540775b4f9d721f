"""Image sizes are written as width x height and are (height, width) in code."""

import pytest

from tpx_runtime.errors import BadInput
from tpx_runtime.image_size import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_px"), [("512", (512, 512)), ("768x512", (512, 768)), (" 16X1024 ", (1024, 16))]
)
def test_reads_width_times_height_or_one_side(text: str, size_px: tuple[int, int]) -> None:
    assert parse_size(text) == size_px
    assert parse_size(format_size(size_px)) == size_px


def test_writes_width_times_height() -> None:
    assert format_size((512, 768)) == "768x512"


@pytest.mark.parametrize(
    "text", ["", "x", "0", "512x0", "-512", "512x", "x512", "5.5", "1x2x3", "٥١٢", "9999999"]
)
def test_rejects_other_text(text: str) -> None:
    with pytest.raises(BadInput, match=r"such as 512 or 768x512 \(width x height\), found"):
        parse_size(text)
