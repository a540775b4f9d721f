"""DiT imported from original checkpoints, compared with `reference_forward`.

That is the forward pass with the original's parameter names, written out from the paper (arXiv 2212.09748, adaLN-zero
blocks) in elementary operations and float64.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tpx_export.adapters import attach
from tpx_export.base.dit import (
    HEADS,
    conversions,
    load_transformer,
    shapes_of,
    spec_from_tensors,
    transformer_from_tensors,
)
from tpx_export.base.tensors import Tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.graphs import ConditionsGraph, Graph, TransformerGraph
from tpx_export.model.dit import DiT, DiTSpec, position_table
from tpx_export.model.embedder import Embedder, sinusoid
from tpx_export.model.patches import from_patches, to_patches
from tpx_export.model.thinking import Gate, Thinking, ThinkingSpec
from tpx_export.precision import cast_to_precision
from tpx_export.routing import masked, permuted
from tpx_export.tracing import to_onnx
from tpx_runtime.errors import BadInput
from tpx_runtime.guidance import apply_guidance
from tpx_runtime.noise import batch_noise
from tpx_runtime.sampling import Array
from tpx_runtime.sampling.diffusion import ddpm, respaced_schedule

State = dict[str, Tensor]
TINY = DiTSpec(latent_channels=4, latent_size=(8, 8), patch=2, width=48, heads=4, blocks=3, classes=10)
THINKING = ThinkingSpec(blocks=(0, 2), experts=3, rank=4, max_depth=2)


@pytest.fixture(autouse=True, scope="module")
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def tiny_has_four_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No released DiT has the width of TINY, so its number of heads is unknown otherwise."""
    monkeypatch.setitem(HEADS, TINY.width, TINY.heads)


# Reference


def reference_shapes(spec: DiTSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original's state dict."""
    d, p, c = spec.width, spec.patch, spec.latent_channels
    tokens = (spec.latent_size[0] // p) ** 2
    out = p * p * (2 * c if spec.learned_sigma else c)
    layers = {
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (out, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for n in range(spec.blocks):
        layers |= {
            f"blocks.{n}.attn.qkv": (3 * d, d),
            f"blocks.{n}.attn.proj": (d, d),
            f"blocks.{n}.mlp.fc1": (4 * d, d),
            f"blocks.{n}.mlp.fc2": (d, 4 * d),
            f"blocks.{n}.adaLN_modulation.1": (6 * d, d),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, d),
        "x_embedder.proj.weight": (d, c, p, p),
        "x_embedder.proj.bias": (d,),
        "y_embedder.embedding_table.weight": (spec.classes + 1, d),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def reference_positions(side: int, width: int) -> np.ndarray:
    """Computed one token and channel at a time: the column in the first half, the row in the second; sines, then cosines."""
    table = np.zeros((side * side, width))
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for half, place in enumerate((column, row)):
                for i in range(quarter):
                    angle = place / 10000 ** (i / quarter)
                    token, first = row * side + column, half * width // 2 + i
                    table[token, first], table[token, first + quarter] = math.sin(angle), math.cos(angle)
    return table


def random_state(spec: DiTSpec, seed: int = 0) -> State:
    """Random weights that all have an effect, and positions as the original stores them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in reference_shapes(spec).items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 25
        state[name] = torch.randn(shape, generator=generator) * fan_in**-0.5
    table = reference_positions(spec.latent_size[0] // spec.patch, spec.width)
    return state | {"pos_embed": torch.from_numpy(table).float().unsqueeze(0)}


def reference_forward(state: State, heads: int, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The original's forward pass in float64."""
    w = {name: value.double() for name, value in state.items()}

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(value: Tensor) -> Tensor:
        return value / (1 + torch.exp(-value))

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)

    def gelu(value: Tensor) -> Tensor:
        return 0.5 * value * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t.float()[:, None] * frequencies
    wave = torch.cat([torch.cos(angles), torch.sin(angles)], 1).double()
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", wave)))
    c = c + w["y_embedder.embedding_table.weight"][label]
    kernel = w["x_embedder.proj.weight"]
    p = kernel.shape[-1]
    h = torch.nn.functional.conv2d(x.double(), kernel, w["x_embedder.proj.bias"], stride=p)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    batch, tokens, width = h.shape
    blocks = sum(name.endswith("attn.qkv.weight") for name in w)
    for n in range(blocks):
        parts = linear(f"blocks.{n}.adaLN_modulation.1", silu(c)).unsqueeze(1).chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        qkv = linear(f"blocks.{n}.attn.qkv", norm(h) * (1 + scale) + shift)
        q, k, v = qkv.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(width // heads), dim=-1)
        h = h + gate * linear(f"blocks.{n}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        hidden = gelu(linear(f"blocks.{n}.mlp.fc1", norm(h) * (1 + mlp_scale) + mlp_shift))
        h = h + mlp_gate * linear(f"blocks.{n}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).unsqueeze(1).chunk(2, dim=-1)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    side = math.isqrt(tokens)
    h = h.reshape(batch, side, side, p, p, -1)  # n h w p q c
    return torch.einsum("nhwpqc->nchpwq", h).reshape(batch, -1, side * p, side * p)


def inputs(spec: DiTSpec = TINY, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, spec.latent_channels, *spec.latent_size)
    # The first is the null class.
    label = torch.tensor([spec.classes, 0, spec.classes - 1, 1])[:batch]
    return torch.randn(shape, generator=generator), torch.tensor([999.0, 0.0, 427.0, 3.0])[:batch], label


def save_state(state: State, folder: Path, suffix: str = ".pt") -> Path:
    path = folder / f"DiT{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def random_experts(model: DiT) -> DiT:
    """Move the experts away from their initial values, with which they change nothing."""
    torch.manual_seed(5)
    for part in model.modules():
        if isinstance(part, Thinking):
            part.b.normal_(std=0.3)
            part.scale.normal_(1, 0.3)
            part.shift.normal_(std=0.3)
    return model


# Outputs


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        replace(TINY, learned_sigma=False),
        replace(TINY, latent_size=(12, 12), patch=4, latent_channels=3, heads=2, blocks=2, classes=4),
        replace(TINY, width=384, heads=6, blocks=1, patch=1, latent_size=(4, 4)),
    ],
    ids=["learned sigma", "epsilon only", "patch 4", "DiT-S's width"],
)
def test_output_matches_the_reference(
    spec: DiTSpec, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEADS, spec.width, spec.heads)
    state = random_state(spec)
    model = load_transformer(save_state(state, tmp_path, suffix))
    assert model.spec == spec
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    found, routes = model(*inputs(spec), 1)
    expected = reference_forward(state, spec.heads, *inputs(spec))
    assert found.shape == expected.shape == (3, spec.out_channels, *spec.latent_size)
    assert relative_error(found, expected) < 2e-5
    assert routes.shape == (3, 0, spec.visual_tokens)


def test_reference_depends_on_every_weight_and_input() -> None:
    """Otherwise the test above would not notice a misplaced tensor."""
    state = random_state(TINY)
    expected = reference_forward(state, TINY.heads, *inputs())
    for name, value in state.items():
        changed_value = value.flatten().flip(0).reshape(value.shape) + 0.1
        changed = reference_forward(state | {name: changed_value}, TINY.heads, *inputs())
        assert relative_error(changed, expected) > 1e-4, name
    latents, timestep, label = inputs()
    for other in (
        (latents + 0.1, timestep, label),
        (latents, timestep + 1, label),
        (latents, timestep, label.flip(0)),
    ):
        assert relative_error(reference_forward(state, TINY.heads, *other), expected) > 1e-4


def test_position_table_matches_the_reference_and_a_stored_one_is_used(tmp_path: Path) -> None:
    for side, width in ((4, 48), (16, 1152)):
        expected = reference_positions(side, width).reshape(side, side, width)
        for rows, columns in ((side, side), (side, side - 1), (1, side)):
            ours = position_table((rows, columns), width).numpy().reshape(rows, columns, width)
            # Up to float32 rounding.
            np.testing.assert_allclose(ours, expected[:rows, :columns], rtol=0, atol=6e-8)
    state = random_state(TINY)
    state["pos_embed"] = state["pos_embed"] * 0.5
    model = load_transformer(save_state(state, tmp_path))
    assert torch.equal(model.positions, state["pos_embed"][0])
    assert relative_error(model(*inputs(), 1)[0], reference_forward(state, TINY.heads, *inputs())) < 2e-5


def test_patches_round_trip() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = to_patches(x, 2)
    assert tokens[1, 5].tolist() == x[1, :, 2:4, 4:6].flatten().tolist()
    assert torch.equal(from_patches(tokens, 2, (2, 3)), x)


def test_untrained_model_predicts_zero() -> None:
    prediction, _ = DiT(TINY).eval()(*inputs(), 1)
    assert prediction.shape == (3, 8, 8, 8)
    assert not prediction.any()


def test_untrained_adapters_change_nothing_at_any_depth(tmp_path: Path) -> None:
    path = save_state(random_state(TINY), tmp_path)
    base = load_transformer(path)
    thinking = attach(load_transformer(path), THINKING)
    assert thinking.spec == replace(TINY, thinking=THINKING)
    expected, _ = base(*inputs(), 1)
    for depth in (1, 2):
        found, routes = thinking(*inputs(), depth)
        assert torch.equal(found, expected)
        assert routes.shape == (3, 2 * depth, TINY.visual_tokens)
        assert routes.dtype == torch.int64
    # The same with thinking blocks that are created with the model, not attached.
    built = DiT(replace(TINY, thinking=THINKING)).eval()
    missing, unknown = built.load_state_dict(base.state_dict(), strict=False)
    assert not unknown and all(".thinking." in name for name in missing)
    assert torch.equal(built(*inputs(), 2)[0], expected)


def test_thinking_matches_the_papers_recursion_over_self_attention(tmp_path: Path) -> None:
    """As in method.md: a = attention(LoRA(a)) + x before the last step, then W x + LoRA(a); written out for one block."""
    spec = replace(TINY, blocks=1)
    state = random_state(spec)
    thinking = replace(THINKING, blocks=(0,))
    model = random_experts(attach(load_transformer(save_state(state, tmp_path)), thinking))
    block = model.blocks[0]
    thinking_module = block.thinking
    calls: list[tuple[Tensor, Tensor, int, Tensor]] = []

    def record(module: torch.nn.Module, args: tuple, outputs: tuple) -> None:
        calls.append((args[0], args[1], args[2], outputs[0]))

    handle = thinking_module.register_forward_hook(record)
    _, routes = model(*inputs(), 2)
    handle.remove()
    [(x, condition, depth, found)] = calls
    assert depth == 2
    embedded = model.time(sinusoid(inputs()[1], 256)) + model.classes(inputs()[2])
    torch.testing.assert_close(
        condition, torch.nn.functional.silu(embedded).unsqueeze(1) @ thinking_module.gate.condition.weight.T
    )

    def expert(a: Tensor, step: int) -> Tensor:
        rows = torch.empty(*a.shape[:2], 3 * 48)
        for i in range(a.shape[0]):
            for n in range(a.shape[1]):
                e = int(routes[i, step, n])
                h = torch.nn.functional.layer_norm(
                    thinking_module.scale[step] * a[i, n] + thinking_module.shift[step], (48,)
                )
                rows[i, n] = h @ thinking_module.a[e] @ thinking_module.b[e]
        return rows

    q, k, v = expert(x, 0).reshape(3, 16, 3, 4, 12).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(12), dim=-1)
    state_2 = (weights @ v).transpose(1, 2).flatten(2) + x
    assert torch.equal(routes[:, 1], thinking_module.gate(state_2, condition).argmax(-1))
    base = x @ state["blocks.0.attn.qkv.weight"].T + state["blocks.0.attn.qkv.bias"]
    torch.testing.assert_close(found, base + expert(state_2, 1), rtol=1e-4, atol=1e-5)


def test_output_depends_on_depth_and_routes_on_the_class(tmp_path: Path) -> None:
    model = random_experts(attach(load_transformer(save_state(random_state(TINY), tmp_path)), THINKING))
    latents, timestep, label = inputs()
    shallow, deep = (model(latents, timestep, label, depth)[0] for depth in (1, 2))
    assert relative_error(shallow, deep.double()) > 1e-3
    routes = model(latents, timestep, label, 2)[1]
    assert routes.unique().numel() > 1
    assert not torch.equal(routes, model(latents, timestep, label.flip(0), 2)[1])
    with pytest.raises(ValueError, match=r"depth of 1\.\.2, got 3"):
        model(latents, timestep, label, 3)


def test_sampling_with_the_runtime_matches_the_reference(tmp_path: Path) -> None:
    """Twenty guided DDPM steps: imported model and numpy sampler, compared with the reference and a posterior of its own."""
    state = random_state(TINY)
    state["final_layer.linear.weight"] *= 0.3
    model = load_transformer(save_state(state, tmp_path))
    shape, seeds, steps, guidance = (4, 8, 8), [1, 2], 20, 4.0
    labels, null = torch.tensor([3, 7]), torch.tensor([10, 10])

    def prediction(x: Array, t: float) -> Array:
        latents, times = torch.from_numpy(x).repeat(2, 1, 1, 1), torch.full((4,), t)
        negative, positive = model(latents, times, torch.cat([null, labels]), 1)[0].chunk(2)
        return apply_guidance(negative.numpy(), positive.numpy(), guidance, 3)

    schedule = respaced_schedule(steps)
    trajectory = ddpm(prediction, batch_noise(seeds, shape), schedule, lambda k: batch_noise(seeds, shape, k))
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x = torch.from_numpy(batch_noise(seeds, shape)).double()
    for k, found in enumerate(trajectory):
        abar_now = abar[int(schedule.timesteps[k])]
        abar_next = abar[int(schedule.timesteps[k + 1])] if k + 1 < steps else 1.0
        times = torch.full((2,), schedule.timesteps[k])
        positive, negative = (
            reference_forward(state, TINY.heads, x.float(), times, label) for label in (labels, null)
        )
        eps = torch.cat(
            [negative[:, :3] + guidance * (positive[:, :3] - negative[:, :3]), positive[:, 3:4]], 1
        )
        beta = 1 - abar_now / abar_next
        # Ho et al. 2020, equation 11.
        x = (x - beta / math.sqrt(1 - abar_now) * eps) / math.sqrt(1 - beta)
        if k + 1 < steps:
            fraction = (positive[:, 4:] + 1) / 2
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(
                beta * (1 - abar_next) / (1 - abar_now)
            )
            noise = torch.from_numpy(batch_noise(seeds, shape, k + 1)).double()
            x = x + (0.5 * log_variance).exp() * noise
        assert relative_error(torch.from_numpy(found), x) < 1e-4


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_precision_is_kept_except_in_embedders_and_gates(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in random_state(TINY).items()}
    model = attach(load_transformer(save_state(state, tmp_path)), THINKING)
    float32_ids = {
        id(p) for part in model.modules() if isinstance(part, Gate | Embedder) for p in part.parameters()
    }
    assert float32_ids
    for parameter in [*model.parameters(), *model.buffers()]:
        assert parameter.dtype == (torch.float32 if id(parameter) in float32_ids else dtype)
    latents, timestep, label = inputs()
    found, _ = model(latents.to(dtype), timestep, label, 2)
    assert found.dtype == dtype
    bound = {torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
    assert relative_error(found, reference_forward(state, TINY.heads, latents, timestep, label)) < bound


def test_an_embedder_stored_in_float32_is_not_rounded(tmp_path: Path) -> None:
    """Also if the other weights are stored in float16."""
    state = {n: v if n.startswith("t_embedder") else v.half() for n, v in random_state(TINY).items()}
    model = load_transformer(save_state(state, tmp_path))
    assert model.patch_in.weight.dtype == torch.float16
    assert torch.equal(model.time.linear_1.weight, state["t_embedder.mlp.0.weight"])


# Released sizes


class Shapes(Tensors):
    """A checkpoint of meta tensors, with shapes only."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        def reader(shape: tuple[int, ...]) -> Callable[[], Tensor]:
            return lambda: torch.empty(shape, device="meta")

        super().__init__(Path("DiT.pt"), {name: reader(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("width", "heads", "blocks", "size", "millions"),
    [
        (1152, 16, 28, 32, 675),
        (1152, 16, 28, 64, 676),  # 768 more positions
        (1024, 16, 24, 32, 458),
        (768, 12, 12, 32, 130),
        (384, 6, 12, 32, 33),
    ],
    ids=["XL/2", "XL/2 at 512 px", "L/2", "B/2", "S/2"],
)
def test_released_sizes_are_read_from_their_shapes(
    width: int, heads: int, blocks: int, size: int, millions: int
) -> None:
    """Parameter counts as in table 1 of the paper."""
    spec = DiTSpec(width=width, heads=heads, blocks=blocks, latent_size=(size, size))
    names = reference_shapes(spec)
    assert shapes_of(spec) == names
    model = transformer_from_tensors(Shapes(names))
    assert model.spec == spec
    parameters = sum(value.numel() for value in model.state_dict().values())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.6)
    assert HEADS[width] == heads


def test_xl_2_has_the_tensors_of_the_original() -> None:
    names = shapes_of(DiTSpec())
    assert len(names) == 292
    assert names["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert names["pos_embed"] == (1, 256, 1152)
    assert names["final_layer.linear.weight"] == (32, 1152)
    assert {int(name.split(".")[1]) for name in names if name.startswith("blocks.")} == set(range(28))
    assert sum(math.prod(shape) for shape in names.values()) == 675_129_632


def test_xl_2_shapes_match_the_diffusers_port() -> None:
    """Names and numbers of tensors differ from the port's, the shapes of weights do not."""
    beside = Path(__file__).parents[3] / "shared/data"
    path = Path(os.environ.get("TPX_DATA", beside)) / "diffusers/diffusers_0.42.1_full_shapes.json"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set TPX_DATA to the folder that holds diffusers/")
    port = {name: tuple(shape) for name, shape in json.loads(path.read_text())["dit-xl-2-256"].items()}
    expected = shapes_of(DiTSpec())
    pairs = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    compared = set()
    for n in range(28):
        block, emb = f"transformer_blocks.{n}", f"transformer_blocks.{n}.norm1.emb"
        pairs |= {
            f"{emb}.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{emb}.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{emb}.class_embedder.embedding_table": "y_embedder.embedding_table",
            f"{block}.norm1.linear": f"blocks.{n}.adaLN_modulation.1",
            f"{block}.attn1.to_out.0": f"blocks.{n}.attn.proj",
            f"{block}.ff.net.0.proj": f"blocks.{n}.mlp.fc1",
            f"{block}.ff.net.2": f"blocks.{n}.mlp.fc2",
        }
        for part in ("weight", "bias"):
            qkv_shapes = [port[f"{block}.attn1.to_{letter}.{part}"] for letter in "qkv"]
            name = f"blocks.{n}.attn.qkv.{part}"
            assert expected[name] == (3 * qkv_shapes[0][0], *qkv_shapes[0][1:])
            compared.add(name)
    for port_name, name in pairs.items():
        for part in ("weight", "bias"):
            if f"{port_name}.{part}" in port:
                assert expected[f"{name}.{part}"] == port[f"{port_name}.{part}"]
                compared.add(f"{name}.{part}")
    assert expected.keys() - compared == {"pos_embed"}


# Errors


def error_message(state: State, folder: Path) -> str:
    with pytest.raises(CheckpointInvalid) as caught:
        load_transformer(save_state(state, folder))
    message = str(caught.value)
    assert "\n" not in message and "expected" in message and "found" in message
    assert "DiT.pt" in message
    return message


def test_error_lists_all_missing_and_unknown_tensors(tmp_path: Path) -> None:
    state = random_state(TINY)
    missing = ("blocks.1.attn.qkv.weight", "t_embedder.mlp.2.bias", "final_layer.linear.bias")
    for name in missing:
        del state[name]
    state |= {"extra.weight": torch.zeros(1), "blocks.0.attn.q_norm.weight": torch.zeros(12)}
    message = error_message(state, tmp_path)
    assert all(f"{name} missing" in message for name in missing)
    assert "extra.weight unknown" in message and "blocks.0.attn.q_norm.weight unknown" in message
    assert "found 5 " in message


def test_error_names_a_missing_block(tmp_path: Path) -> None:
    state = {n: v for n, v in random_state(TINY).items() if not n.startswith("blocks.1.")}
    message = error_message(state, tmp_path)
    assert "; blocks.1.attn.qkv.bias missing; and 15 more" in message
    assert "blocks.0.attn.qkv.bias missing" in error_message(
        {n: v for n, v in state.items() if not n.startswith("blocks.")}, tmp_path
    )


@pytest.mark.parametrize("name", list(reference_shapes(replace(TINY, blocks=1))))
def test_error_for_a_wrong_shape_or_dtype_names_a_tensor(name: str, tmp_path: Path) -> None:
    """Not always the same one: sizes are read from four tensors, whose errors show in the shapes of others."""
    state = random_state(replace(TINY, blocks=1))
    for change in (state[name][:0], state[name][..., :-1], state[name].unsqueeze(0), state[name].long()):
        message = error_message(state | {name: change.contiguous()}, tmp_path)
        assert any(word in message for word in reference_shapes(TINY))


def test_rejects_other_and_damaged_checkpoints(tmp_path: Path) -> None:
    port = {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}
    assert "diffusers' port" in error_message(port, tmp_path)
    message = error_message({"x": torch.zeros(2)}, tmp_path)
    assert all(
        name in message for name in ("pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight")
    )
    state = random_state(TINY)
    assert "square" in error_message(state | {"pos_embed": state["pos_embed"][:, :15].contiguous()}, tmp_path)
    assert "rows" in error_message(
        state
        | {"final_layer.linear.weight": torch.zeros(24, 48), "final_layer.linear.bias": torch.zeros(24)},
        tmp_path,
    )
    path = save_state(state, tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointInvalid, match="expected"):
        load_transformer(path)
    with pytest.raises(CheckpointInvalid, match="found none"):
        load_transformer(tmp_path / "no.pt")


def test_training_checkpoint_loads_its_ema_weights(tmp_path: Path) -> None:
    ema, other = random_state(TINY, 1), random_state(TINY, 2)
    torch.save({"model": other, "ema": ema}, tmp_path / "0400000.pt")
    model = load_transformer(tmp_path / "0400000.pt")
    assert relative_error(model(*inputs(), 1)[0], reference_forward(ema, TINY.heads, *inputs())) < 2e-5


def test_rejects_a_width_with_an_unknown_number_of_heads(tmp_path: Path) -> None:
    path = save_state(random_state(replace(TINY, width=40)), tmp_path)
    with pytest.raises(BadInput, match="1152, 1024, 768, 384, 48, found 40"):
        load_transformer(path)


def test_rejects_an_invalid_spec() -> None:
    for changes, message in (
        ({"heads": 5}, "divisible by heads .* 48 and 5"),
        ({"latent_size": (8, 7)}, r"latent_size divisible by patch, got \[8, 7\] and 2"),
        ({"latent_size": (0, 8)}, r"latent_size divisible by patch, got \[0, 8\] and 2"),
        ({"classes": 0}, "classes of 1 or more"),
        ({"thinking": ThinkingSpec(blocks=(3,))}, r"within 0\.\.2"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)  # type: ignore[arg-type]


def test_conversions_cover_the_state_and_use_every_tensor_once() -> None:
    recipe = conversions(TINY)
    assert recipe.keys() == DiT(TINY).state_dict().keys()
    names = [name for entry in recipe.values() for name in entry.names]
    assert sorted(names) == sorted(reference_shapes(TINY))
    assert spec_from_tensors(Shapes(reference_shapes(TINY))) == TINY


# Export


def onnx_runners(model: DiT, depth: int, folder: Path) -> list[Callable[..., list[Tensor]]]:
    """Functions that run `model` in ONNX Runtime with the exporter's graphs, one for each body of the routing operator."""
    thinking = model.spec.thinking
    outputs = ("epsilon", "routes") if thinking else ("epsilon",)
    latents, timestep, label = inputs(model.spec, 2)
    condition_inputs = {"timestep": timestep, "class_id": label}
    onnx.save(
        onnx_ir.to_proto(to_onnx(Graph(ConditionsGraph(model), condition_inputs, ("conditions",)))),
        folder / "conditions.onnx",
    )
    conditions_session = onnxruntime.InferenceSession(
        folder / "conditions.onnx", providers=["CPUExecutionProvider"]
    )
    assert {value.name: value.type for value in conditions_session.get_inputs()}[
        "class_id"
    ] == "tensor(int64)"
    example = {"latents": latents, "conditions": model.conditions(timestep, label)}
    graph = Graph(TransformerGraph(model, depth, bool(thinking)), example, outputs)
    proto = onnx_ir.to_proto(to_onnx(graph))
    runs = []
    for body in (masked(), permuted(thinking.experts)) if thinking else (None,):
        del proto.functions[:]
        proto.functions.extend([body] if body else [])
        onnx.save(proto, folder / "model.onnx")
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

        def run(*model_inputs: Tensor, session: onnxruntime.InferenceSession = session) -> list[Tensor]:
            x, *inputs = (value.numpy() for value in model_inputs)
            [conditions] = conditions_session.run(None, dict(zip(condition_inputs, inputs, strict=True)))
            found = session.run(None, {"latents": x, "conditions": conditions})
            return [torch.from_numpy(np.asarray(value)) for value in found]

        runs.append(run)
    return runs


def test_onnx_runtime_matches_pytorch_at_depth_2(tmp_path: Path) -> None:
    model = random_experts(attach(load_transformer(save_state(random_state(TINY), tmp_path)), THINKING))
    for run in onnx_runners(model, 2, tmp_path):
        for batch in (1, 2, 3):
            expected, routes = model(*inputs(batch=batch), 2)
            found, found_routes = run(*inputs(batch=batch))
            assert relative_error(found, expected.double()) < 1e-4
            assert torch.equal(found_routes, routes)
            assert routes.unique().numel() > 1


def test_onnx_runtime_matches_pytorch_without_thinking(tmp_path: Path) -> None:
    spec = replace(TINY, blocks=1, learned_sigma=False)
    model = load_transformer(save_state(random_state(spec), tmp_path))
    [run] = onnx_runners(model, 1, tmp_path)
    [found] = run(*inputs())
    assert relative_error(found, model(*inputs(), 1)[0].double()) < 1e-4


def test_onnx_runtime_matches_pytorch_after_a_cast_to_another_precision(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in random_state(TINY).items()}
    model = cast_to_precision(load_transformer(save_state(state, tmp_path)), "fp32")
    for run in onnx_runners(model, 1, tmp_path):
        found = run(*inputs())[0]
        assert relative_error(found, model(*inputs(), 1)[0].double()) < 1e-4
