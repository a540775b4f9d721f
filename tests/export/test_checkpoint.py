"""Checkpoints: written files are read back, and other files are rejected in one line."""

import io
import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tpx_export import checkpoint
from tpx_export.base.pipeline import open_base
from tpx_export.base.tensors import open_tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.mmdit import MMDiTSpec
from tpx_export.model.text_to_image import TextToImage
from tpx_runtime.errors import BadInput


def nested() -> Tensor:
    with warnings.catch_warnings():  # torch warns once that their interface may change
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])


# Entries of a state dict that are no weights.
ODD_ENTRIES: list[Any] = [
    pytest.param({3: torch.zeros(1)}, id="integer key"),
    pytest.param({"x": [1.0]}, id="list"),
    pytest.param({"x": torch.eye(2).to_sparse()}, id="sparse"),
    pytest.param({"x": nested()}, id="nested"),
    pytest.param({"x": torch.zeros(2, device="meta")}, id="meta"),
]


@pytest.fixture(params=checkpoint.SUFFIXES)
def saved(request: pytest.FixtureRequest, tiny_model: TextToImage, tmp_path: Path) -> Path:
    path = tmp_path / f"model{request.param}"
    checkpoint.save(tiny_model, path)
    return path


def load_error(path: Path) -> str:
    with pytest.raises(CheckpointInvalid) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message and "found" in message
    return message


@pytest.mark.parametrize("raised", [BadInput, KeyboardInterrupt])
def test_a_failed_write_keeps_the_existing_file(
    saved: Path, tiny_model: TextToImage, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises an error of its own, whatever the file that it writes to raises."""
    before, reason = saved.read_bytes(), "No space left on device"

    class FullDisk(io.FileIO):
        def write(self, content: object) -> int:
            raise OSError(28, reason) if raised is BadInput else raised

    def save_file(*_: object) -> None:
        raise SafetensorError(reason) if raised is BadInput else raised

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: FullDisk(path, mode))
        patch.setattr("tpx_export.tensor_files.save_file", save_file)
        with pytest.raises(raised) as caught:
            checkpoint.save(tiny_model, saved)
    if raised is BadInput:
        assert str(caught.value) == (
            f"expected to write {saved}, found: {reason}; free some space or choose another path"
        )
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_round_trip(saved: Path, tiny_model: TextToImage) -> None:
    found = checkpoint.load(saved)
    assert found.spec == tiny_model.spec
    assert not found.training
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_half_precision_on_disk_is_float32_in_memory(tiny_model: TextToImage, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    checkpoint.save(tiny_model, path, torch.float16)
    assert path.stat().st_size < 0.6 * sum(4 * value.numel() for value in tiny_model.state_dict().values())
    assert all(value.dtype == torch.float32 for value in checkpoint.load(path).state_dict().values())


def test_save_rejects_an_unknown_suffix_and_writes_nothing(tiny_model: TextToImage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.safetensors or \.pt"):
        checkpoint.save(tiny_model, tmp_path / "model.bin")
    assert list(tmp_path.iterdir()) == []


def test_rejects_a_missing_file_and_an_unknown_suffix(saved: Path, tmp_path: Path) -> None:
    assert "none" in load_error(tmp_path / "no.pt")
    assert ".bin" in load_error(saved.rename(tmp_path / "model.bin"))


def test_a_folder_is_pointed_to_base(tmp_path: Path) -> None:
    assert "found a folder; export a diffusers model with tpx-export --base" in load_error(tmp_path)


def test_a_checkpoint_given_as_a_published_model_is_pointed_to_ckpt(saved: Path) -> None:
    message = (
        f"{saved}: expected a published model, found a checkpoint of TPX; export it with tpx-export --ckpt"
    )
    with pytest.raises(CheckpointInvalid, match=re.escape(message)):
        open_base(saved)


def test_rejects_a_file_with_the_suffix_of_the_other_format(saved: Path) -> None:
    other = {".pt": ".safetensors", ".safetensors": ".pt"}[saved.suffix]
    load_error(saved.rename(saved.with_suffix(other)))


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_rejects_truncated_files(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    load_error(saved)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("evil-was-here"),)


@pytest.mark.parametrize("legacy", [True, False])
def test_rejects_a_pickle_that_would_execute_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    if legacy:
        path.write_bytes(pickle.dumps({"header": "{}", "state": Evil()}))
    else:
        torch.save({"header": "{}", "state": Evil()}, path)
    assert "would execute code" in load_error(path)
    assert not (tmp_path / "evil-was-here").exists()


def test_rejects_files_of_other_projects(tmp_path: Path) -> None:
    torch.save({"model": torch.zeros(2)}, tmp_path / "other.pt")
    assert "another project" in load_error(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "another project" in load_error(tmp_path / "list.pt")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "another project" in load_error(tmp_path / "other.safetensors")


def test_rejects_a_damaged_header_or_state(tmp_path: Path, tiny_model: TextToImage) -> None:
    torch.save({"header": "not json", "state": {}}, tmp_path / "odd.pt")
    load_error(tmp_path / "odd.pt")
    torch.save({"header": "{}", "state": []}, tmp_path / "odd.pt")
    load_error(tmp_path / "odd.pt")


@pytest.mark.parametrize("odd", ODD_ENTRIES)
def test_rejects_a_state_that_is_not_dense_tensors_by_name(
    tmp_path: Path, tiny_model: TextToImage, odd: dict[Any, object]
) -> None:
    path = tmp_path / "odd.pt"
    checkpoint.save(tiny_model, path)
    content = torch.load(path, weights_only=True)
    name = next(iter(content["state"]))
    state = content["state"] | {name if key == "x" else key: value for key, value in odd.items()}
    torch.save({**content, "state": state}, path)
    assert "found a state that is not dense tensors by name; see docs/checkpoint.md" in load_error(path)


@pytest.mark.parametrize("odd", ODD_ENTRIES)
def test_a_published_pt_file_is_rejected_likewise(tmp_path: Path, odd: dict[Any, object]) -> None:
    torch.save({"y": torch.zeros(1), **odd}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointInvalid, match="expected dense tensors by name, found something else; save"):
        open_tensors(tmp_path / "odd.pt")


def with_header_field(saved: Path, edit: str, value: object) -> Path:
    state = {"weight": torch.zeros(1)}
    header = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "spec": {}, edit: value}
    if saved.suffix == ".pt":
        torch.save({"header": json.dumps(header), "state": state}, saved)
    else:
        save_file(state, saved, metadata={"tpx": json.dumps(header)})
    return saved


def test_rejects_another_version_and_an_invalid_spec(saved: Path) -> None:
    for version in (0, 3, "2"):
        assert "version 2" in load_error(with_header_field(saved, "version", version))
    assert "specification" in load_error(with_header_field(saved, "spec", {"name": "x"}))
    assert "specification" in load_error(with_header_field(saved, "spec", None))


def with_edited_spec(saved: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Rewrite the file with the same tensors and a transformer specification that `change` edits in place."""
    return with_edited_header(saved, lambda header: change(header["spec"]["transformer"]))


def with_edited_header(saved: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The same for the whole header."""
    if saved.suffix == ".pt":
        content = torch.load(saved, weights_only=True)
        header, state = json.loads(content["header"]), content["state"]
    else:
        with safe_open(saved, framework="pt") as file:
            header = json.loads(file.metadata()["tpx"])
        state = load_file(saved)
    change(header)
    if saved.suffix == ".pt":
        torch.save({"header": json.dumps(header), "state": state}, saved)
    else:
        save_file(state, saved, metadata={"tpx": json.dumps(header)})
    return saved


def test_spec_fields_with_defaults_may_be_missing(saved: Path, tiny_model: TextToImage) -> None:
    """As in checkpoints written before these fields existed."""
    found = checkpoint.load(
        with_edited_spec(saved, lambda spec: [spec.pop(n) for n in ("dual_blocks", "qk_norm")])
    )
    assert found.spec == tiny_model.spec


@pytest.mark.parametrize("explicit", [True, False])
def test_reads_version_1_where_sizes_were_one_number(
    saved: Path, tiny_model: TextToImage, explicit: bool
) -> None:
    """The shipped sample checkpoints are of this version. Its size could be left out if it was the default."""

    def as_version_1(header: dict[str, Any]) -> None:
        header["version"] = 1
        if explicit:
            header["spec"]["autoencoder"]["image_size_px"] = 64
            header["spec"]["transformer"]["latent_size"] = 8
        else:
            del header["spec"]["transformer"]["latent_size"]

    found = checkpoint.load(with_edited_header(saved, as_version_1)).spec
    assert found.transformer.latent_size == ((8, 8) if explicit else MMDiTSpec.latent_size)
    assert found.autoencoder == tiny_model.spec.autoencoder


def test_rejects_sizes_that_do_not_agree_or_fit_in_memory(saved: Path) -> None:
    def disagreeing(header: dict[str, Any]) -> None:
        header["version"] = 1
        header["spec"]["autoencoder"]["image_size_px"] = 128
        header["spec"]["transformer"]["latent_size"] = 8

    original = saved.read_bytes()
    assert "expected image_size_px 64, found 128" in load_error(with_edited_header(saved, disagreeing))
    saved.write_bytes(original)
    huge = with_edited_spec(saved, lambda spec: spec.update(latent_size=[2**21, 2**21]))
    assert "expected a model specification, found an invalid one" in load_error(huge)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("spec", [None, [], {"autoencoder": 3}, {"autoencoder": {}, "transformer": "x"}])
def test_rejects_a_malformed_spec_of_either_version(saved: Path, version: int, spec: object) -> None:
    edited = with_edited_header(saved, lambda header: header.update(version=version, spec=spec))
    assert "expected a model specification" in load_error(edited)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("latent_size", 8, "to be tuple[int, int], found 8"),
        ("latent_size", [8, 7], "latent_size divisible by patch"),
        ("rope", True, "rope"),
        ("width", "64", "int, found '64'"),
        ("width", 64.5, "int, found 64.5"),
        ("heads", True, "int, found True"),
        ("qk_norm", 1, "bool, found 1"),
        ("dual_blocks", 1, "tuple"),
        ("dual_blocks", ["0"], "int, found '0'"),
        ("dual_blocks", [7], "within 0..2"),
        ("thinking", [], "ThinkingSpec"),
        ("heads", 0, "heads of 1 or more"),
        ("patch", 0, "patch of 1 or more"),
        ("width", -64, "width of 1 or more"),
        ("width", 66, "width divisible by 4"),
        ("width", 1 << 20, "of another shape"),
        ("width", 1 << 40, "an invalid one"),
        ("width", 1 << 80, "an invalid one"),
    ],
)
def test_rejects_unknown_and_invalid_spec_fields(saved: Path, field: str, value: object, named: str) -> None:
    assert named in load_error(with_edited_spec(saved, lambda spec: spec.update({field: value})))


@pytest.mark.parametrize(
    ("part", "field", "value", "named"),
    [
        ("text_encoder", "heads", 3, "width divisible by heads"),
        ("text_encoder", "heads", 0, "heads of 1 or more"),
        ("text_encoder", "layers", 0, "layers in 1..1000, got 0"),
        ("text_encoder", "layers", 10**9, "layers in 1..1000, got 1000000000"),
        ("transformer", "blocks", 1001, "blocks in 1..1000, got 1001"),
        ("autoencoder", "scale", 0, "a scale other than 0"),
        ("autoencoder", "widths", [16, 16, -8], "widths that are multiples of 8"),
        ("defaults", "depth", 4, r"a default depth in 1..3 (the model's), got 4"),
    ],
)
def test_rejects_invalid_fields_of_other_specs(
    saved: Path, part: str, field: str, value: object, named: str
) -> None:
    edited = with_edited_header(saved, lambda header: header["spec"][part].update({field: value}))
    assert named in load_error(edited)


def test_rejects_a_license_that_no_manifest_can_hold(saved: Path) -> None:
    edited = with_edited_header(saved, lambda header: header["spec"].update(license="a\ud800"))
    assert "expected a license of printable characters" in load_error(edited)


def test_rejects_a_deeply_nested_header(saved: Path, tiny_model: TextToImage) -> None:
    deep, state = "[" * 100_000, {"weight": torch.zeros(1)}
    if saved.suffix == ".pt":
        torch.save({"header": deep, "state": state}, saved)
    else:
        save_file(state, saved, metadata={"tpx": deep})
    assert "damaged" in load_error(saved)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.float64])
def test_rejects_weights_of_another_type(saved: Path, tiny_model: TextToImage, dtype: torch.dtype) -> None:
    checkpoint.save(tiny_model, saved, dtype)
    assert f"expected weights in float32, float16 or bfloat16, found {dtype} in" in load_error(saved)


def test_rejects_missing_unknown_misshapen_and_nan_tensors(saved: Path, tiny_model: TextToImage) -> None:
    for change in ("drop", "add", "shape", "nan"):
        state = {name: value.clone() for name, value in tiny_model.state_dict().items()}
        name = next(iter(state))
        if change == "drop":
            del state[name]
        elif change == "add":
            state["extra"] = torch.zeros(1)
        elif change == "shape":
            state[name] = state[name][:1]
        else:
            state[name].view(-1)[0] = float("nan")
        path = saved.with_name("changed.pt")
        checkpoint.save(tiny_model, path)
        content = torch.load(path, weights_only=True)
        torch.save({**content, "state": state}, path)
        assert ("extra" if change == "add" else name) in load_error(path)
