"""SD3 and SD3.5 transformers imported from both file layouts, compared with diffusers."""

import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import random_sd3
from tpx_export.adapters import attach, load_adapters
from tpx_export.base.model_files import precision_of
from tpx_export.base.sd3 import load_transformer
from tpx_export.base.sd3_names import from_diffusers, from_original
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.graphs import ConditionsGraph, Graph, TransformerGraph
from tpx_export.model import MMDiT, MMDiTSpec, ThinkingSpec
from tpx_export.model.mmdit import grid_positions
from tpx_export.routing import masked
from tpx_export.tracing import to_onnx
from tpx_runtime.errors import BadInput, TpxError

KINDS: dict[str, dict[str, Any]] = {
    "sd3-medium": {"num_layers": 3, "pos_embed_max_size": 12},
    "sd3.5-medium": {
        "num_layers": 3,
        "pos_embed_max_size": 15,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0, 1),
    },
    "sd3.5-large": {"num_layers": 2, "pos_embed_max_size": 12, "qk_norm": "rms_norm"},
}
PARAMETERS = {"sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520, "sd3.5-large": 8_056_627_520}
LATENTS = (16, 16)


@pytest.fixture(autouse=True, scope="module")
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def real_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the released models, as diffusers 0.42.1 makes them."""
    beside = Path(__file__).parents[3] / "shared/data"
    path = Path(os.environ.get("TPX_DATA", beside)) / "diffusers/diffusers_0.42.1_full_shapes.json"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set TPX_DATA to the folder that holds diffusers/")
    models = json.loads(path.read_text())
    return {kind: {name: tuple(shape) for name, shape in models[kind].items()} for kind in random_sd3.SIZES}


def diffusers_model(kind: str) -> Any:
    """A tiny random SD3Transformer2DModel of that kind, with every parameter moved away from its initial value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import SD3Transformer2DModel
    torch.manual_seed(0)
    model: Any = SD3Transformer2DModel(
        sample_size=LATENTS[0],
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=128,
        pooled_projection_dim=24,
        **KINDS[kind],
    )
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(kind: str) -> Any:
    return diffusers_model(kind)


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd3")
    reference.save_pretrained(path / "transformer")
    return path


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SD3-medium; copy it before changing anything."""
    path = tmp_path_factory.mktemp("medium")
    diffusers_model("sd3-medium").save_pretrained(path / "transformer")
    return path


def load_state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


def original(state: dict[str, Tensor], prefix: str = "model.diffusion_model.") -> dict[str, Tensor]:
    """A diffusers state in the layout of the original single files."""
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    fixed = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    in_block = {
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    fused = {
        ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
        ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
    }
    converted, remaining = {}, dict(state)
    for part in (".weight", ".bias", ""):
        for name, new in fixed.items():
            if name + part in remaining:
                converted[new + part] = remaining.pop(name + part)
        for i in range(blocks):
            old, new_block = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
            for name, new in in_block.items():
                if old + name + part in remaining:
                    converted[new_block + new + part] = remaining.pop(old + name + part)
            for names, new in fused.items():
                if old + names[0] + part in remaining:
                    converted[new_block + new + part] = torch.cat(
                        [remaining.pop(old + n + part) for n in names]
                    )
    assert not remaining, sorted(remaining)
    for name in (
        "final_layer.adaLN_modulation.1",
        f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation.1",
    ):
        for part in (".weight", ".bias"):
            scale, shift = converted[name + part].chunk(2)
            converted[name + part] = torch.cat([shift, scale])
    return {prefix + name: value for name, value in converted.items()}


def single_file(reference: Any, path: Path, extra: dict[str, Tensor] | None = None) -> Path:
    save_file({**original(reference.state_dict()), **(extra or {})}, path)
    return path


def inputs(latent_size: tuple[int, int] = LATENTS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    latents, context = torch.randn(2, 16, *latent_size), torch.randn(2, 7, 32)
    return latents, torch.tensor([987.5, 12.0]), context, torch.randn(2, 24)


def reference_output(
    reference: Any, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    velocity: Tensor = reference(latents, context, pooled, timestep, return_dict=False)[0]
    return velocity


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|"""
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max())


def error_message(act: Callable[[], object], kind: type[TpxError] = CheckpointInvalid) -> str:
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message and "found" in message
    return message


@pytest.mark.parametrize("latent_size", [(2, 2), (10, 10), (16, 24), (24, 2), (24, 24)])
def test_output_matches_diffusers(reference: Any, folder: Path, latent_size: tuple[int, int]) -> None:
    ours = load_transformer(folder, latent_size)
    model_inputs = inputs(latent_size)
    assert relative_error(ours(*model_inputs, 1)[0], reference_output(reference, *model_inputs)) < 2e-5


def test_positions_are_cropped_as_in_diffusers(reference: Any, folder: Path) -> None:
    max_size = 2 * reference.config.pos_embed_max_size
    sides = (2, 4, 6, 14, 16, max_size - 2, max_size)
    for height, width in [*zip(sides, sides, strict=True), *itertools.pairwise(sides), (14, 6)]:
        expected = reference.pos_embed.cropped_pos_embed(height, width)[0]
        ours = load_transformer(folder, (height, width))
        assert torch.equal(ours.positions, expected), (height, width)
        assert ours.state_dict()["positions"].shape == (height * width // 4, 128)


def test_rejects_latent_sizes_that_the_position_table_does_not_cover(reference: Any, folder: Path) -> None:
    max_size = 2 * reference.config.pos_embed_max_size
    for side in (max_size + 2, 0, -2, 15):
        for size in ((side, 8), (8, side)):
            message = error_message(lambda size=size: load_transformer(folder, size), BadInput)  # type: ignore[misc]
            assert f"2..{max_size}" in message and str(list(size)) in message


def test_diffusers_converter_reverts_the_original_layout(reference: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders import single_file_utils
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
        original(reference.state_dict())
    )
    state = reference.state_dict()
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)


def test_single_file_gives_the_same_module_as_a_folder(reference: Any, folder: Path, tmp_path: Path) -> None:
    # Released single files hold the other parts, too.
    others = {
        "first_stage_model.x": torch.zeros(1),
        "text_encoders.clip_l.x": torch.zeros(1),
    }
    found = load_transformer(single_file(reference, tmp_path / "sd3.safetensors", others), LATENTS)
    expected = load_transformer(folder, LATENTS)
    assert found.spec == expected.spec
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(found.state_dict()[n], value) for n, value in expected.state_dict().items())


def test_loads_a_single_file_without_the_prefix(reference: Any, folder: Path, tmp_path: Path) -> None:
    save_file(original(reference.state_dict(), prefix=""), tmp_path / "bare.safetensors")
    found = load_transformer(tmp_path / "bare.safetensors", LATENTS)
    assert torch.equal(found(*inputs(), 1)[0], load_transformer(folder, LATENTS)(*inputs(), 1)[0])


def test_loads_float16_weights_and_shards(kind: str, tmp_path: Path) -> None:
    """Shards load as one file does; float16 stays float16, except for the timestep and pooled-text embedders."""
    half = diffusers_model(kind).half()
    half.save_pretrained(tmp_path / "whole")
    half.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole, shards = (load_transformer(tmp_path / name, LATENTS) for name in ("whole", "shards"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, shards.state_dict()[name]), name
        embedder = name.startswith(("time.", "pooled."))
        assert value.dtype == (torch.float32 if embedder else torch.float16), name
    latents, timestep, context, pooled = inputs()
    output = whole(latents.half(), timestep, context.half(), pooled.half(), 1)[0]
    assert output.dtype == torch.float16
    expected = reference_output(half.float(), *inputs())
    assert relative_error(output, expected) < 1e-2
    assert relative_error(whole.float()(*inputs(), 1)[0], expected) < 2e-5


def test_position_table_is_cast_to_the_dtype_of_the_weights(
    reference: Any, folder: Path, tmp_path: Path
) -> None:
    state = {n: v if "norm" in n or "pos_embed" in n else v.half() for n, v in reference.state_dict().items()}
    state["pos_embed.proj.weight"] = state["pos_embed.proj.weight"].half()
    write_folder(tmp_path, state, folder)
    model = load_transformer(tmp_path, LATENTS)
    assert {v.dtype for n, v in model.state_dict().items() if n.startswith("blocks")} == {torch.float16}
    assert model.positions.dtype == torch.float16
    latents, timestep, context, pooled = inputs()
    assert model(latents.half(), timestep, context.half(), pooled.half(), 1)[0].isfinite().all()


def test_embedders_stored_in_float32_are_not_rounded(reference: Any, folder: Path, tmp_path: Path) -> None:
    """Also if the other weights are stored in float16."""
    state = {n: v if "time_text_embed" in n else v.half() for n, v in reference.state_dict().items()}
    write_folder(tmp_path, state, folder)
    model, expected = load_transformer(tmp_path, LATENTS), load_transformer(folder, LATENTS)
    assert model.patch_in.weight.dtype == torch.float16
    for part in ("time", "pooled"):
        found = getattr(model, part).state_dict()
        assert all(torch.equal(found[n], v) for n, v in getattr(expected, part).state_dict().items()), part


def test_float8_becomes_float16(reference: Any, folder: Path, tmp_path: Path) -> None:
    float8 = {name: value.to(torch.float8_e4m3fn) for name, value in reference.state_dict().items()}
    write_folder(tmp_path, float8, folder)
    write_folder(tmp_path / "half", {name: value.half() for name, value in float8.items()}, folder)
    expected = load_transformer(tmp_path / "half", LATENTS).state_dict()
    for name, value in load_transformer(tmp_path, LATENTS).state_dict().items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "fp32"),
        (torch.float16, "fp16"),
        (torch.bfloat16, "fp32"),
        (torch.float8_e4m3fn, "fp16"),
        (torch.float8_e5m2, "fp16"),
    ],
)
def test_bundle_precision_follows_the_stored_dtype(dtype: torch.dtype, precision: str) -> None:
    assert precision_of(dtype) == precision


def write_folder(path: Path, state: dict[str, Tensor], like: Path, **fields: object) -> None:
    """Write a diffusers folder with `state` and the configuration in `like`, changed by `fields`."""
    path.mkdir(exist_ok=True)
    config = {**json.loads((like / "transformer/config.json").read_text()), **fields}
    (path / "config.json").write_text(json.dumps(config))
    save_file(state, path / "diffusion_pytorch_model.safetensors")


def damage(state: dict[str, Tensor], name: str, fault: str) -> dict[str, Tensor]:
    state = dict(state)
    if fault == "missing":
        del state[name]
    elif fault == "unknown":
        state[name.replace(".weight", ".scale_weight")] = torch.ones(1)
    elif fault == "transposed":
        state[name] = state[name][..., None]
    elif fault == "short":
        state[name] = state[name][:-1].contiguous()
    else:
        state[name] = state[name].to(torch.int8)
    return state


@pytest.mark.parametrize("fault", ["missing", "unknown", "transposed", "short", "int8"])
@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.1.attn.to_k.weight",
        "transformer_blocks.0.norm1.linear.weight",
        "pos_embed.proj.weight",
        "proj_out.weight",
        "norm_out.linear.weight",
    ],
)
def test_error_names_an_invalid_tensor_in_a_folder(
    fault: str, name: str, medium: Path, tmp_path: Path
) -> None:
    write_folder(tmp_path / "bad", damage(load_state(medium), name, fault), medium)
    message = error_message(lambda: load_transformer(tmp_path / "bad", LATENTS))
    assert (name if fault != "unknown" else name.replace(".weight", ".scale_weight")) in message


@pytest.mark.parametrize("fault", ["missing", "unknown", "transposed", "short", "int8"])
@pytest.mark.parametrize(
    "name",
    [
        "joint_blocks.1.x_block.attn.qkv.weight",
        "joint_blocks.2.context_block.adaLN_modulation.1.weight",
        "x_embedder.proj.weight",
        "context_embedder.weight",
        "final_layer.linear.weight",
    ],
)
def test_error_names_an_invalid_tensor_in_a_single_file(
    fault: str, name: str, medium: Path, tmp_path: Path
) -> None:
    prefix = "model.diffusion_model."
    state = original(load_state(medium))
    save_file(damage(state, prefix + name, fault), tmp_path / "bad.safetensors")
    message = error_message(lambda: load_transformer(tmp_path / "bad.safetensors", LATENTS))
    if (fault, name) == ("short", "x_embedder.proj.weight"):
        # The width is read from this tensor.
        assert "divisible by the head width" in message
    elif (fault, name) == ("short", "context_embedder.weight"):
        assert "context_embedder.weight is float32 [127, 32], not [128, 32]" in message
    else:
        assert (name if fault != "unknown" else name.replace(".weight", ".scale_weight")) in message


@pytest.mark.parametrize("table", [(1, 140, 128), (144, 128), (1, 144, 64), (1, 0, 128)])
def test_rejects_a_position_table_of_invalid_shape(
    table: tuple[int, ...], medium: Path, tmp_path: Path
) -> None:
    state = {**load_state(medium), "pos_embed.pos_embed": torch.zeros(table)}
    write_folder(tmp_path / "bad", state, medium)
    assert "pos_embed.pos_embed" in error_message(lambda: load_transformer(tmp_path / "bad", LATENTS))
    save_file(original(state), tmp_path / "bad.safetensors")
    assert "pos_embed" in error_message(lambda: load_transformer(tmp_path / "bad.safetensors", LATENTS))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "FluxTransformer2DModel"),
        ("num_layers", 4),
        ("num_layers", "3"),
        ("num_layers", 10**12),
        ("num_attention_heads", None),
        ("attention_head_dim", 0),
        ("attention_head_dim", 2.5),
        ("caption_projection_dim", 64),
        ("out_channels", 8),
        ("qk_norm", "layer_norm"),
        ("dual_attention_layers", [3]),
        ("dual_attention_layers", 1),
        ("joint_attention_dim", True),
    ],
)
def test_rejects_an_invalid_or_unsupported_config(
    field: str, value: object, medium: Path, tmp_path: Path
) -> None:
    write_folder(tmp_path / "bad", load_state(medium), medium, **{field: value})
    assert field in error_message(lambda: load_transformer(tmp_path / "bad", LATENTS))


def test_reads_an_old_config_without_newer_fields(tmp_path: Path) -> None:
    """SD3-medium was released before diffusers supported query-key norms and dual blocks."""
    reference = diffusers_model("sd3-medium")
    reference.save_pretrained(tmp_path / "transformer")
    path = tmp_path / "transformer/config.json"
    config = json.loads(path.read_text())
    for name in ("qk_norm", "dual_attention_layers", "sample_size", "pos_embed_max_size"):
        config.pop(name, None)
    path.write_text(json.dumps(config))
    assert (
        relative_error(
            load_transformer(tmp_path, LATENTS)(*inputs(), 1)[0], reference_output(reference, *inputs())
        )
        < 2e-5
    )


def test_rejects_files_that_are_not_an_sd3_transformer(tmp_path: Path) -> None:
    reference = diffusers_model("sd3-medium")
    reference.save_pretrained(tmp_path / "transformer")
    error_message(lambda: load_transformer(tmp_path / "nowhere", LATENTS))
    weights = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    assert "config.json" in error_message(lambda: load_transformer(weights, LATENTS))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "joint_blocks" in error_message(lambda: load_transformer(tmp_path / "other.safetensors", LATENTS))
    config = tmp_path / "transformer/config.json"
    for text in ("{", "[]", "\udcff"):
        config.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert "config.json" in error_message(lambda: load_transformer(tmp_path, LATENTS))
    config.unlink()
    error_message(lambda: load_transformer(tmp_path, LATENTS))
    single = tmp_path / "whole.safetensors"
    single_file(reference, single)
    single.write_bytes(single.read_bytes()[:5000])
    error_message(lambda: load_transformer(single, LATENTS))


def test_full_size_models_have_the_released_parameter_counts_and_names(
    kind: str, real_shapes: dict[str, dict[str, tuple[int, ...]]]
) -> None:
    """On the meta device; the conversions of both layouts name all of their tensors and no others."""
    size = random_sd3.SIZES[kind]
    spec = MMDiTSpec(
        latent_channels=16,
        latent_size=(128, 128),
        width=size.width,
        heads=size.heads,
        blocks=size.layers,
        context_tokens=333,
        context_width=4096,
        pooled_width=2048,
        qk_norm=size.qk_norm,
        dual_blocks=tuple(range(size.dual)),
        stored_positions=True,
    )
    with torch.device("meta"):
        model = MMDiT(spec)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[kind]
    needed = {name for conversion in from_diffusers(spec).values() for name in conversion.names}
    assert needed | {"pos_embed.pos_embed"} == real_shapes[kind].keys()
    names = original(dict.fromkeys(real_shapes[kind], torch.zeros(2)), prefix="").keys()
    needed = {name for conversion in from_original(spec).values() for name in conversion.names}
    assert needed | {"pos_embed"} == names


def test_computed_positions_of_a_wide_grid_are_those_of_a_square_one() -> None:
    square, wide = grid_positions((5, 5), 32).reshape(5, 5, 32), grid_positions((2, 5), 32)
    assert torch.equal(wide.reshape(2, 5, 32), square[:2])


def test_stored_positions_are_initialised_with_the_computed_ones() -> None:
    """Computed positions are not part of the state dict, as in the sample model."""
    spec = MMDiTSpec(latent_size=(8, 8), width=64, heads=2, blocks=1)
    computed, stored = MMDiT(spec), MMDiT(replace(spec, stored_positions=True))
    assert torch.equal(computed.positions, stored.positions)
    assert stored.state_dict().keys() - computed.state_dict().keys() == {"positions"}


def random_experts(model: MMDiT) -> MMDiT:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("thinking.b"):
            parameter.normal_(std=0.1)
    return model


def test_untrained_thinking_blocks_change_nothing(folder: Path) -> None:
    expected = load_transformer(folder, LATENTS)(*inputs(), 1)[0]
    for blocks in ((0,), (0, 1)):
        thinking = attach(load_transformer(folder, LATENTS), ThinkingSpec(blocks=blocks, max_depth=2)).eval()
        for depth in (1, 2):
            found, routes = thinking(*inputs(), depth)
            assert torch.equal(found, expected)
            assert routes.shape == (2, len(blocks) * depth, 64)


def test_dual_block_thinks_only_in_its_joint_attention(tmp_path: Path) -> None:
    diffusers_model("sd3.5-medium").save_pretrained(tmp_path / "transformer")
    spec = ThinkingSpec(blocks=(0,), rank=4, max_depth=2)
    model = random_experts(attach(load_transformer(tmp_path, LATENTS), spec))
    block: Any = model.blocks[0]
    second: list[Tensor] = []
    joint: list[Tensor] = []
    block.second.register_forward_hook(lambda _, __, out: second.append(out))
    block.thinking.register_forward_hook(lambda _, __, out: joint.append(out[0]))
    outputs = [model(*inputs(), depth)[0] for depth in (1, 2)]
    assert torch.equal(second[0], second[1])
    assert not torch.allclose(joint[0], joint[1], rtol=1e-3)
    assert relative_error(outputs[0], outputs[1]) > 1e-3


def run_onnx(model: MMDiT, depth: int, path: Path) -> tuple[Tensor, Tensor]:
    """Velocity and routes in ONNX Runtime, with the graphs of the exporter."""
    latents, timestep, context, pooled = inputs()
    condition_inputs, feeds = {"timestep": timestep, "pooled": pooled}, {"latents": latents.numpy()}
    transformer_inputs = {
        "latents": latents,
        "conditions": model.conditions(timestep, pooled),
        "context": context,
    }
    outputs = ("velocity", "routes")
    for graph in (
        Graph(ConditionsGraph(model), condition_inputs, ("conditions",)),
        Graph(TransformerGraph(model, depth, True), transformer_inputs, outputs),
    ):
        proto = onnx_ir.to_proto(to_onnx(graph))
        proto.functions.extend([masked()] if graph.outputs == outputs else [])
        onnx.save(proto, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feeds |= {name: value.numpy() for name, value in graph.inputs.items() if name not in feeds}
        found = session.run(None, {name: feeds[name] for name in graph.inputs})
        feeds |= dict(zip(graph.outputs, found, strict=True))
    velocity, routes = found
    return torch.from_numpy(np.asarray(velocity)), torch.from_numpy(np.asarray(routes))


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium"])
def test_onnx_runtime_matches_pytorch_at_depth_2(name: str, tmp_path: Path) -> None:
    diffusers_model(name).save_pretrained(tmp_path / "transformer")
    thinking = ThinkingSpec(blocks=(0, 2), rank=4, max_depth=2)
    model = random_experts(attach(load_transformer(tmp_path, LATENTS), thinking))
    expected, routes = model(*inputs(), 2)
    found, found_routes = run_onnx(model, 2, tmp_path / "model.onnx")
    assert relative_error(found, expected) < 1e-4
    assert torch.equal(routes, found_routes)
    assert routes.unique().numel() > 1


def test_random_models_have_the_released_names_and_shapes(
    kind: str, real_shapes: dict[str, dict[str, tuple[int, ...]]]
) -> None:
    assert random_sd3.shapes(random_sd3.size_of(kind)) == real_shapes[kind]


def test_random_models_keep_activations_in_range_in_every_block(kind: str, tmp_path: Path) -> None:
    """As deep as the released model, one head wide, in shards, with non-zero experts."""
    # Bytes of the largest tensor.
    limit = 2 * 64 * random_sd3.SIZES[kind].table ** 2
    random_sd3.write_transformer(tmp_path / "transformer", kind, heads=1, shard_bytes=limit)
    random_sd3.write_adapters(tmp_path / "tpx.safetensors", kind, experts=2, rank=8, max_depth=2, heads=1)
    shards = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert len(shards) > 1 and all(path.stat().st_size < 1.02 * limit for path in shards)
    index = json.loads((tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert {name for path in shards for name in load_file(path)} == index["weight_map"].keys()
    adapters = load_adapters(tmp_path / "tpx.safetensors")
    assert adapters.thinking.blocks == (4, 8, 12)
    model = load_transformer(tmp_path, (8, 8)).float()
    assert model.spec.blocks == random_sd3.SIZES[kind].layers
    model_inputs = (*inputs((8, 8))[:2], torch.randn(2, 5, 4096), torch.randn(2, 2048))
    magnitudes: list[float] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: magnitudes.append(float(out[0].abs().max())))
    before = model(*model_inputs, 1)[0]
    assert min(magnitudes) > 0.1 and max(magnitudes) < 30
    assert 0.02 < float(before.std()) < 5
    after = attach(model, adapters.thinking, adapters.state)(*model_inputs, 2)[0]
    assert relative_error(after, before) > 1e-3


def test_diffusers_reads_a_random_model_and_computes_the_same(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import SD3Transformer2DModel
    random_sd3.write_transformer(tmp_path / "transformer", "sd3.5-medium", layers=4, heads=1)
    assert re.fullmatch(
        r"diffusion_pytorch_model\.safetensors", next((tmp_path / "transformer").glob("*.safe*")).name
    )
    reference, report = SD3Transformer2DModel.from_pretrained(
        tmp_path / "transformer", output_loading_info=True, torch_dtype=torch.float32
    )
    assert not any(report.values())
    assert reference.config.dual_attention_layers == [0, 1]
    ours = load_transformer(tmp_path, LATENTS).float()
    model_inputs = (inputs()[0], inputs()[1], torch.randn(2, 5, 4096), torch.randn(2, 2048))
    assert relative_error(ours(*model_inputs, 1)[0], reference_output(reference, *model_inputs)) < 2e-5
