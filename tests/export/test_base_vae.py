"""SD3 and SD1 autoencoders imported from folders and single files, compared with diffusers."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_parity import TIGHT, randomise, relative, run_onnx, same_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from tpx_export.base.tensors import Tensors, open_tensors
from tpx_export.base.vae import VAE, load_vae, vae_from_tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.graphs import DecoderGraph, EncoderGraph
from tpx_export.model import autoencoder_kl
from tpx_export.model.autoencoder_kl import Attention, AutoencoderKL, AutoencoderKLSpec, GroupNorm
from tpx_export.precision import in_float32

PIXELS = 32
KINDS: dict[str, dict[str, Any]] = {
    "sd3": {
        "block_out_channels": (32, 64),
        "latent_channels": 16,
        "layers_per_block": 2,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    "sd1": {"block_out_channels": (32, 32, 64), "latent_channels": 4, "layers_per_block": 1},
}
FACTORS = {"sd3": 2, "sd1": 4}
SCALES = {"sd3": (1.5305, 0.0609), "sd1": (0.18215, 0.0)}


@pytest.fixture(autouse=True, scope="module")
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def reference_vae(kind: str, **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    config = KINDS[kind] | changes
    stages = len(config["block_out_channels"])
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        sample_size=PIXELS,
        **config,
    ).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module", params=KINDS)
def vae(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """The kind of autoencoder, a model of diffusers, and the folder in which it is saved."""
    model, folder = reference_vae(request.param), tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.fixture
def sd1(tmp_path: Path) -> Path:
    reference_vae("sd1").save_pretrained(tmp_path / "sd1")
    return tmp_path / "sd1"


def noise(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def random_images(batch: int) -> Tensor:
    return noise(batch, 3, PIXELS, PIXELS).clamp(-1, 1)


def latents(kind: str, batch: int) -> Tensor:
    size = PIXELS // FACTORS[kind]
    return noise(batch, KINDS[kind]["latent_channels"], size, size)


def original(state: dict[str, Tensor], stages: int) -> dict[str, Tensor]:
    """A diffusers state with the names and shapes of the original latent diffusion files."""
    found = {}
    for name, value in state.items():
        for old, new in (
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("downsamplers.0.", "downsample."),
            ("upsamplers.0.", "upsample."),
            ("resnets", "block"),
            ("down_blocks", "down"),
            *((f"up_blocks.{i}.", f"up.{stages - 1 - i}.") for i in range(stages)),
        ):
            name = name.replace(old, new)
        found[name] = value[:, :, None, None] if "attn_1" in name and value.ndim == 2 else value
    return found


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; ... removes a field."""
    config = json.loads((folder / "config.json").read_text()) | changes
    fields = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))


def test_encoder_and_decoder_match_diffusers(vae: tuple[str, Any, Path]) -> None:
    kind, reference, folder = vae
    model = load_vae(folder)
    mean, log_variance = model.encoder(random_images(2))
    posterior = reference.encode(random_images(2)).latent_dist
    assert relative(mean, posterior.mean) < TIGHT
    assert relative(log_variance, posterior.logvar) < TIGHT
    assert relative(model.decoder(latents(kind, 2)), reference.decode(latents(kind, 2)).sample) < TIGHT


def test_encode_and_decode_shift_and_scale_latents(vae: tuple[str, Any, Path]) -> None:
    kind, reference, folder = vae
    model = load_vae(folder)
    scale, shift = SCALES[kind]
    assert (model.spec.scale, model.spec.shift) == (scale, shift)
    assert model.spec.factor == FACTORS[kind]
    z = reference.encode(random_images(2)).latent_dist.mean
    assert relative(model.encode(random_images(2)), (z - shift) * scale) < TIGHT
    image = reference.decode(latents(kind, 2) / scale + shift).sample.clamp(-1, 1)
    assert relative(model.decode(latents(kind, 2)), image) < TIGHT


def test_onnx_graphs_match_diffusers_at_any_batch_size(vae: tuple[str, Any, Path]) -> None:
    kind, reference, folder = vae
    model = load_vae(folder)
    feeds = [latents(kind, 1), latents(kind, 3)]
    outputs = run_onnx(DecoderGraph(model), "latents", latents(kind, 2), ("image",), feeds)
    for z, (image,) in zip(feeds, outputs, strict=True):
        assert relative(image, reference.decode(z).sample.clamp(-1, 1)) < TIGHT
    images = [random_images(1), random_images(3)]
    outputs = run_onnx(EncoderGraph(model), "image", random_images(2), ("latents",), images)
    for image, (mean,) in zip(images, outputs, strict=True):
        assert relative(mean, reference.encode(torch.as_tensor(image)).latent_dist.mean) < TIGHT


def test_float16_weights_are_near_float32_and_can_compute_in_it(sd1: Path) -> None:
    full, half = load_vae(sd1), load_vae(sd1).half()
    z = latents("sd1", 2)
    expected = full.decoder(z)
    assert relative(half.decoder(z.half()), expected) < 1e-2
    ((image,),) = run_onnx(DecoderGraph(half), "latents", z, ("image",), [z])
    assert relative(image, expected.clamp(-1, 1)) < 2e-2
    with in_float32(half):
        exact = half.decoder(z)
    assert torch.equal(exact, half.float().decoder(z))


@pytest.mark.parametrize("prefix", [VAE, ""])
def test_original_single_file_is_bit_identical(
    vae: tuple[str, Any, Path], tmp_path: Path, prefix: str
) -> None:
    _, reference, folder = vae
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    state = original(reference.state_dict(), len(reference.config.block_out_channels))
    converted = convert_ldm_vae_checkpoint({VAE + n: v for n, v in state.items()}, reference.config)
    # diffusers reads the same original names.
    assert converted.keys() == reference.state_dict().keys()
    tensors = {prefix + name: value.contiguous() for name, value in state.items()}
    tensors[f"{prefix}loss.logvar"] = torch.zeros(())
    save_file(tensors, tmp_path / "vae.safetensors")
    model = vae_from_tensors(open_tensors(tmp_path / "vae.safetensors").with_prefix(prefix))
    assert model.spec == load_vae(folder).spec
    assert same_state(model, load_vae(folder))


def test_attention_with_pre_2023_names_is_bit_identical(sd1: Path, tmp_path: Path) -> None:
    state = load_file(sd1 / "diffusion_pytorch_model.safetensors")
    old_state = {}
    for name, value in state.items():
        for new_name, old_name in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            name = name.replace(new_name, old_name)
        old_state[name] = value
    save_file(old_state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((sd1 / "config.json").read_text())
    assert same_state(load_vae(tmp_path), load_vae(sd1))


def test_config_without_newer_fields_has_the_defaults_of_sd1(sd1: Path) -> None:
    spec = load_vae(sd1).spec
    newer = ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv", "latents_mean")
    edit_config(sd1, **dict.fromkeys((*newer, "latents_std", "mid_block_add_attention"), ...))
    assert load_vae(sd1).spec == spec
    assert spec.quant and (spec.scale, spec.shift) == (0.18215, 0.0)


def test_model_is_the_same_from_shards_and_from_an_fp16_variant(tmp_path: Path) -> None:
    reference = reference_vae("sd3")
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole = load_vae(tmp_path / "whole")
    assert same_state(load_vae(tmp_path / "shards"), whole)
    reference.half().save_pretrained(tmp_path / "half", variant="fp16")
    half = load_vae(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert same_state(half, whole.half())


def test_chunked_attention_equals_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = Attention(64, 32), noise(2, 64, 8, 8)
    randomise(attention)
    expected = attention(x)
    # Three chunks of the 64 queries, the last one smaller.
    monkeypatch.setattr(autoencoder_kl, "_MAX_QUERIES", 24)
    assert relative(attention(x), expected) < TIGHT
    ((found,),) = run_onnx(attention, "x", x, ("y",), [x])
    assert relative(found, expected) < TIGHT


def test_group_norm_of_large_images_is_accurate_in_onnx_runtime() -> None:
    x = noise(1, 16, 512, 512) + 3
    ((found,),) = run_onnx(GroupNorm(4, 16), "x", torch.cat([x, x]), ("y",), [x])
    # With InstanceNormalization the error would be 1e-5.
    assert relative(found, F.group_norm(x.double(), 4, eps=1e-6)) < 1.5e-6


def test_error_names_missing_and_unknown_tensors(sd1: Path) -> None:
    path = sd1 / "diffusion_pytorch_model.safetensors"
    state, missing = load_file(path), "decoder.up_blocks.1.resnets.0.conv1.bias"
    state["surprise.weight"] = state.pop(missing)
    save_file(state, path)
    with pytest.raises(CheckpointInvalid, match=f"{missing} missing; surprise.weight unknown"):
        load_vae(sd1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "VQModel"}, "_class_name AutoencoderKL or AutoencoderTiny, found 'VQModel'"),
        ({"act_fn": "relu"}, "act_fn silu, found 'relu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention True, found False"),
        ({"latents_mean": [0.0]}, "latents_mean None"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv True, found False"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "up_block_types"),
        ({"block_out_channels": [32, 40, 64]}, "block_out_channels divisible by 32"),
        ({"block_out_channels": 32}, "positive integers block_out_channels"),
        ({"block_out_channels": []}, "positive integers block_out_channels"),
        ({"norm_num_groups": 0}, "norm_num_groups in 1"),
        ({"scaling_factor": 0}, "scaling_factor above 0"),
        ({"shift_factor": True}, "a number shift_factor"),
        ({"layers_per_block": 2}, r"found \d+ that do not fit: .* missing; .*; and \d+ more$"),
        ({"latent_channels": 8}, r"encoder\.conv_out\.weight gives \[8, 64, 3, 3\], not \[16, 64, 3, 3\]"),
    ],
)
def test_rejects_an_invalid_config_in_one_line(sd1: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(sd1, **changes)
    with pytest.raises(CheckpointInvalid, match=message) as caught:
        load_vae(sd1)
    assert "\n" not in str(caught.value)


def test_rejects_single_files_of_other_models(sd1: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointInvalid, match=r"decoder\.conv_in\.weight, found none"):
        vae_from_tensors(open_tensors(tmp_path / "other.safetensors"))
    with pytest.raises(CheckpointInvalid, match=r"encoder\.down\.0\.block\.0\.conv2\.weight, found none"):
        # A folder of diffusers, whose names are others.
        vae_from_tensors(open_tensors(sd1))
    state = original(load_file(sd1 / "diffusion_pytorch_model.safetensors"), stages=3)
    state["decoder.conv_in.weight"] = torch.ones(64, 8, 3, 3)
    save_file({n: v.contiguous() for n, v in state.items()}, tmp_path / "eight.safetensors")
    with pytest.raises(CheckpointInvalid, match="16 or 4 latent channels"):
        vae_from_tensors(open_tensors(tmp_path / "eight.safetensors"))


def test_full_size_models_have_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        models = [
            AutoencoderKL(AutoencoderKLSpec()),
            AutoencoderKL(AutoencoderKLSpec(latent_channels=4, quant=True)),
        ]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [83_819_683, 83_653_863]


def test_loads_every_tensor_of_the_released_sd3_vae(tmp_path: Path) -> None:
    beside = Path(__file__).parents[3] / "shared/data"
    path = Path(os.environ.get("TPX_DATA") or beside) / "diffusers/diffusers_0.42.1_full_shapes.json"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set TPX_DATA to the folder that holds diffusers/")
    shapes = json.loads(path.read_text())["sd3-vae"]
    zeros = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    single = Tensors(path, {n: lambda v=v: v for n, v in original(zeros, stages=4).items()})
    model = vae_from_tensors(single)
    assert model.spec == AutoencoderKLSpec()
    assert np.isclose(sum(p.numel() for p in model.parameters()) / 1e6, 83.82, atol=0.01)
