"""TAESD imported from folders of diffusers' AutoencoderTiny, compared with it, and in place of a model's own autoencoder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from foreign_parity import TIGHT, randomise, relative, run_onnx
from safetensors.torch import save_file
from test_base_pipeline import PROMPT, diffusers_image, psnr, single_file, write_dit
from test_base_vae import edit_config, noise, random_images

from benchmarks import decoders
from benchmarks.tiny_sd3 import save_pipeline
from tpx_export.base.pipeline import open_base
from tpx_export.base.vae import load_vae
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.cli import main
from tpx_export.exporter import export_bundle
from tpx_export.graphs import DecoderGraph, EncoderGraph
from tpx_export.model.autoencoder_tiny import AutoencoderTiny, AutoencoderTinySpec
from tpx_runtime.generator import Generator
from tpx_runtime.manifest import LatentSpec

pytestmark = pytest.mark.usefixtures("without_gradients_or_warnings")

# The first has the tiny SD3's factor of 2 pixels per latent.
KINDS: dict[str, dict[str, Any]] = {
    "16 channels": {
        "latent_channels": 16,
        "encoder_block_out_channels": (24, 24),
        "decoder_block_out_channels": (24, 24),
        "num_encoder_blocks": (1, 2),
        "num_decoder_blocks": (3, 1),
    },
    "4 channels, scaled": {
        "encoder_block_out_channels": (16, 16, 16),
        "decoder_block_out_channels": (16, 16, 16),
        "num_encoder_blocks": (1, 3, 2),
        "num_decoder_blocks": (2, 3, 1),
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    },
}


def reference_vae(kind: str = "16 channels") -> Any:
    import diffusers

    model = diffusers.AutoencoderTiny(**KINDS[kind]).eval()
    randomise(model)
    return model


@pytest.fixture(params=KINDS)
def vae(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A model of diffusers, and the folder in which it is saved."""
    model = reference_vae(request.param)
    model.save_pretrained(tmp_path / "vae")
    return model, tmp_path / "vae"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference_vae().save_pretrained(tmp_path / "taesd")
    return tmp_path / "taesd"


def latents(model: Any, batch: int) -> torch.Tensor:
    """Twice the usual range, so that the decoder's limit matters."""
    return 2 * noise(batch, model.config.latent_channels, 8, 8)


def test_matches_diffusers_in_pytorch_and_onnx_at_any_batch_size(vae: tuple[Any, Path]) -> None:
    reference, folder = vae
    model = load_vae(folder)
    scale, shift = reference.config.scaling_factor, reference.config.shift_factor
    stages = len(reference.config.num_decoder_blocks)
    assert (model.spec.scale, model.spec.shift, model.spec.factor) == (scale, shift, 2 ** (stages - 1))
    images, z = random_images(2), latents(reference, 2)
    assert relative(model.encode(images), (reference.encode(images).latents - shift) * scale) < TIGHT
    assert relative(model.decode(z), reference.decode(z / scale + shift).sample.clamp(-1, 1)) < TIGHT
    feeds = [latents(reference, batch) for batch in (1, 3)]
    for z, (image,) in zip(
        feeds, run_onnx(DecoderGraph(model), "latents", latents(reference, 2), ("image",), feeds), strict=True
    ):
        assert relative(image, reference.decode(z).sample.clamp(-1, 1)) < TIGHT
    feeds = [random_images(batch) for batch in (1, 3)]
    for images, (mean,) in zip(
        feeds, run_onnx(EncoderGraph(model), "image", random_images(2), ("latents",), feeds), strict=True
    ):
        assert relative(mean, reference.encode(images).latents) < TIGHT


def test_the_default_is_taesd3() -> None:
    import diffusers

    with torch.device("meta"):
        ours, theirs = AutoencoderTiny(AutoencoderTinySpec()), diffusers.AutoencoderTiny(latent_channels=16)
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (ours, theirs)]
    assert shapes[0] == shapes[1] and sum(shape.numel() for shape in shapes[0].values()) == 2_458_899


def test_files_of_the_halves_beside_the_model_are_not_taken_for_it(folder: Path) -> None:
    save_file({"1.weight": torch.ones(2)}, folder / "taesd3_decoder.safetensors")
    load_vae(folder)


@pytest.mark.slow
def test_replaces_the_autoencoder_of_stable_diffusion(folder: Path, tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "base", "sd3-medium")
    pipeline.vae = reference_vae()
    expected = diffusers_image(pipeline, PROMPT, "", num_inference_steps=4, guidance_scale=7.0)
    pipeline.save_pretrained(tmp_path / "with-taesd")
    for base, vae in ((tmp_path / "base", folder), (tmp_path / "with-taesd", None)):
        bundle = tmp_path / f"{base.name}-bundle"
        export_bundle(open_base(base, vae=vae), bundle)
        [image] = Generator.load(bundle, engine="onnxruntime")(PROMPT, seed=3, steps=4)
        assert psnr(np.asarray(image, np.float64), expected) >= 50 and expected.std() > 5


def test_replaces_the_autoencoder_of_single_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pipeline(tmp_path / "base", "sd3.5-medium")
    monkeypatch.setattr("tpx_export.base.text_encoders._HEAD_WIDTH", 8)
    file = single_file(tmp_path / "base", tmp_path / "with its own.safetensors")
    pipeline = open_base(file, tmp_path / "base", (32, 32), vae=folder)
    assert isinstance(pipeline.autoencoder(), AutoencoderTiny) and pipeline.latent == LatentSpec(1.0, 0.0)
    write_dit(tmp_path)
    reference_vae("4 channels, scaled").save_pretrained(tmp_path / "other")
    for components in (None, tmp_path, tmp_path / "vae"):
        pipeline = open_base(tmp_path / "dit.pt", components, vae=tmp_path / "other")
        assert isinstance(pipeline.autoencoder(), AutoencoderTiny)
        assert pipeline.latent == LatentSpec(0.5, 0.25)
    assert pipeline.model.image_size_px == (32, 32)


def test_the_benchmark_has_a_row_for_each_bundle(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(decoders.main, [*[str(tiny_bundle)] * 2, "--rounds", "2"])
    rows = [line.split(" | ") for line in result.stdout.splitlines()[2:]]
    assert result.exit_code == 0 and [row[:2] for row in rows] == [[f"| {tiny_bundle.name}", "64x64"]] * 2
    assert all(float(row[2]) > 0 and int(row[5].rstrip(" |")) > 50 for row in rows)


def test_command_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    save_pipeline(tmp_path / "base", "sd3-medium")
    shutil.copytree(folder, tmp_path / "other")
    edit_config(tmp_path / "other", latent_channels=4)
    for arguments, message in (
        (
            ("--ckpt", tmp_path / "x.safetensors", "--vae", folder),
            "--vae only with --base, found it with --ckpt",
        ),
        (
            ("--base", tmp_path / "base", "--vae", tmp_path / "no"),
            "no: expected a model, found nothing there",
        ),
        (("--base", tmp_path / "base", "--vae", tmp_path), "expected .safetensors files, found none"),
        (("--base", tmp_path / "base", "--vae", tmp_path / "other"), "latent channels 16, found a VAE of 4"),
    ):
        command = [*map(str, arguments), "--out", str(tmp_path / "bundle")]
        result = CliRunner().invoke(main, command)
        assert result.exit_code in (2, 6) and message in result.stderr and result.stderr.count("\n") == 1
        assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "silu"}, "act_fn relu, found 'silu'"),
        ({"upsample_fn": "bilinear"}, "upsample_fn nearest, found 'bilinear'"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor 2, found 4"),
        ({"in_channels": 4}, "in_channels 3, found 4"),
        ({"num_decoder_blocks": [3]}, "as many num_decoder_blocks as num_encoder_blocks, up to 8"),
        ({"num_decoder_blocks": [1] * 9, "num_encoder_blocks": [1] * 9}, "up to 8"),
        ({"num_decoder_blocks": [3, 1000]}, "up to 100 blocks per stage, found 1000"),
        ({"num_encoder_blocks": 3}, "positive integers num_encoder_blocks"),
        ({"decoder_block_out_channels": [24, 32]}, r"equal block_out_channels, found \[24, 32\]"),
        ({"scaling_factor": -1.0}, "scaling_factor above 0, found -1.0"),
        ({"num_decoder_blocks": [3, 2]}, "that do not fit"),
    ],
)
def test_rejects_an_invalid_config_in_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "AutoencoderTiny"
    edit_config(folder, **changes)
    with pytest.raises(CheckpointInvalid, match=message) as caught:
        load_vae(folder)
    assert "\n" not in str(caught.value)
