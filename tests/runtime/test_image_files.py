"""Image files: PNG, JPEG and WebP with the settings of their images, written completely or not at all."""

import io
import json
import os
import stat
import tempfile
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from tpx_runtime.errors import BadInput
from tpx_runtime.image_files import FORMATS, check_image_writable, save_image, stored_settings


def solid(colour: str, size: tuple[int, int] = (16, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_suffix_chooses_the_format(tmp_path: Path, suffix: str) -> None:
    for name in (f"a{suffix}", f"b{suffix.upper()}"):
        save_image(solid("red"), tmp_path / name)
        with Image.open(tmp_path / name) as found:
            assert found.format == FORMATS[suffix]
            pixel = found.convert("RGB").getpixel((3, 4))
            assert isinstance(pixel, tuple)
            assert max(abs(a - b) for a, b in zip(pixel, (255, 0, 0), strict=True)) <= 2


def test_colours_of_a_jpeg_are_not_subsampled(tmp_path: Path) -> None:
    stripes = Image.new("RGB", (16, 8), "red")
    for x in range(0, 16, 2):
        stripes.paste("blue", (x, 0, x + 1, 8))
    save_image(stripes, tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as found:
        left, right = found.getpixel((0, 0)), found.getpixel((1, 0))
    assert isinstance(left, tuple) and isinstance(right, tuple)
    assert left[2] > 220 and left[0] < 40 and right[0] > 220 and right[2] < 40


@settings(max_examples=50, deadline=None, database=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")), st.sampled_from(list(FORMATS)))
def test_settings_survive_saving_and_opening(text: str, suffix: str) -> None:
    image = solid("red")
    image.info |= {"parameters": text, "tpx": json.dumps(text), "other": "left out"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        save_image(image, path)
        with Image.open(path) as found:
            assert stored_settings(found) == json.dumps(text)
            if suffix == ".png":
                assert found.text == {"parameters": text, "tpx": json.dumps(text)}  # type: ignore[attr-defined]
            else:
                comment = found.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
                assert comment == b"UNICODE\0" + text.encode("utf-16-be")


def test_an_image_without_settings_has_none(tmp_path: Path) -> None:
    for suffix in FORMATS:
        save_image(solid("red"), tmp_path / f"a{suffix}")
        with Image.open(tmp_path / f"a{suffix}") as found:
            assert stored_settings(found) is None
    damaged = solid("red")
    damaged.info["exif"] = b"Exif\0\0II*\0\xff\xff\xff\x7f"
    assert stored_settings(damaged) is None


def test_a_jpeg_that_cannot_hold_its_settings_is_refused(tmp_path: Path) -> None:
    image = solid("red")
    image.info["tpx"] = "x" * 70_000
    with pytest.raises(
        BadInput, match=r"expected an image to write as JPEG, found: EXIF data is too long; save it as PNG"
    ):
        save_image(image, tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []
    file = BytesIO()
    with pytest.raises(BadInput, match="EXIF data is too long"):
        save_image(image, file, format="jpg")
    assert file.getvalue() == b""


def test_a_mode_that_a_png_cannot_hold_is_refused() -> None:
    with pytest.raises(
        BadInput, match=r"expected an image to write as PNG, found: .*CMYK.*; convert it to RGB"
    ):
        save_image(Image.new("CMYK", (2, 2)), BytesIO())


def test_any_path_decides_the_format_and_other_objects_are_refused(tmp_path: Path) -> None:
    with os.scandir(tmp_path) as entries:
        assert list(entries) == []
    (tmp_path / "a.jpg").touch()
    [entry] = os.scandir(tmp_path)
    save_image(solid("red"), entry)
    assert (tmp_path / "a.jpg").read_bytes().startswith(b"\xff\xd8")
    for other in (None, 3, b"a.png"):
        with pytest.raises(BadInput, match="expected a path or a binary file object to write to, found"):
            save_image(solid("red"), other)  # type: ignore[arg-type]


def test_errors_of_a_file_object_are_its_own() -> None:
    class Full(BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_image(solid("red"), Full())


def test_an_image_in_memory_has_its_settings_too() -> None:
    image = solid("red")
    image.info["tpx"] = json.dumps({"prompt": "red cube"})
    for format, found in (("png", "PNG"), ("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP")):
        save_image(image, memory := io.BytesIO(), format=format)
        with Image.open(io.BytesIO(memory.getvalue())) as again:
            assert (again.format, again.size) == (found, image.size)
            assert stored_settings(again) == image.info["tpx"]
    save_image(image, memory := io.BytesIO())
    assert memory.getvalue().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match=r"expected a format of .png, .jpg, .jpeg or .webp, found 'GIF'"):
        save_image(image, io.BytesIO(), format="GIF")


def test_quality_is_that_of_jpeg_and_webp(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    for suffix in (".jpg", ".webp"):
        for quality in (20, 95):
            save_image(noise, tmp_path / f"{quality}{suffix}", quality=quality)
        save_image(noise, tmp_path / f"default{suffix}")
        low, high, default = ((tmp_path / f"{name}{suffix}").read_bytes() for name in (20, 95, "default"))
        assert len(low) < len(high) / 2 and default == high
    with pytest.raises(BadInput, match=r"expected quality to be a whole number in 1..100, found 101"):
        save_image(noise, tmp_path / "a.jpg", quality=101)


def test_a_jpeg_of_an_image_with_transparency_is_refused(tmp_path: Path) -> None:
    save_image(Image.new("L", (8, 8)), tmp_path / "grey.jpg")
    with pytest.raises(
        BadInput, match="expected an image in RGB or grey for a JPEG, found mode RGBA; convert it"
    ):
        save_image(Image.new("RGBA", (8, 8)), tmp_path / "a.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["grey.jpg"]


def test_saves_with_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    save_image(solid("red"), tmp_path / "a.png")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_saves_under_the_longest_name_allowed(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".png")
    check_image_writable(path)
    save_image(solid("red"), path)
    assert path.is_file()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_write_leaves_the_folder_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, existed: bool
) -> None:
    path = tmp_path / "a.png"
    if existed:
        path.write_text("before")

    def fail_half_way(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:20])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", fail_half_way)
    with pytest.raises((BadInput, KeyboardInterrupt)) as caught:
        save_image(solid("red"), path)
    assert [entry.name for entry in tmp_path.iterdir()] == (["a.png"] if existed else [])
    assert not existed or path.read_text() == "before"
    if isinstance(failure, OSError):
        assert f"expected to write {path}, found: No space left on device" in str(caught.value)


def test_an_error_of_pillow_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, file: Path, **_: object) -> None:
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(BadInput, match="found: encoder error -2"):
        save_image(solid("red"), tmp_path / "a.png")


def test_check_image_writable_leaves_no_file(tmp_path: Path) -> None:
    check_image_writable(tmp_path / "a.png")
    check_image_writable(tmp_path / "a.PNG")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.gif", "expected an output name that ends in .png, .jpg, .jpeg or .webp, found "),
        ("png", "expected an output name that ends in .png"),
        (".png", "expected an output name that ends in .png"),
        ("folder.png", "to be a file, found a folder; name a file in it"),
        ("folder", "to be a file, found a folder; name a file in it"),
        ("missing/a.png", "to write a.png into, found none; make it"),
        ("file/a.png", "found: Not a directory; choose another"),
        ("n" * 300 + ".png", "found: File name too long; choose another"),
    ],
)
def test_check_image_writable_rejects_an_unusable_path(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(BadInput) as caught:
        check_image_writable(tmp_path / name)
    assert message in str(caught.value)


def test_check_image_writable_rejects_a_folder_without_write_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    # Simulated, because root, which often runs the tests, may write anywhere.
    monkeypatch.setattr("tpx_runtime.files.try_writing_into", deny)
    with pytest.raises(BadInput, match="found: Permission denied; choose another"):
        check_image_writable(tmp_path / "a.png")


def test_the_suffixes_can_be_limited(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"ends in .png, found .*a.jpg"):
        check_image_writable(tmp_path / "a.jpg", (".png",))


def test_a_jpeg_leaves_out_the_readable_text_if_only_the_settings_fit(tmp_path: Path) -> None:
    image = solid("red")
    image.info |= {"tpx": "x" * 30_000, "parameters": "y" * 17_000}
    save_image(image, tmp_path / "a.jpg")
    image.info["parameters"] = "y" * 17_600
    save_image(image, tmp_path / "b.jpg")
    save_image(image, tmp_path / "b.webp")
    for name, comments in (("a.jpg", 1), ("b.jpg", 0), ("b.webp", 1)):
        with Image.open(tmp_path / name) as found:
            assert stored_settings(found) == "x" * 30_000
            exif = found.getexif().get_ifd(ExifTags.IFD.Exif)
            assert (ExifTags.Base.UserComment in exif) == bool(comments), name
