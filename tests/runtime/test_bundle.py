"""Opening a bundle: any changed byte is detected, and the error names the file and the remedy."""

import os
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from tpx_runtime import bundle as bundle_module
from tpx_runtime.bundle import MANIFEST, SCHEDULER, Bundle, describe_files, hash_file, transformer_name
from tpx_runtime.errors import BundleInvalid

from .fakes import CLASSES, FAKE, THREE_ENCODERS, make_bundle, seal, without_encoder

REMEDY = "copy the bundle again or export it again"
FILES = ["transformer/weights.data", "text_encoder/model.onnx", "vae_decoder/model.onnx"]
FILES += ["vae_encoder/model.onnx", "transformer/conditions.onnx"]
FILES += ["tokenizer/vocab.json", SCHEDULER, "golden/golden.npz"]
FILES += [transformer_name(depth, variant) for depth in (1, 2, 4) for variant in ("operator", "plain")]


def open_error(root: Path, verify: bool = True) -> str:
    with pytest.raises(BundleInvalid) as caught:
        Bundle.open(root, verify)
    return str(caught.value)


def flip_a_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_opens_an_exported_bundle(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    assert sorted(bundle.manifest.files) == sorted(FILES)
    assert bundle.hash == Bundle.open(str(fake_bundle), verify=False).hash == bundle.manifest.sha256
    assert bundle.transformer(2) == fake_bundle / "transformer/depth-2.onnx"
    assert bundle.transformer(2, "plain") == fake_bundle / "transformer/depth-2.plain.onnx"
    assert bundle.conditions == fake_bundle / "transformer/conditions.onnx"
    assert bundle.schedule_shift == 3.0
    assert bundle.step is None
    assert bundle.vae_encoder == fake_bundle / "vae_encoder/model.onnx"
    (encoder,) = bundle.manifest.text_encoders
    assert bundle.text_encoder(encoder) == fake_bundle / "text_encoder/model.onnx"
    assert bundle.vocabulary(encoder) == fake_bundle / "tokenizer/vocab.json"


def test_the_vae_encoder_is_optional(fake_bundle: Path) -> None:
    without_encoder(fake_bundle)
    assert Bundle.open(fake_bundle).vae_encoder is None


@pytest.mark.parametrize(
    "name", [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
)
def test_every_text_encoder_and_tokenizer_file_is_required(three_encoders: Path, name: str) -> None:
    Bundle.open(three_encoders)
    file = "vocab.json" if name.startswith("tokenizer") else "model.onnx"
    (three_encoders / name / file).unlink()
    seal(three_encoders, THREE_ENCODERS)
    assert (
        open_error(three_encoders)
        == f"{three_encoders}: expected the file {name}/{file}, found no such entry; export it again"
    )


def test_a_class_conditional_bundle_has_no_text_encoder(classes: Path) -> None:
    bundle = Bundle.open(classes)
    assert bundle.manifest.model == CLASSES.model
    assert not any(name.startswith(("text_encoder", "tokenizer")) for name in bundle.manifest.files)


def test_folder_bytes_sums_the_files_of_a_folder(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    assert bundle.folder_bytes("transformer") == 800  # seven graphs over one file of weights
    assert bundle.folder_bytes("text_encoder") == 100
    assert bundle.folder_bytes("text") == 0


def test_a_flipped_byte_in_any_file_of_a_real_bundle_is_detected(copy: Path) -> None:
    for name in Bundle.open(copy).manifest.files:
        for position in (0, (copy / name).stat().st_size // 2, -1):
            flip_a_byte(copy / name, position)
            assert re.search(f"{re.escape(str(copy / name))}: expected SHA-256 ", open_error(copy))
            flip_a_byte(copy / name, position)
    Bundle.open(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_detected(fake_bundle: Path, name: str) -> None:
    flip_a_byte(fake_bundle / name, 50)
    assert re.fullmatch(
        f"{re.escape(str(fake_bundle / name))}: expected SHA-256 .{{12}}…, found .{{12}}…; {REMEDY}",
        open_error(fake_bundle),
    )
    Bundle.open(fake_bundle, verify=False)  # checks only sizes


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_truncated_or_longer_file_is_detected(fake_bundle: Path, name: str, verify: bool) -> None:
    data = (fake_bundle / name).read_bytes()
    for changed in (data[:-1], data + b"\n", b""):
        (fake_bundle / name).write_bytes(changed)
        assert open_error(fake_bundle, verify) == (
            f"{fake_bundle / name}: expected {len(data)} bytes, found {len(changed)}; {REMEDY}"
        )
    (fake_bundle / name).unlink()
    assert f"expected a file of {len(data)} bytes, found: No such file" in open_error(fake_bundle, verify)
    (fake_bundle / name).mkdir()
    assert f"expected a file of {len(data)} bytes, found something else" in open_error(fake_bundle, verify)


@pytest.mark.parametrize("name", FILES)
def test_a_required_file_missing_from_the_manifest_is_named(fake_bundle: Path, name: str) -> None:
    (fake_bundle / name).unlink()
    seal(fake_bundle)
    # Only the graphs refer to their weights, and the VAE encoder is optional.
    if name in ("transformer/weights.data", "vae_encoder/model.onnx"):
        Bundle.open(fake_bundle)
    else:
        assert (
            open_error(fake_bundle)
            == f"{fake_bundle}: expected the file {name}, found no such entry; export it again"
        )


def test_rejects_a_depth_that_is_not_in_the_bundle(fake_bundle: Path) -> None:
    with pytest.raises(BundleInvalid, match=r"the file transformer/depth-3\.onnx, found no such entry"):
        Bundle.open(fake_bundle).transformer(3)


def test_unlisted_files_are_ignored(fake_bundle: Path) -> None:
    (fake_bundle / "engine-cache").mkdir()
    (fake_bundle / "engine-cache/x").write_text("x")
    Bundle.open(fake_bundle)


def test_rejects_another_format_version_with_advice(fake_bundle: Path) -> None:
    text = (fake_bundle / MANIFEST).read_text()
    (fake_bundle / MANIFEST).write_text(text.replace('"version": 5', '"version": 3'))
    assert open_error(fake_bundle) == (
        f"{fake_bundle}{os.sep}manifest.json: expected format version 5, found 3; "
        "export the bundle again with this tpx, or install the tpx that wrote it"
    )


def test_a_manifest_edited_by_hand_is_detected(fake_bundle: Path) -> None:
    text = (fake_bundle / MANIFEST).read_text()
    (fake_bundle / MANIFEST).write_text(text.replace('"steps": 3', '"steps": 4'))
    assert "the file was changed after the export: restore it or export again" in open_error(fake_bundle)


def test_rejects_a_path_that_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty", "file"):
        assert open_error(tmp_path / name) == (
            f"expected a bundle (a folder with manifest.json) at {tmp_path / name}, found none; "
            "make one with `make demo` or `tpx-export`"
        )
    (tmp_path / "manifest.json").mkdir()
    assert "manifest.json: expected a file to read, found: Is a directory" in open_error(tmp_path)
    assert "found: File name too long" in open_error(tmp_path / ("n" * 300))


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_rejects_a_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(BundleInvalid, match=r"^expected the path of a bundle, found .*: .*(null|surrogates)"):
        Bundle.open(path)


def test_a_link_that_is_changed_later_does_not_change_the_bundle(fake_bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(fake_bundle)
    bundle = Bundle.open(link)
    link.unlink()
    link.symlink_to(tmp_path)
    assert bundle.conditions.parent.parent == fake_bundle.resolve() and bundle.conditions.is_file()


def test_rejects_a_manifest_that_is_not_utf8(fake_bundle: Path) -> None:
    (fake_bundle / MANIFEST).write_bytes(b"\xff\xfe")
    assert "expected UTF-8 text, found other bytes" in open_error(fake_bundle)


def test_rejects_a_file_path_outside_the_bundle(fake_bundle: Path) -> None:
    (fake_bundle.parent / "secret").write_text("x")
    text = (fake_bundle / MANIFEST).read_text().replace('"tokenizer/vocab.json"', '"../secret"')
    (fake_bundle / MANIFEST).write_text(text)
    assert "expected file paths inside the bundle, found '../secret'" in open_error(fake_bundle)


def test_the_error_names_an_unreadable_file(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(bundle_module, "hash_file", fail)
    assert f"expected a file to read, found: Input/output error; {REMEDY}" in open_error(fake_bundle)


def test_each_file_is_hashed_once_and_only_if_all_sizes_match(
    fake_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def recording_hash(path: Path) -> str:
        hashed.append(path)
        return hash_file(path)

    monkeypatch.setattr(bundle_module, "hash_file", recording_hash)
    Bundle.open(fake_bundle)
    assert sorted(hashed) == sorted(fake_bundle / name for name in FILES)
    hashed.clear()
    Bundle.open(fake_bundle, verify=False)
    (fake_bundle / "vae_encoder/model.onnx").write_bytes(b"")  # the last file in the manifest
    open_error(fake_bundle)
    assert hashed == []


def test_hashing_does_not_read_the_whole_file_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**26)
    tracemalloc.start()
    digest = hash_file(tmp_path / "large")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert digest == "3b6a07d0d404fab4e23b6d34bc6696a6a312dd92821332385e5af7c01c421351"
    assert peak_bytes < 2**21


def test_describe_files_lists_every_file_except_the_manifest(fake_bundle: Path) -> None:
    files = describe_files(fake_bundle)
    assert list(files) == sorted(FILES)
    assert files["transformer/weights.data"].bytes == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a file to read, found: No such file or directory"),
        ("", 'expected JSON with a number "shift", found none'),
        ("{}", 'expected JSON with a number "shift", found none'),
        ("[]", 'expected JSON with a number "shift", found none'),
        ('{"shift": null}', 'expected JSON with a number "shift", found none'),
        ("[" * 100_000, 'expected JSON with a number "shift", found none'),
        ('{"shift": 1' + "0" * 400 + "}", 'expected JSON with a number "shift", found none'),
        ('{"shift": 0}', "expected a shift in 0.01..100, found 0"),
        ('{"shift": -3}', "expected a shift in 0.01..100, found -3"),
        ('{"shift": NaN}', "expected a shift in 0.01..100, found nan"),
        ('{"shift": 1e300}', "expected a shift in 0.01..100, found 1e+300"),
    ],
)
def test_rejects_an_invalid_scheduler_shift(fake_bundle: Path, text: str | None, message: str) -> None:
    (fake_bundle / SCHEDULER).write_text(text or "")
    bundle = Bundle(fake_bundle, replace(FAKE, files=describe_files(fake_bundle)))
    if text is None:
        (fake_bundle / SCHEDULER).unlink()
    with pytest.raises(BundleInvalid) as caught:
        _ = bundle.schedule_shift
    assert str(caught.value) == f"{fake_bundle / SCHEDULER}: {message}"


def test_a_moved_or_rebuilt_bundle_has_the_same_hash(fake_bundle: Path, tmp_path: Path) -> None:
    identity = Bundle.open(fake_bundle).hash
    shutil.move(fake_bundle, tmp_path / "elsewhere")
    assert Bundle.open(tmp_path / "elsewhere").hash == identity
    assert Bundle.open(make_bundle(tmp_path / "again")).hash == identity


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device that never ends")
def test_a_manifest_that_never_ends_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(
        BundleInvalid, match=r"manifest\.json: expected a file to read, found: not a file of at most"
    ):
        Bundle.open(tmp_path)
