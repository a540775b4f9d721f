"""Images: numbers to colours, the grid, and a file that is whole, with its settings, or not there."""

import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tpx_runtime.errors import BadInput
from tpx_runtime.images import check_png_writable, grid, save_png, to_pil


def plain(colour: str, size: tuple[int, int] = (3, 2)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize(
    ("value", "level"),
    [(-1, 0), (1, 255), (0, 128), (-7, 0), (7, 255), (0.5, 191), (-1 + 0.9 / 255, 0), (-1 + 1.1 / 255, 1)],
)
def test_levels(value: float, level: int) -> None:
    pixels = np.full((3, 1, 1), value, np.float32)
    assert to_pil(pixels).getpixel((0, 0)) == (level, level, level)


def test_channels_rows_and_columns_are_where_they_belong() -> None:
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
def test_grid_is_as_square_as_can_be(count: int, size: tuple[int, int]) -> None:
    assert grid([plain("red")] * count).size == size


def test_grid_runs_row_by_row_and_leaves_the_rest_white() -> None:
    sheet = grid([plain("red"), plain("lime"), plain("blue")])
    corners = [sheet.getpixel(at) for at in ((0, 0), (3, 0), (0, 2), (5, 3))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_grid_keeps_the_metadata_of_the_first() -> None:
    first = plain("red")
    first.info["tpx"] = '{"seed": 5}'
    assert grid([first, plain("blue")]).info == {"tpx": '{"seed": 5, "num_images": 2}'}
    assert grid([first]) is first
    assert grid([plain("red"), plain("blue")]).info == {}


@settings(max_examples=50, deadline=None, database=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_metadata_comes_back(text: str) -> None:
    import tempfile

    image = plain("red")
    image.info |= {"parameters": text, "tpx": f'"{text}"', "other": "left out"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.png")
        save_png(image, path)
        with Image.open(path) as found:
            assert found.text == {"parameters": text, "tpx": f'"{text}"'}
            assert found.getpixel((0, 0)) == (255, 0, 0)


def test_saves_with_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    save_png(plain("red"), tmp_path / "a.png")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_long_name_fits(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".png")
    check_png_writable(path)
    save_png(plain("red"), path)
    assert path.is_file()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there_before", [False, True])
def test_what_fails_half_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, there_before: bool
) -> None:
    path = tmp_path / "a.png"
    if there_before:
        path.write_text("before")

    def half(self: Image.Image, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"\x89PNG half")
        raise failure

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises((BadInput, KeyboardInterrupt)) as caught:
        save_png(plain("red"), path)
    assert [entry.name for entry in tmp_path.iterdir()] == (["a.png"] if there_before else [])
    assert not there_before or path.read_text() == "before"
    if isinstance(failure, OSError):
        assert f"expected to write {path}, found: No space left on device" in str(caught.value)


def test_an_error_of_pillow_itself_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, file: Path, **_: object) -> None:
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(BadInput, match="found: encoder error -2"):
        save_png(plain("red"), tmp_path / "a.png")


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
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
def test_refuses_a_place(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(BadInput) as caught:
        check_png_writable(tmp_path / name)
    assert message in str(caught.value)


def test_refuses_a_folder_without_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root, who runs many tests, may write anywhere
    with pytest.raises(BadInput, match="found: Permission denied; choose another"):
        check_png_writable(tmp_path / "a.png")
