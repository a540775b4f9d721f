"""Opening a bundle: any byte that is not as exported is found, named, and told how to mend."""

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

from .fakes import CLASSES, PAPER, THREE, make_bundle, seal, without_encoder

MEND = "copy the bundle again or export it again"
FILES = ["transformer/weights.data", "text_encoder/model.onnx", "vae_decoder/model.onnx"]
FILES += ["vae_encoder/model.onnx", "transformer/conditions.onnx"]
FILES += ["tokenizer/vocab.json", SCHEDULER, "golden/golden.npz"]
FILES += [transformer_name(depth, one) for depth in (1, 2, 4) for one in ("operator", "plain")]


def refusal(root: Path, verify: bool = True) -> str:
    with pytest.raises(BundleInvalid) as caught:
        Bundle.open(root, verify)
    return str(caught.value)


def flip_a_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_opens_what_was_exported(paper: Path) -> None:
    bundle = Bundle.open(paper)
    assert sorted(bundle.manifest.files) == sorted(FILES)
    assert bundle.hash == Bundle.open(str(paper), verify=False).hash == bundle.manifest.sha256
    assert bundle.transformer(2) == paper / "transformer/depth-2.onnx"
    assert bundle.transformer(2, "plain") == paper / "transformer/depth-2.plain.onnx"
    assert bundle.conditions == paper / "transformer/conditions.onnx"
    assert bundle.schedule_shift == 3.0
    assert bundle.step is None
    assert bundle.vae_encoder == paper / "vae_encoder/model.onnx"
    (encoder,) = bundle.manifest.text_encoders
    assert bundle.text_encoder(encoder) == paper / "text_encoder/model.onnx"
    assert bundle.vocabulary(encoder) == paper / "tokenizer/vocab.json"


def test_a_bundle_may_lack_the_encoder_of_images(paper: Path) -> None:
    without_encoder(paper)
    assert Bundle.open(paper).vae_encoder is None


@pytest.mark.parametrize(
    "name", [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
)
def test_every_text_encoder_and_tokenizer_must_be_there(three: Path, name: str) -> None:
    Bundle.open(three)
    file = "vocab.json" if name.startswith("tokenizer") else "model.onnx"
    (three / name / file).unlink()
    seal(three, THREE)
    assert refusal(three) == f"{three}: expected the file {name}/{file}, found no such entry; export it again"


def test_a_model_of_classes_has_no_text_encoder(classes: Path) -> None:
    bundle = Bundle.open(classes)
    assert bundle.manifest.model == CLASSES.model
    assert not any(name.startswith(("text_encoder", "tokenizer")) for name in bundle.manifest.files)


def test_weighs_a_folder(paper: Path) -> None:
    bundle = Bundle.open(paper)
    assert bundle.weight_bytes("transformer") == 800  # seven graphs over one file of weights
    assert bundle.weight_bytes("text_encoder") == 100
    assert bundle.weight_bytes("text") == 0


def test_a_real_bundle_opens_and_any_flipped_byte_in_it_is_found(copy: Path) -> None:
    for name in Bundle.open(copy).manifest.files:
        for position in (0, (copy / name).stat().st_size // 2, -1):
            flip_a_byte(copy / name, position)
            assert re.search(f"{re.escape(str(copy / name))}: expected SHA-256 ", refusal(copy))
            flip_a_byte(copy / name, position)
    Bundle.open(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(paper: Path, name: str) -> None:
    flip_a_byte(paper / name, 50)
    assert re.fullmatch(
        f"{re.escape(str(paper / name))}: expected SHA-256 .{{12}}…, found .{{12}}…; {MEND}", refusal(paper)
    )
    Bundle.open(paper, verify=False)  # which looks at sizes alone


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_truncated_or_longer_file_is_found(paper: Path, name: str, verify: bool) -> None:
    data = (paper / name).read_bytes()
    for other in (data[:-1], data + b"\n", b""):
        (paper / name).write_bytes(other)
        assert refusal(paper, verify) == (
            f"{paper / name}: expected {len(data)} bytes, found {len(other)}; {MEND}"
        )
    (paper / name).unlink()
    assert f"expected a file of {len(data)} bytes, found: No such file" in refusal(paper, verify)
    (paper / name).mkdir()
    assert f"expected a file of {len(data)} bytes, found something else" in refusal(paper, verify)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_manifest_forgot_is_named_before_any_work(paper: Path, name: str) -> None:
    (paper / name).unlink()
    seal(paper)
    # Only the graphs know of their weights, and not every bundle can start from an image.
    if name in ("transformer/weights.data", "vae_encoder/model.onnx"):
        Bundle.open(paper)
    else:
        assert refusal(paper) == f"{paper}: expected the file {name}, found no such entry; export it again"


def test_a_graph_of_another_depth_is_not_in_the_bundle(paper: Path) -> None:
    with pytest.raises(BundleInvalid, match=r"the file transformer/depth-3\.onnx, found no such entry"):
        Bundle.open(paper).transformer(3)


def test_a_file_beside_the_listed_ones_changes_nothing(paper: Path) -> None:
    (paper / "engine-cache").mkdir()
    (paper / "engine-cache/x").write_text("x")
    Bundle.open(paper)


def test_another_version_is_refused_with_a_way_out(paper: Path) -> None:
    text = (paper / MANIFEST).read_text()
    (paper / MANIFEST).write_text(text.replace('"version": 5', '"version": 3'))
    assert refusal(paper) == (
        f"{paper}{os.sep}manifest.json: expected format version 5, found 3; "
        "export the bundle again with this tpx, or install the tpx that wrote it"
    )


def test_a_manifest_changed_by_hand_is_found(paper: Path) -> None:
    text = (paper / MANIFEST).read_text()
    (paper / MANIFEST).write_text(text.replace('"steps": 3', '"steps": 4'))
    assert "the file was changed after the export: restore it or export again" in refusal(paper)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty", "file"):
        assert refusal(tmp_path / name) == (
            f"expected a bundle (a folder with manifest.json) at {tmp_path / name}, found none; "
            "make one with `make demo` or `tpx-export`"
        )
    (tmp_path / "manifest.json").mkdir()
    assert "manifest.json: expected a file to read, found: Is a directory" in refusal(tmp_path)
    assert "found: File name too long" in refusal(tmp_path / ("n" * 300))


def test_a_manifest_of_other_bytes_is_refused(paper: Path) -> None:
    (paper / MANIFEST).write_bytes(b"\xff\xfe")
    assert "expected UTF-8 text, found other bytes" in refusal(paper)


def test_a_path_out_of_the_bundle_is_refused_although_its_hash_is_right(paper: Path) -> None:
    (paper.parent / "secret").write_text("x")
    text = (paper / MANIFEST).read_text().replace('"tokenizer/vocab.json"', '"../secret"')
    (paper / MANIFEST).write_text(text)
    assert "expected file paths inside the bundle, found '../secret'" in refusal(paper)


def test_an_unreadable_file_is_named(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(bundle_module, "hash_file", fail)
    assert f"expected a file to read, found: Input/output error; {MEND}" in refusal(paper)


def test_every_file_is_hashed_once_and_none_before_all_sizes_are_right(
    paper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def count(path: Path) -> str:
        hashed.append(path)
        return hash_file(path)

    monkeypatch.setattr(bundle_module, "hash_file", count)
    Bundle.open(paper)
    assert sorted(hashed) == sorted(paper / name for name in FILES)
    hashed.clear()
    Bundle.open(paper, verify=False)
    (paper / "vae_encoder/model.onnx").write_bytes(b"")  # the last in order
    refusal(paper)
    assert hashed == []


def test_hashing_holds_no_file_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**26)
    tracemalloc.start()
    found = hash_file(tmp_path / "large")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == "3b6a07d0d404fab4e23b6d34bc6696a6a312dd92821332385e5af7c01c421351"
    assert peak_bytes < 2**21


def test_describes_every_file_but_the_manifest(paper: Path) -> None:
    files = describe_files(paper)
    assert list(files) == sorted(FILES)
    assert files["transformer/weights.data"].bytes == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
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
def test_refuses_a_schedule(paper: Path, text: str, message: str) -> None:
    (paper / SCHEDULER).write_text(text)
    with pytest.raises(BundleInvalid) as caught:
        _ = Bundle(paper, replace(PAPER, files=describe_files(paper))).schedule_shift
    assert str(caught.value) == f"{paper / SCHEDULER}: {message}"


def test_a_moved_bundle_is_the_same_bundle(paper: Path, tmp_path: Path) -> None:
    identity = Bundle.open(paper).hash
    shutil.move(paper, tmp_path / "elsewhere")
    assert Bundle.open(tmp_path / "elsewhere").hash == identity
    assert Bundle.open(make_bundle(tmp_path / "again")).hash == identity
