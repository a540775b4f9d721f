"""Images: conversion to pixels, the grid, and PNG files with their settings, written completely or not at all."""

import io
import json
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tpx_runtime.errors import BadInput
from tpx_runtime.images import check_png_writable, grid, save_png, to_pil


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


@settings(max_examples=50, deadline=None, database=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_metadata_survives_saving_and_opening(text: str) -> None:
    import tempfile

    image = solid("red")
    image.info |= {"parameters": text, "tpx": f'"{text}"', "other": "left out"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.png")
        save_png(image, path)
        with Image.open(path) as found:
            assert found.text == {"parameters": text, "tpx": f'"{text}"'}
            assert found.getpixel((0, 0)) == (255, 0, 0)


def test_saves_with_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    save_png(solid("red"), tmp_path / "a.png")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_saves_under_the_longest_name_allowed(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".png")
    check_png_writable(path)
    save_png(solid("red"), path)
    assert path.is_file()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_write_leaves_the_folder_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, existed: bool
) -> None:
    path = tmp_path / "a.png"
    if existed:
        path.write_text("before")

    def fail_half_way(self: Image.Image, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"\x89PNG half")
        raise failure

    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    with pytest.raises((BadInput, KeyboardInterrupt)) as caught:
        save_png(solid("red"), path)
    assert [entry.name for entry in tmp_path.iterdir()] == (["a.png"] if existed else [])
    assert not existed or path.read_text() == "before"
    if isinstance(failure, OSError):
        assert f"expected to write {path}, found: No space left on device" in str(caught.value)


def test_an_error_of_pillow_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, file: Path, **_: object) -> None:
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(BadInput, match="found: encoder error -2"):
        save_png(solid("red"), tmp_path / "a.png")


def test_check_png_writable_leaves_no_file(tmp_path: Path) -> None:
    check_png_writable(tmp_path / "a.png")
    check_png_writable(tmp_path / "a.PNG")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jpg", "expected an output name that ends in .png"),
        ("png", "expected an output name that ends in .png"),
        (".png", "expected an output name that ends in .png"),
        ("folder.png", "to be a file, found a folder; name a file in it"),
        ("missing/a.png", "to write a.png into, found none; make it"),
        ("file/a.png", "found: Not a directory; choose another"),
        ("n" * 300 + ".png", "found: File name too long; choose another"),
    ],
)
def test_check_png_writable_rejects_an_unusable_path(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(BadInput) as caught:
        check_png_writable(tmp_path / name)
    assert message in str(caught.value)


def test_check_png_writable_rejects_a_folder_without_write_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    # Simulated, because root, which often runs the tests, may write anywhere.
    monkeypatch.setattr("tempfile.TemporaryFile", deny)
    with pytest.raises(BadInput, match="found: Permission denied; choose another"):
        check_png_writable(tmp_path / "a.png")


def test_a_png_in_memory_has_the_metadata_too() -> None:
    image = Image.new("RGB", (4, 3))
    image.info["tpx"] = json.dumps({"prompt": "red cube"})
    save_png(image, memory := io.BytesIO())
    with Image.open(io.BytesIO(memory.getvalue())) as again:
        assert (again.format, again.size, again.info["tpx"]) == ("PNG", (4, 3), image.info["tpx"])


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
