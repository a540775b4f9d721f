"""LoRA files of Stable Diffusion 3 merged into a base, compared with diffusers and peft; both ways of naming layers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from foreign_parity import TIGHT, relative
from safetensors.torch import load_file, save_file
from test_base_sd3 import original
from torch import Tensor

from benchmarks.tiny_sd3 import VARIANTS, save_pipeline
from tpx_export.base.lora import UnusedLoraWarning, open_lora
from tpx_export.base.pipeline import open_base
from tpx_export.base.sd3 import PREFIX
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.cli import main, parse_lora
from tpx_export.pipeline import Pipeline
from tpx_runtime.bundle import Bundle
from tpx_runtime.errors import BadInput
from tpx_runtime.verify import load_golden

pytestmark = pytest.mark.usefixtures("without_gradients_or_warnings")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
OTHERS = ["proj", "proj_out", "net.2", "norm1.linear", "norm1_context.linear", "norm_out.linear", "linear_1"]
SIZE = (32, 32)


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny SD3.5-medium."""
    folder = tmp_path_factory.mktemp("medium") / "sd3"
    save_pipeline(folder, "sd3.5-medium")
    return folder


def transformer_state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


def outputs(pipeline: Pipeline) -> list[Tensor]:
    """The outputs of the transformer and of the text encoders for fixed inputs."""
    model, generator = pipeline.model, torch.Generator().manual_seed(1)
    latents = torch.randn(2, model.latent_channels, *model.latent_size, generator=generator)
    timestep = torch.tensor([300.0, 700.0])
    context = torch.randn(2, 7, model.context_width, generator=generator)
    pooled = torch.randn(2, model.pooled_width, generator=generator)
    result = [pipeline.transformer()(latents, timestep, context, pooled, 1)[0]]
    for part in pipeline.text:
        result += part.load()(torch.from_numpy(part.ids))
    return result


def diffusers_outputs(diffusers: Any, pipeline: Pipeline) -> list[Tensor]:
    """What `outputs` computes, by diffusers' and transformers' modules."""
    model, generator = pipeline.model, torch.Generator().manual_seed(1)
    latents = torch.randn(2, model.latent_channels, *model.latent_size, generator=generator)
    context = torch.randn(2, 7, model.context_width, generator=generator)
    pooled = torch.randn(2, model.pooled_width, generator=generator)
    result = [
        diffusers.transformer(
            hidden_states=latents,
            timestep=torch.tensor([300.0, 700.0]),
            encoder_hidden_states=context,
            pooled_projections=pooled,
        ).sample
    ]
    for encoder, part in zip((diffusers.text_encoder, diffusers.text_encoder_2), pipeline.text, strict=False):
        out = encoder(torch.from_numpy(part.ids), output_hidden_states=True)
        result += [out.hidden_states[-2], out[0]]
    return result


def random_pairs(
    state: dict[str, Tensor], layers: list[str], rank: int = 4, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B for the weights of some layers."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer in layers:
        rows, *columns = state[f"{layer}.weight"].shape
        a = torch.randn(rank, *columns, generator=generator) * 0.3
        b = torch.randn(rows, rank, *([1] * (len(columns) - 1)), generator=generator) * 0.3
        pairs[layer] = (a, b)
    return pairs


def merged(
    state: dict[str, Tensor], pairs: dict[str, tuple[Tensor, Tensor]], factor: float
) -> dict[str, Tensor]:
    """The state after the LoRA, computed independently: einsum over rank, kernels kept."""
    changed = dict(state)
    for layer, (a, b) in pairs.items():
        delta = torch.einsum("ork,rif->oif", b.reshape(*b.shape[:2], 1), a.reshape(*a.shape[:2], -1))
        weight = state[f"{layer}.weight"]
        changed[f"{layer}.weight"] = weight + factor * delta.reshape(weight.shape)
    return changed


def assert_equal_states(ours: torch.nn.Module, expected: torch.nn.Module) -> None:
    theirs = expected.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_outputs_are_those_of_diffusers_with_that_lora(variant: str, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path / variant
    diffusers = save_pipeline(folder, variant)
    base = open_base(folder)
    before = outputs(base)
    transformer = LoraConfig(
        r=4,
        lora_alpha=6,
        alpha_pattern={"attn.to_q": 2, "to_k": 3},
        use_rslora=True,
        init_lora_weights=False,
        target_modules=ATTENTION + OTHERS,
    )
    text = LoraConfig(
        r=3, lora_alpha=9, init_lora_weights=False, target_modules=["q_proj", "fc1", "out_proj"]
    )
    torch.manual_seed(5)
    saved: dict[str, Any] = {}
    for name, config in (("transformer", transformer), ("text_encoder", text), ("text_encoder_2", text)):
        model = inject_adapter_in_model(config, getattr(diffusers, name))
        saved[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
        saved[f"{name}_lora_adapter_metadata"] = config.to_dict()
    diffusers.save_lora_weights(tmp_path / "lora", **saved)
    [file] = (tmp_path / "lora").glob("*.safetensors")
    expected = diffusers_outputs(diffusers, base)
    ours = outputs(open_base(folder, loras=[open_lora(file)]))
    for name, actual, theirs, unchanged in zip(
        ("velocity", "context", "pooled", "context 2", "pooled 2"), ours, expected, before, strict=False
    ):
        assert relative(actual, theirs) <= TIGHT, name
        # The LoRA matters.
        assert relative(unchanged, theirs) > 1e-2, name
    assert torch.equal(ours[-1], before[-1])  # T5 is not in the file


def test_a_lora_of_original_names_changes_the_same_weights_in_both_layouts_of_the_base(
    medium: Path, tmp_path: Path
) -> None:
    state = transformer_state(medium)
    theirs = {name.removeprefix(PREFIX): value for name, value in original(state).items()}
    layers = [
        "joint_blocks.0.x_block.attn.qkv",
        "joint_blocks.1.context_block.attn.qkv",
        "joint_blocks.1.x_block.mlp.fc2",
        "joint_blocks.2.context_block.adaLN_modulation.1",
        "final_layer.adaLN_modulation.1",
        "final_layer.linear",
        "x_embedder.proj",
        "context_embedder",
        "y_embedder.mlp.0",
    ]
    pairs = random_pairs(theirs, layers)
    tensors = {}
    for layer, (a, b) in pairs.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": a,
            f"{name}.lora_up.weight": b,
            f"{name}.alpha": torch.tensor(2.0),
        }
    save_file(tensors, tmp_path / "sd-scripts.safetensors")
    dotted = {f"diffusion_model.{layer}.lora_A.weight": a for layer, (a, _) in pairs.items()}
    dotted |= {f"diffusion_model.{layer}.lora_B.weight": b for layer, (_, b) in pairs.items()}
    save_file(dotted, tmp_path / "dotted.safetensors")
    save_file({f"model.{name}": value for name, value in dotted.items()}, tmp_path / "prefixed.safetensors")
    single = tmp_path / "single.safetensors"
    save_file(original(state), single)
    for file, factor in (("sd-scripts", 0.5), ("dotted", 1.0), ("prefixed", 1.0)):
        after = tmp_path / "after.safetensors"
        save_file(
            {PREFIX + name: value for name, value in merged(theirs, pairs, 1.5 * factor).items()}, after
        )
        expected = open_base(after, components=medium, image_size_px=SIZE).transformer()
        lora = open_lora(tmp_path / f"{file}.safetensors", scale=1.5)
        for base in (
            open_base(medium, image_size_px=SIZE, loras=[lora]),
            open_base(single, components=medium, image_size_px=SIZE, loras=[lora]),
        ):
            assert_equal_states(base.transformer(), expected)


def test_a_lora_of_diffusers_fits_a_single_file_and_loras_add_up(medium: Path, tmp_path: Path) -> None:
    state = transformer_state(medium)
    first = random_pairs(state, ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"])
    second = random_pairs(state, ["transformer_blocks.0.attn.to_q", "norm_out.linear"], rank=2, seed=1)
    for name, pairs in (("first", first), ("second", second)):
        tensors = {f"transformer.{layer}.lora_A.weight": a for layer, (a, _) in pairs.items()}
        tensors |= {f"transformer.{layer}.lora_B.weight": b for layer, (_, b) in pairs.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    save_file(original(state), tmp_path / "single.safetensors")
    save_file(original(merged(merged(state, first, 1.0), second, -0.5)), tmp_path / "after.safetensors")
    loras = [open_lora(tmp_path / "first.safetensors"), open_lora(tmp_path / "second.safetensors", -0.5)]
    base = open_base(tmp_path / "single.safetensors", components=medium, image_size_px=SIZE, loras=loras)
    assert base.name == "single-first-second"
    expected = open_base(tmp_path / "after.safetensors", components=medium, image_size_px=SIZE).transformer()
    assert_equal_states(base.transformer(), expected)


def test_all_three_text_encoders_can_be_changed(medium: Path, tmp_path: Path) -> None:
    layers = {
        ("text_encoder", "lora_te1"): "text_model.encoder.layers.1.mlp.fc2",
        ("text_encoder_2", "lora_te2"): "text_model.encoder.layers.0.self_attn.k_proj",
        ("text_encoder_3", "lora_te3"): "encoder.block.1.layer.1.DenseReluDense.wi_1",
    }
    tensors, expected = {}, []
    for (folder, prefix), layer in layers.items():
        state = load_file(medium / folder / "model.safetensors")
        pairs = random_pairs(state, [layer])
        name = f"{prefix}_{layer.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": pairs[layer][0], f"{name}.lora_up.weight": pairs[layer][1]}
        expected.append(merged(state, pairs, 1.0)[f"{layer}.weight"])
    save_file(tensors, tmp_path / "text.safetensors")
    lora = open_lora(tmp_path / "text.safetensors")
    clip, clip_g, t5 = (part.load() for part in open_base(medium, image_size_px=SIZE, loras=[lora]).text)
    ours = [clip.layers[1].mlp_out.weight, clip_g.layers[0].k.weight, t5.layers[1].mlp_in.weight]  # type: ignore[union-attr,index]
    for actual, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, theirs)
    with pytest.warns(
        UnusedLoraWarning, match="text.safetensors also changes text_encoder_3, which this model is"
    ):
        assert len(open_base(medium, t5=False, loras=[lora]).text) == 2


def test_weights_keep_their_stored_precision_and_are_rounded_once(medium: Path, tmp_path: Path) -> None:
    layer = "transformer_blocks.1.ff.net.2"
    state = {name: value.half() for name, value in transformer_state(medium).items()}
    (tmp_path / "base/transformer").mkdir(parents=True)
    (tmp_path / "base/transformer/config.json").write_text((medium / "transformer/config.json").read_text())
    save_file(state, tmp_path / "base/transformer/diffusion_pytorch_model.safetensors")
    [(a, b)] = random_pairs(state, [layer]).values()
    a, b = a.bfloat16(), b.bfloat16()
    save_file(
        {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b},
        tmp_path / "l.safetensors",
    )
    lora = open_lora(tmp_path / "l.safetensors", 0.3)
    ours = open_base(tmp_path / "base", components=medium, image_size_px=SIZE, loras=[lora]).transformer()
    exact = state[f"{layer}.weight"].double() + 0.3 * b.double() @ a.double()
    weight = ours.blocks[1].visual.mlp_out.weight  # type: ignore[union-attr,index]
    assert weight.dtype == torch.float16
    assert (weight.double() - exact).abs().max() <= exact.abs().max() * 2**-11 * 1.01


LAYER = "transformer.transformer_blocks.0.attn.to_q"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


def good() -> dict[str, Tensor]:
    return {A: torch.ones(2, 32), B: torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({B: None}, "transformer transformer_blocks.0.attn.to_q has only a; use a LoRA of this model"),
        ({B: torch.ones(32, 3)}, r"has an A of \[2, 32\] and a B of \[32, 3\]"),
        ({B: torch.ones(32, 2, 3, 3)}, r"has an A of \[2, 32\] and a B of \[32, 2, 3, 3\]"),
        ({A: torch.ones(2)}, r"has an A of \[2\] and a B of \[32, 2\]"),
        ({A: torch.ones(0, 32), B: torch.ones(32, 0)}, r"has an A of \[0, 32\]"),
        ({f"{LAYER}.alpha": torch.ones(2)}, "has an alpha that is no number"),
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(32)}, "to_q.lora_magnitude_vector unknown"),
        ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "lora_unet_x.hada_w1_a unknown"),
        ({"unet.down_blocks.0.lora_A.weight": torch.ones(2, 2)}, "unet.down_blocks.0.lora_A.weight unknown"),
        ({A: torch.ones(2, 31)}, r"transformer_blocks_0_attn_to_q changes \[32, 31\], not \[32, 32\]"),
        ({B: torch.ones(96, 2)}, r"changes \[96, 32\], not \[32, 32\]"),
        ({name.replace("blocks.0", "blocks.3"): value for name, value in good().items()}, "blocks_3_attn_to_q unknown"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_rejected_before_anything_is_loaded(
    change: dict[str, Tensor | None], message: str, medium: Path, tmp_path: Path
) -> None:
    tensors = {name: value for name, value in (good() | change).items() if value is not None}
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointInvalid, match=message):
        open_base(medium, loras=[open_lora(tmp_path / "bad.safetensors")])


def test_a_lora_of_another_model_is_one_line(medium: Path, tmp_path: Path) -> None:
    names = [f"lora_unet_down_blocks_{n}.lora_{side}.weight" for n in range(20) for side in ("down", "up")]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "sdxl.safetensors")
    with pytest.raises(
        CheckpointInvalid, match=r"down_blocks_0 unknown; .*; and 15 more; use a LoRA of this"
    ) as error:
        open_base(medium, loras=[open_lora(tmp_path / "sdxl.safetensors")])
    assert "\n" not in str(error.value)


def test_files_that_are_no_lora_are_rejected(medium: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match=r"x\.pt: expected a LoRA file ending in \.safetensors"):
        open_lora(tmp_path / "x.pt")
    with pytest.raises(CheckpointInvalid, match=r"no\.safetensors: expected a LoRA file .* found none"):
        open_lora(tmp_path / "no.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointInvalid, match="found a truncated or damaged one"):
        open_lora(tmp_path / "broken.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointInvalid, match=r"expected pairs of lora_A and lora_B, .*, found none"):
        open_lora(tmp_path / "empty.safetensors")
    for text in ("{", "[]", "[" * 100_000):
        save_file(good(), tmp_path / "settings.safetensors", metadata={"lora_adapter_metadata": text})
        with pytest.raises(
            CheckpointInvalid, match=r"settings\.safetensors, lora_adapter_metadata: expected (a )?JSON"
        ):
            open_lora(tmp_path / "settings.safetensors")
    save_file(good(), tmp_path / "good.safetensors")
    with pytest.raises(BadInput, match=r"expected a finite scale of .*good\.safetensors, found nan"):
        open_lora(tmp_path / "good.safetensors", float("nan"))


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, 1.0),
        ({"lora_alpha": 8}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"attn.to_q": 1}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"to_k": 1, "o_q": 1}}, 4.0),
    ],
)
def test_the_factor_follows_the_settings_in_the_file(
    settings: dict[str, Any], factor: float, tmp_path: Path
) -> None:
    text = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    save_file(good(), tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": text})
    [pair] = open_lora(tmp_path / "lora.safetensors").parts["transformer"].values()
    assert pair.factor == pytest.approx(factor)
    # An alpha among the tensors takes precedence.
    save_file(good() | {f"{LAYER}.alpha": torch.tensor(3.0)}, tmp_path / "lora.safetensors")
    [pair] = open_lora(tmp_path / "lora.safetensors").parts["transformer"].values()
    assert pair.factor == 1.5


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("dir:2/a.safetensors:-1", "dir:2/a.safetensors", -1.0),
        ("C:\\a.safetensors", "C:\\a.safetensors", 1.0),
    ],
)
def test_a_scale_follows_the_last_colon(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == (Path(path), scale)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.mark.slow
def test_the_command_exports_a_bundle_that_predicts_something_else(medium: Path, tmp_path: Path) -> None:
    from tpx_runtime.generator import Generator

    pairs = random_pairs(transformer_state(medium), ["transformer_blocks.1.attn.to_v"])
    [(a, b)] = pairs.values()
    names = [f"transformer.transformer_blocks.1.attn.to_v.lora_{side}.weight" for side in "AB"]
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "style.safetensors")
    out = tmp_path / "bundle"
    code, output = run("--base", medium, "--lora", tmp_path / "style.safetensors", "--out", out)
    assert code == 0, output
    assert Generator.load(out, "onnxruntime").manifest.name == "sd3-style"
    pipeline, golden = open_base(medium), load_golden(Bundle.open(out))
    inputs = [torch.from_numpy(golden[name]) for name in pipeline.model.transformer_inputs]
    with torch.no_grad():
        without, _ = pipeline.transformer().denoise(*inputs, 1)
    assert not np.allclose(without.numpy(), golden["velocity_1"], atol=1e-2)


def test_the_option_is_for_stable_diffusion_3_only(medium: Path, tmp_path: Path) -> None:
    save_file(good(), tmp_path / "lora.safetensors")
    code, output = run("--ckpt", tmp_path / "model.safetensors", "--lora", tmp_path / "lora.safetensors")
    assert code == 2 and "expected --lora only with --base, found it with --ckpt" in output
    code, output = run(
        "--base", medium, "--lora", f"{tmp_path / 'lora.safetensors'}:inf", "--out", tmp_path / "out"
    )
    assert code == 2 and "expected a finite scale" in output
    assert not (tmp_path / "out").exists()
