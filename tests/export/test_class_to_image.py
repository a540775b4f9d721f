"""Class-to-image checkpoints: saved, read, exported, used for generation, and rejected if invalid."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_tiny_classes

from tpx_export import checkpoint
from tpx_export.exporter import export_bundle
from tpx_export.model import (
    ClassToImage,
    TextToImage,
)
from tpx_export.pipeline import Pipeline
from tpx_runtime.generator import Generator

CLASSES = 5


@pytest.fixture(scope="module")
def model() -> ClassToImage:
    return make_tiny_classes(CLASSES)


@pytest.mark.parametrize("suffix", checkpoint.SUFFIXES)
def test_round_trip(model: ClassToImage, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    checkpoint.save(model, path)
    found = checkpoint.load(path)
    assert isinstance(found, ClassToImage)
    assert found.spec == model.spec
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def _with_header(path: Path, header: dict[str, object]) -> Path:
    save_file(load_file(path), path, metadata={"tpx": json.dumps(header)})
    return path


def _read_header(path: Path) -> dict[str, object]:
    with safe_open(path, framework="pt") as file:
        header: dict[str, object] = json.loads(file.metadata()["tpx"])
    return header


def test_header_without_a_model_field_loads_as_text_to_image(tiny_model: TextToImage, tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    checkpoint.save(tiny_model, path)
    header = _read_header(path)
    assert header.pop("model") == "text-to-image"
    assert isinstance(checkpoint.load(_with_header(path, header)), TextToImage)


@pytest.mark.parametrize("kind", ["video", 3, ["text-to-image"]])
def test_rejects_an_unknown_kind_of_model(model: ClassToImage, tmp_path: Path, kind: object) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(model, path)
    with pytest.raises(
        checkpoint.CheckpointInvalid, match="expected a model of text-to-image, class-to-image"
    ):
        checkpoint.load(_with_header(path, {**_read_header(path), "model": kind}))


def test_rejects_a_spec_with_different_latent_channels(model: ClassToImage) -> None:
    with pytest.raises(ValueError, match="expected latent_channels 8 as in the transformer, got 4"):
        dataclasses.replace(
            model.spec, transformer=dataclasses.replace(model.spec.transformer, latent_channels=8)
        )


def test_rejects_millions_of_blocks_and_a_license_that_no_manifest_can_hold(model: ClassToImage) -> None:
    for blocks in (0, 1001):
        with pytest.raises(ValueError, match=rf"expected blocks in 1\.\.1000, got {blocks}"):
            dataclasses.replace(model.spec.transformer, blocks=blocks)
    with pytest.raises(ValueError, match="expected a license of printable characters"):
        dataclasses.replace(model.spec, license="a\nb")


def test_bundle_generates_the_same_latents_as_pytorch(model: ClassToImage, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_bundle(Pipeline.from_model(model), out)
    generator = Generator.load(out, "onnxruntime")
    assert generator.manifest.model.classes == CLASSES
    assert generator.manifest.model.out_channels == 4
    schedule = json.loads((out / "scheduler/scheduler_config.json").read_text())
    # DDPM's variance for a model that predicts none.
    assert schedule["variance_type"] == "fixed_large"
    (job,) = generator.plan(class_id=3, seed=5, guidance=1.0, steps=1)
    latents = generator.generate_latents([job])
    # One DDIM step from pure noise at t = 999 gives x0, which depends on epsilon only.
    from tpx_runtime.noise import batch_noise

    noise = torch.from_numpy(batch_noise([5], (4, 8, 8)))
    epsilon, _ = model.transformer(noise, torch.tensor([999.0]), torch.tensor([3]), 2)
    alpha_bar = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)))
    expected = (noise - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5
    scale = float(expected.abs().max())
    assert np.abs(latents - expected.numpy()).max() < 1e-4 * scale
