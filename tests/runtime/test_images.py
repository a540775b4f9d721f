"""Images: conversion to pixels, and the grid."""

import json

import numpy as np
import pytest
from PIL import Image

from tpx_runtime.images import grid, to_pil


def solid(colour: str, size: tuple[int, int] = (3, 2)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize(
    ("value", "level"),
    [(-1, 0), (1, 255), (0, 128), (-7, 0), (7, 255), (0.5, 191), (-1 + 0.9 / 255, 0), (-1 + 1.1 / 255, 1)],
)
def test_values_are_scaled_and_clipped_to_levels(value: float, level: int) -> None:
    pixels = np.full((3, 1, 1), value, np.float32)
    assert to_pil(pixels).getpixel((0, 0)) == (level, level, level)


def test_channels_rows_and_columns_keep_their_places() -> None:
    pixels = np.full((3, 2, 5), -1, np.float32)
    pixels[0, 0, 4] = 1  # red, top right
    pixels[2, 1, 0] = 1  # blue, bottom left
    image = to_pil(pixels)
    assert image.size == (5, 2)
    assert image.getpixel((4, 0)) == (255, 0, 0)
    assert image.getpixel((0, 1)) == (0, 0, 255)
    assert image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("count", "size"), [(1, (3, 2)), (2, (6, 2)), (3, (6, 4)), (4, (6, 4)), (5, (9, 4)), (10, (12, 6))]
)
def test_grid_is_as_square_as_possible(count: int, size: tuple[int, int]) -> None:
    assert grid([solid("red")] * count).size == size


def test_grid_is_filled_row_by_row_and_the_rest_is_white() -> None:
    sheet = grid([solid("red"), solid("lime"), solid("blue")])
    corners = [sheet.getpixel(at) for at in ((0, 0), (3, 0), (0, 2), (5, 3))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_grid_of_one_image_is_that_image() -> None:
    first = solid("red")
    assert grid([first]) is first


def test_a_grid_has_metadata_only_if_it_can_be_generated_again() -> None:
    def image(seed: int, prompt: str = "red cube") -> Image.Image:
        made = Image.new("RGB", (4, 3))
        made.info.update(tpx=json.dumps({"prompt": prompt, "seed": seed}), parameters="text")
        return made

    facts = grid([image(5), image(6), image(7)]).info
    assert json.loads(facts["tpx"]) == {"prompt": "red cube", "seed": 5, "num_images": 3}
    assert facts["parameters"] == "text"
    for images in (
        [image(5), image(1)],
        [image(5), image(6, "blue cube")],
        [image(5), Image.new("RGB", (4, 3))],
    ):
        assert grid(images).info == {}
