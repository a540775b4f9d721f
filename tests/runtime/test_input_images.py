"""Input images from users: of any size, mode and orientation, damaged, or not images at all."""

import io
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tpx_runtime.bundle import Bundle
from tpx_runtime.cli import info, run
from tpx_runtime.editing import to_pixels
from tpx_runtime.errors import BadInput
from tpx_runtime.generator import Generator, ImageResized
from tpx_runtime.image_files import save_image
from tpx_runtime.input_images import flatten_to_rgb, load_image, resize_and_crop, resize_and_crop_mask

from .fakes import FakeEngine

SIZE = (8, 12)  # height, width of the fake bundle's images
ORIENTATION = 0x0112  # the EXIF tag
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


@pytest.fixture
def generator(fake_bundle: Path) -> Generator:
    return Generator(Bundle.open(fake_bundle), FakeEngine())  # type: ignore[arg-type]


def ramp() -> Image.Image:
    """12 x 8 pixels, each of another colour."""
    rows, columns = np.mgrid[:8, :12]
    return Image.fromarray(np.stack([rows * 30, columns * 20, rows * 10 + columns], axis=2).astype(np.uint8))


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


# Any image that Pillow reads


def test_an_image_of_the_models_size_is_unchanged(generator: Generator) -> None:
    np.testing.assert_array_equal(np.asarray(generator.edit(ramp()).image), np.asarray(ramp()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_is_converted_to_rgb(generator: Generator, mode: str) -> None:
    source = ramp().convert("L").convert("RGBA").convert("P").convert("PA") if mode == "PA" else ramp()
    edit = generator.edit(source.convert(mode))
    assert (edit.image.mode, edit.image.size) == ("RGB", (12, 8))
    assert edit.latents.shape == (1, 4, 2, 3)


def test_grey_levels_are_kept(generator: Generator) -> None:
    grey = ramp().convert("L")
    found = np.asarray(generator.edit(grey).image)
    for channel in range(3):
        np.testing.assert_array_equal(found[..., channel], np.asarray(grey))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bit_levels_are_scaled_to_eight_bits_and_not_clipped(dtype: type) -> None:
    image = Image.fromarray((np.arange(0, 256).reshape(16, 16) * 257).astype(dtype))
    assert image.mode.startswith("I")
    np.testing.assert_array_equal(
        np.asarray(flatten_to_rgb(image, "white"))[..., 0], np.arange(256).reshape(16, 16)
    )
    if dtype is np.uint16:  # the type that PNG files can have
        assert flatten_to_rgb(Image.open(saved(image)), "white").getpixel((15, 15)) == WHITE


def test_eight_bit_levels_in_a_32_bit_image_are_kept() -> None:
    levels = np.arange(0, 256).reshape(16, 16)
    converted = flatten_to_rgb(Image.fromarray(levels.astype(np.int32)), "white")
    np.testing.assert_array_equal(np.asarray(converted)[..., 0], levels)


def test_transparent_pixels_get_the_background_colour() -> None:
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    for background, colour in (("white", WHITE), ("black", BLACK)):
        flattened = flatten_to_rgb(image, background)
        assert (flattened.getpixel((0, 0)), flattened.getpixel((1, 0))) == (RED, colour)
    palette = Image.open(saved(image.convert("P"), transparency=b"\x00" * 256))
    assert flatten_to_rgb(palette, "white").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda pixels: pixels),
        (2, lambda pixels: pixels[:, ::-1]),
        (3, lambda pixels: pixels[::-1, ::-1]),
        (4, lambda pixels: pixels[::-1]),
        (5, lambda pixels: pixels.transpose(1, 0, 2)),
        (6, lambda pixels: np.rot90(pixels, -1)),
        (7, lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1]),
        (8, lambda pixels: np.rot90(pixels)),
    ],
)
def test_the_exif_orientation_is_applied(orientation: int, turn: Any) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    photo = Image.open(saved(ramp(), exif=exif))
    assert photo.getexif()[ORIENTATION] == orientation
    np.testing.assert_array_equal(np.asarray(flatten_to_rgb(photo, "white")), turn(np.asarray(ramp())))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (12, 80), (120, 8), (5, 7), (1200, 800)])
def test_every_size_is_resized_and_cropped_around_the_centre(
    generator: Generator, width: int, height: int
) -> None:
    input_image = Image.new("RGB", (width, height), RED)
    if width * 8 > height * 12:  # too wide: columns outside the central 3:2 area are cropped
        kept = height * 12 / 8
        for x in range(width):
            if abs(x + 0.5 - width / 2) > kept / 2 + 0.5:
                input_image.paste(BLACK, (x, 0, x + 1, height))
    message = f"the input image of {width}x{height} pixels is resized and cropped to the model's 12x8"
    with pytest.warns(ImageResized, match=message):
        found = np.asarray(generator.edit(input_image).image)
    assert found.shape == (8, 12, 3)
    np.testing.assert_array_equal(found[1:-1, 2:-2], np.broadcast_to(RED, (6, 8, 3)))


def test_the_crop_is_exactly_centred() -> None:
    stripes = np.zeros((8, 36, 3), np.uint8)
    stripes[:, 12:24] = RED
    found = np.asarray(resize_and_crop(Image.fromarray(stripes), SIZE))
    np.testing.assert_array_equal(found, np.broadcast_to(RED, (8, 12, 3)))


def test_to_pixels_scales_levels_to_minus_one_to_one() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    pixels = to_pixels(image)
    assert (pixels.shape, pixels.dtype) == ((1, 3, 2, 3), np.float32)
    np.testing.assert_allclose(pixels[0, :, 0, 0], [-1, 1, -0.6], atol=1e-6)


def test_metadata_of_the_input_image_is_not_in_the_result(generator: Generator, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "camera of a person"
    source = Image.open(saved(ramp(), "JPEG", exif=exif, icc_profile=b"profile", dpi=(300, 300)))
    assert {"exif", "icc_profile"} <= set(source.info)
    mask = Image.new("L", (12, 8))
    mask.paste(255, (0, 0, 4, 8))
    (image,) = generator("red cube", image=source, mask=mask)
    assert set(image.info) == {"tpx", "parameters"}
    save_image(image, tmp_path / "a.png")
    assert b"camera of a person" not in (tmp_path / "a.png").read_bytes()
    with Image.open(tmp_path / "a.png") as written:
        assert set(written.info) == {"tpx", "parameters"}


# Masks


def test_a_mask_is_thresholded_to_black_or_white() -> None:
    mask = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    np.testing.assert_array_equal(np.asarray(resize_and_crop_mask(mask, (1, 4))), [[0, 0, 255, 255]])


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "LA"])
def test_a_mask_may_have_any_mode(generator: Generator, mode: str) -> None:
    mask = Image.new("L", (12, 8))
    mask.paste(255, (0, 0, 6, 8))
    edit = generator.edit(ramp(), mask.convert(mode))
    assert edit.mask is not None
    np.testing.assert_array_equal(np.asarray(edit.mask), np.asarray(mask))
    assert edit.latent_mask is not None
    np.testing.assert_array_equal(edit.latent_mask, [[[[True, True, False]] * 2]])


def test_transparent_pixels_of_a_mask_are_black(generator: Generator) -> None:
    mask = Image.new("RGBA", (12, 8), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 4, 8))
    edit = generator.edit(ramp(), mask)
    assert edit.mask is not None
    assert np.asarray(edit.mask).mean(0).tolist() == [255] * 4 + [0] * 8


@pytest.mark.parametrize("size", [(12, 8), (48, 16), (6, 2), (480, 480)])
def test_a_mask_of_any_size_covers_the_whole_image(generator: Generator, size: tuple[int, int]) -> None:
    """The image is 48 x 16, of which the central half is used; the left third of the mask is white."""
    input_image, mask = Image.new("RGB", (48, 16), RED), Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 3, size[1]))
    with pytest.warns(ImageResized):
        edit = generator.edit(input_image, mask)
    assert edit.mask is not None
    columns = np.asarray(edit.mask).mean(0)
    assert columns[0] == 255
    assert columns[3:].tolist() == [0] * 9


def test_the_warning_of_a_resized_image_points_at_the_application(generator: Generator) -> None:
    with pytest.warns(ImageResized) as direct:
        generator.edit(Image.new("RGB", (30, 30)))
    with pytest.warns(ImageResized) as indirect:
        generator("red cube", image=Image.new("RGB", (30, 30)))
    assert [warning.filename for warning in (*direct, *indirect)] == [__file__] * 2


def test_a_mask_applies_to_the_image_after_exif_rotation(generator: Generator) -> None:
    """The upright image is 8 x 12, and the mask refers to it."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo = Image.open(saved(Image.new("RGB", (12, 8), RED), exif=exif))
    mask = Image.new("L", (8, 12))
    mask.paste(255, (0, 0, 4, 12))
    with pytest.warns(ImageResized, match="the input image of 8x12 pixels"):
        edit = generator.edit(photo, mask)
    assert edit.mask is not None
    assert np.asarray(edit.mask).mean(0).tolist() == [255] * 6 + [0] * 6


def test_rejects_a_black_mask_before_opening_a_graph(generator: Generator) -> None:
    for mask in (Image.new("L", (12, 8), 0), Image.new("L", (12, 8), 127), Image.new("RGBA", (12, 8))):
        with pytest.raises(
            BadInput, match="a mask that is white where to repaint, found no pixel that is at least half"
        ):
            generator.edit(ramp(), mask)
    assert generator.engine.opened == []  # type: ignore[attr-defined]


# Invalid images


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("photo.png", "expected a PIL image, found str; open a file with PIL.Image.open"),
        (np.zeros((8, 8, 3), np.uint8), "expected a PIL image, found ndarray"),
        (Image.new("RGB", (0, 5)), "expected an image, found one of 0x5 pixels"),
        (Image.new("RGB", (5, 0)), "expected an image, found one of 5x0 pixels"),
    ],
)
def test_rejects_a_value_that_is_not_an_image(generator: Generator, image: Any, message: str) -> None:
    for arguments in ((image,), (ramp(), image)):
        with pytest.raises(BadInput) as caught:
            generator.edit(*arguments)
        assert message in str(caught.value)


def test_rejects_an_open_image_that_cannot_be_decoded(generator: Generator) -> None:
    data = saved(ramp().resize((300, 200))).getvalue()
    with pytest.raises(BadInput, match="expected an image that converts to RGB"):
        generator.edit(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_load_image_reads_a_file(tmp_path: Path) -> None:
    ramp().save(tmp_path / "a.webp", lossless=True)
    opened = load_image(tmp_path / "a.webp")
    (tmp_path / "a.webp").unlink()  # the image was read, not only opened
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(ramp()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.png", "No such file or directory"),
        ("folder.png", "Is a directory"),
        ("text.png", "no readable image"),
        ("empty.png", "no readable image"),
        ("half.png", "no readable image"),
        ("half.jpg", "no readable image"),
        ("half.webp", "no readable image"),
        ("bomb.png", "no readable image"),
    ],
)
def test_load_image_rejects_a_file_that_is_not_an_image_in_one_line(
    tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for format in ("png", "jpeg", "webp"):
        data = saved(noise, format).getvalue()
        (tmp_path / f"half.{format.replace('jpeg', 'jpg')}").write_bytes(data[: len(data) // 2])
    head = saved(noise).getvalue()
    huge = (100_000).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(head[:16] + huge * 2 + head[24:])  # its header claims 10^10 pixels
    with pytest.raises(BadInput) as caught:
        load_image(tmp_path / name)
    expected = f"expected an image in {tmp_path / name}, found: {reason}; name a PNG, JPEG or WebP file"
    assert str(caught.value) == expected


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_gives_an_image_or_bad_input(generator: Generator, tmp_path: Path, seed: int) -> None:
    rng, exif = np.random.default_rng(seed), Image.Exif()
    exif[ORIENTATION] = 6
    format = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "TGA", "PPM")[seed % 8]
    data = bytearray(
        saved(ramp(), format, **({} if format in ("TGA", "PPM", "BMP") else {"exif": exif})).getvalue()
    )
    for position in rng.integers(0, len(data), 6):
        data[position] = rng.integers(256)
    (tmp_path / "file").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow may warn about damage that it tolerates
        with suppress(BadInput):
            assert generator.edit(load_image(tmp_path / "file")).image.size == (12, 8)


def test_large_photographs_are_left_to_the_filter_of_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow warns above this and rejects twice as much.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    Image.new("L", (1200, 1000)).save(path := tmp_path / "a.png")
    filters = list(warnings.filters)
    with pytest.warns(Image.DecompressionBombWarning):
        assert load_image(path).size == (1200, 1000)
    message = r"expected an image of at most 1 megapixels in .*a\.png, found more"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadInput, match=message):
            load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    with pytest.raises(BadInput, match=message):
        load_image(path)
    assert warnings.filters == filters


def test_commands_read_large_photographs_without_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    image = ramp()
    image.info["tpx"] = '{"prompt": "a red cube"}'
    save_image(image, path := tmp_path / "a.png")
    with warnings.catch_warnings():
        result = CliRunner().invoke(run, ["--like", str(path), "--bundle", str(tmp_path / "none")])
        assert (result.exit_code, "megapixels" in result.stderr) == (3, False)
    result = CliRunner().invoke(info, [str(path)])
    assert (result.exit_code, result.stderr) == (0, "") and "a red cube" in result.stdout


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.linspace(0, 1, 96, dtype=np.float32).reshape(8, 12)),
        Image.fromarray(np.full((8, 12), 1 << 30, np.int32)),
    ],
    ids=["float", "32-bit"],
)
def test_rejects_levels_of_an_unknown_range(image: Image.Image) -> None:
    with pytest.raises(
        BadInput,
        match=f"expected an image of 8 or 16 bits, found one of mode {image.mode} with unknown range",
    ):
        flatten_to_rgb(image, "white")


def test_no_other_program_reads_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript for EPS, whatever a file is called."""
    path, calls = tmp_path / "photo.png", list[Any]()
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **_: calls.append(args))
    with pytest.raises(BadInput, match="found: no readable image; name a PNG, JPEG or WebP file"):
        load_image(path)
    assert calls == []


def test_the_first_image_of_a_process_may_have_any_format(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp")
    code = "import sys; from pathlib import Path; from tpx_runtime.input_images import load_image"
    command = [sys.executable, "-c", f"{code}; load_image(Path(sys.argv[1]))", str(tmp_path / "a.webp")]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_common_formats_are_read_under_any_name(format: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "photo", format=format)
    assert flatten_to_rgb(load_image(tmp_path / "photo"), "black").getpixel((3, 3)) == WHITE
