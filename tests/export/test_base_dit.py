"""DiT imported from original checkpoints: `original` below is its forward pass in the original's own parameter names.

Written out from the paper (2212.09748, adaLN-zero blocks) in elementary operations and float64.
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
from tpx_export.graphs import ConditionsGraph, Graph, TransformerGraph, to_onnx
from tpx_export.model.dit import DiT, DiTSpec, position_table
from tpx_export.model.embedder import Embedder, sinusoid
from tpx_export.model.patches import from_patches, to_patches
from tpx_export.model.thinking import Gate, Thinking, ThinkingSpec
from tpx_export.precision import cast_to_precision
from tpx_export.routing import masked, permuted
from tpx_runtime.errors import BadInput
from tpx_runtime.guidance import apply_guidance
from tpx_runtime.noise import batch_noise
from tpx_runtime.sampling import Array
from tpx_runtime.sampling.diffusion import ddpm, respaced_schedule

State = dict[str, Tensor]
TINY = DiTSpec(latent_channels=4, latent_size=8, patch=2, width=48, heads=4, blocks=3, classes=10)
THINKING = ThinkingSpec(blocks=(0, 2), experts=3, rank=4, max_depth=2)


@pytest.fixture(autouse=True, scope="module")
def two_threads_without_gradients() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def tiny_has_four_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its width is of no released DiT."""
    monkeypatch.setitem(HEADS, TINY.width, TINY.heads)


# The reference.


def original_names(spec: DiTSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original's state dict, from interop facts alone."""
    d, p, c = spec.width, spec.patch, spec.latent_channels
    tokens = (spec.latent_size // p) ** 2
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


def original_positions(side: int, width: int) -> np.ndarray:
    """One token and one channel at a time: column in the first half, row in the second; sines, then cosines."""
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
    """Every weight random and of consequence, the positions as the original stores them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in original_names(spec).items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 25
        state[name] = torch.randn(shape, generator=generator) * fan_in**-0.5
    table = original_positions(spec.latent_size // spec.patch, spec.width)
    return state | {"pos_embed": torch.from_numpy(table).float().unsqueeze(0)}


def original(state: State, heads: int, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
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
    shape = (batch, spec.latent_channels, spec.latent_size, spec.latent_size)
    label = torch.tensor([spec.classes, 0, spec.classes - 1, 1])[:batch]  # the first is the null class
    return torch.randn(shape, generator=generator), torch.tensor([999.0, 0.0, 427.0, 3.0])[:batch], label


def saved(state: State, folder: Path, suffix: str = ".pt") -> Path:
    path = folder / f"DiT{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def random_experts(model: DiT) -> DiT:
    """Thinking away from its start, where it changes nothing."""
    torch.manual_seed(5)
    for part in model.modules():
        if isinstance(part, Thinking):
            part.b.normal_(std=0.3)
            part.scale.normal_(1, 0.3)
            part.shift.normal_(std=0.3)
    return model


# What is computed.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        replace(TINY, learned_sigma=False),
        replace(TINY, latent_size=12, patch=4, latent_channels=3, heads=2, blocks=2, classes=4),
        replace(TINY, width=384, heads=6, blocks=1, patch=1, latent_size=4),
    ],
    ids=["learned sigma", "epsilon alone", "patch 4", "DiT-S's width"],
)
def test_computes_what_the_original_computes(
    spec: DiTSpec, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEADS, spec.width, spec.heads)
    state = random_state(spec)
    model = load_transformer(saved(state, tmp_path, suffix))
    assert model.spec == spec
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    found, routes = model(*inputs(spec), 1)
    expected = original(state, spec.heads, *inputs(spec))
    assert found.shape == expected.shape == (3, spec.out_channels, *[spec.latent_size] * 2)
    assert error(found, expected) < 2e-5
    assert routes.shape == (3, 0, spec.visual_tokens)


def test_every_weight_and_input_matters() -> None:
    """Else the test above would not see a tensor that went to the wrong place."""
    state = random_state(TINY)
    expected = original(state, TINY.heads, *inputs())
    for name, value in state.items():
        turned = value.flatten().flip(0).reshape(value.shape) + 0.1
        changed = original(state | {name: turned}, TINY.heads, *inputs())
        assert error(changed, expected) > 1e-4, name
    latents, timestep, label = inputs()
    for other in (
        (latents + 0.1, timestep, label),
        (latents, timestep + 1, label),
        (latents, timestep, label.flip(0)),
    ):
        assert error(original(state, TINY.heads, *other), expected) > 1e-4


def test_position_table_is_the_originals_and_the_stored_one_is_used(tmp_path: Path) -> None:
    for side, width in ((4, 48), (16, 1152)):
        ours = position_table(side, width).numpy()
        np.testing.assert_allclose(
            ours, original_positions(side, width), rtol=0, atol=6e-8
        )  # float32's rounding
    state = random_state(TINY)
    state["pos_embed"] = state["pos_embed"] * 0.5
    model = load_transformer(saved(state, tmp_path))
    assert torch.equal(model.positions, state["pos_embed"][0])
    assert error(model(*inputs(), 1)[0], original(state, TINY.heads, *inputs())) < 2e-5


def test_patches_and_back() -> None:
    x = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6)
    tokens = to_patches(x, 2)
    assert tokens[1, 5].tolist() == x[1, :, 2:4, 4:6].flatten().tolist()
    assert torch.equal(from_patches(tokens, 2, 3), x)


def test_a_fresh_model_predicts_zero() -> None:
    prediction, _ = DiT(TINY).eval()(*inputs(), 1)
    assert prediction.shape == (3, 8, 8, 8)
    assert not prediction.any()


def test_fresh_adapters_change_nothing_at_any_depth(tmp_path: Path) -> None:
    path = saved(random_state(TINY), tmp_path)
    base = load_transformer(path)
    thinking = attach(load_transformer(path), THINKING)
    assert thinking.spec == replace(TINY, thinking=THINKING)
    expected, _ = base(*inputs(), 1)
    for depth in (1, 2):
        found, routes = thinking(*inputs(), depth)
        assert torch.equal(found, expected)
        assert routes.shape == (3, 2 * depth, TINY.visual_tokens)
        assert routes.dtype == torch.int64
    built = DiT(replace(TINY, thinking=THINKING)).eval()  # not attached, but made so
    missing, unknown = built.load_state_dict(base.state_dict(), strict=False)
    assert not unknown and all(".thinking." in name for name in missing)
    assert torch.equal(built(*inputs(), 2)[0], expected)


def test_thinking_is_the_papers_recursion_over_self_attention(tmp_path: Path) -> None:
    """method: a = attention(LoRA(a)) + x before the last step, then W x + LoRA(a); written out for one block."""
    spec = replace(TINY, blocks=1)
    state = random_state(spec)
    thinking = replace(THINKING, blocks=(0,))
    model = random_experts(attach(load_transformer(saved(state, tmp_path)), thinking))
    block = model.blocks[0]
    part = block.thinking
    calls: list[tuple[Tensor, Tensor, int, Tensor]] = []

    def watch(module: torch.nn.Module, given: tuple, out: tuple) -> None:
        calls.append((given[0], given[1], given[2], out[0]))

    handle = part.register_forward_hook(watch)
    _, routes = model(*inputs(), 2)
    handle.remove()
    [(x, seen, depth, found)] = calls
    assert depth == 2
    embedded = model.time(sinusoid(inputs()[1], 256)) + model.classes(inputs()[2])
    torch.testing.assert_close(
        seen, torch.nn.functional.silu(embedded).unsqueeze(1) @ part.gate.condition.weight.T
    )

    def expert(a: Tensor, step: int) -> Tensor:
        rows = torch.empty(*a.shape[:2], 3 * 48)
        for i in range(a.shape[0]):
            for n in range(a.shape[1]):
                e = int(routes[i, step, n])
                h = torch.nn.functional.layer_norm(part.scale[step] * a[i, n] + part.shift[step], (48,))
                rows[i, n] = h @ part.a[e] @ part.b[e]
        return rows

    q, k, v = expert(x, 0).reshape(3, 16, 3, 4, 12).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(12), dim=-1)
    state_2 = (weights @ v).transpose(1, 2).flatten(2) + x
    assert torch.equal(routes[:, 1], part.gate(state_2, seen).argmax(-1))
    base = x @ state["blocks.0.attn.qkv.weight"].T + state["blocks.0.attn.qkv.bias"]
    torch.testing.assert_close(found, base + expert(state_2, 1), rtol=1e-4, atol=1e-5)


def test_depth_and_class_reach_answer_and_routes(tmp_path: Path) -> None:
    model = random_experts(attach(load_transformer(saved(random_state(TINY), tmp_path)), THINKING))
    latents, timestep, label = inputs()
    shallow, deep = (model(latents, timestep, label, depth)[0] for depth in (1, 2))
    assert error(shallow, deep.double()) > 1e-3
    routes = model(latents, timestep, label, 2)[1]
    assert routes.unique().numel() > 1
    assert not torch.equal(routes, model(latents, timestep, label.flip(0), 2)[1])
    with pytest.raises(ValueError, match=r"depth of 1\.\.2, got 3"):
        model(latents, timestep, label, 3)


def test_sampling_through_the_runtime_is_the_originals(tmp_path: Path) -> None:
    """Twenty guided DDPM steps: imported model and numpy sampler, against the reference forward and its own posterior."""
    state = random_state(TINY)
    state["final_layer.linear.weight"] *= 0.3
    model = load_transformer(saved(state, tmp_path))
    shape, seeds, steps, guidance = (4, 8, 8), [1, 2], 20, 4.0
    given, null = torch.tensor([3, 7]), torch.tensor([10, 10])

    def prediction(x: Array, t: float) -> Array:
        latents, times = torch.from_numpy(x).repeat(2, 1, 1, 1), torch.full((4,), t)
        negative, positive = model(latents, times, torch.cat([null, given]), 1)[0].chunk(2)
        return apply_guidance(negative.numpy(), positive.numpy(), guidance, 3)

    schedule = respaced_schedule(steps)
    path = ddpm(prediction, batch_noise(seeds, shape), schedule, lambda k: batch_noise(seeds, shape, k))
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x = torch.from_numpy(batch_noise(seeds, shape)).double()
    for k, found in enumerate(path):
        now = abar[int(schedule.timesteps[k])]
        then = abar[int(schedule.timesteps[k + 1])] if k + 1 < steps else 1.0
        times = torch.full((2,), schedule.timesteps[k])
        positive, negative = (original(state, TINY.heads, x.float(), times, label) for label in (given, null))
        eps = torch.cat(
            [negative[:, :3] + guidance * (positive[:, :3] - negative[:, :3]), positive[:, 3:4]], 1
        )
        beta = 1 - now / then
        x = (x - beta / math.sqrt(1 - now) * eps) / math.sqrt(1 - beta)  # Ho et al. 2020, equation 11
        if k + 1 < steps:
            share = (positive[:, 4:] + 1) / 2
            log_variance = share * math.log(beta) + (1 - share) * math.log(beta * (1 - then) / (1 - now))
            noise = torch.from_numpy(batch_noise(seeds, shape, k + 1)).double()
            x = x + (0.5 * log_variance).exp() * noise
        assert error(torch.from_numpy(found), x) < 1e-4


# Precisions.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_precision_is_kept_but_for_embedder_and_gate(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in random_state(TINY).items()}
    model = attach(load_transformer(saved(state, tmp_path)), THINKING)
    wide = {id(p) for part in model.modules() if isinstance(part, Gate | Embedder) for p in part.parameters()}
    assert wide
    for parameter in [*model.parameters(), *model.buffers()]:
        assert parameter.dtype == (torch.float32 if id(parameter) in wide else dtype)
    latents, timestep, label = inputs()
    found, _ = model(latents.to(dtype), timestep, label, 2)
    assert found.dtype == dtype
    bound = {torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
    assert error(found, original(state, TINY.heads, latents, timestep, label)) < bound


# The released sizes.


class Shapes(Tensors):
    """A checkpoint of shapes alone."""

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
    """Parameters as the paper's table 1 has them."""
    spec = DiTSpec(width=width, heads=heads, blocks=blocks, latent_size=size)
    names = original_names(spec)
    assert shapes_of(spec) == names
    model = transformer_from_tensors(Shapes(names))
    assert model.spec == spec
    parameters = sum(value.numel() for value in model.state_dict().values())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.6)
    assert HEADS[width] == heads


def test_xl_2_has_the_originals_tensors() -> None:
    names = shapes_of(DiTSpec())
    assert len(names) == 292
    assert names["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert names["pos_embed"] == (1, 256, 1152)
    assert names["final_layer.linear.weight"] == (32, 1152)
    assert {int(name.split(".")[1]) for name in names if name.startswith("blocks.")} == set(range(28))
    assert sum(math.prod(shape) for shape in names.values()) == 675_129_632


def test_xl_2_has_the_shapes_of_diffusers_port() -> None:
    """The port's names and numbers differ, its weights' shapes do not."""
    beside = Path(__file__).parents[3] / "shared/data"
    path = Path(os.environ.get("TPX_DATA", beside)) / "diffusers/diffusers_0.42.1_full_shapes.json"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set TPX_DATA to the folder that holds diffusers/")
    port = {name: tuple(shape) for name, shape in json.loads(path.read_text())["dit-xl-2-256"].items()}
    ours = shapes_of(DiTSpec())
    pairs = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    seen = set()
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
            thirds = [port[f"{block}.attn1.to_{letter}.{part}"] for letter in "qkv"]
            name = f"blocks.{n}.attn.qkv.{part}"
            assert ours[name] == (3 * thirds[0][0], *thirds[0][1:])
            seen.add(name)
    for theirs, name in pairs.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in port:
                assert ours[f"{name}.{part}"] == port[f"{theirs}.{part}"]
                seen.add(f"{name}.{part}")
    assert ours.keys() - seen == {"pos_embed"}


# What is refused.


def refusal(state: State, folder: Path) -> str:
    with pytest.raises(CheckpointInvalid) as caught:
        load_transformer(saved(state, folder))
    message = str(caught.value)
    assert "\n" not in message and "expected" in message and "found" in message
    assert "DiT.pt" in message
    return message


def test_missing_and_unknown_tensors_are_all_listed(tmp_path: Path) -> None:
    state = random_state(TINY)
    gone = ("blocks.1.attn.qkv.weight", "t_embedder.mlp.2.bias", "final_layer.linear.bias")
    for name in gone:
        del state[name]
    state |= {"extra.weight": torch.zeros(1), "blocks.0.attn.q_norm.weight": torch.zeros(12)}
    message = refusal(state, tmp_path)
    assert all(f"{name} missing" in message for name in gone)
    assert "extra.weight unknown" in message and "blocks.0.attn.q_norm.weight unknown" in message
    assert "found 5 " in message


def test_a_block_that_is_left_out_is_named(tmp_path: Path) -> None:
    state = {n: v for n, v in random_state(TINY).items() if not n.startswith("blocks.1.")}
    message = refusal(state, tmp_path)
    assert "blocks.1.attn.qkv.weight missing" in message and "blocks.2.attn.qkv.weight unknown" in message
    assert "blocks.0.attn.qkv.weight missing" in refusal(
        {n: v for n, v in state.items() if not n.startswith("blocks.")}, tmp_path
    )


@pytest.mark.parametrize("name", list(original_names(replace(TINY, blocks=1))))
def test_a_tensor_of_another_shape_is_named(name: str, tmp_path: Path) -> None:
    """Also the four that sizes are read from, whose fault shows in other tensors, one of which is named."""
    state = random_state(replace(TINY, blocks=1))
    for change in (state[name][:0], state[name][..., :-1], state[name].unsqueeze(0), state[name].long()):
        message = refusal(state | {name: change.contiguous()}, tmp_path)
        assert any(word in message for word in original_names(TINY))


def test_files_of_other_kinds(tmp_path: Path) -> None:
    port = {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}
    assert "diffusers' port" in refusal(port, tmp_path)
    message = refusal({"x": torch.zeros(2)}, tmp_path)
    assert all(
        name in message for name in ("pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight")
    )
    state = random_state(TINY)
    assert "square" in refusal(state | {"pos_embed": state["pos_embed"][:, :15].contiguous()}, tmp_path)
    assert "rows" in refusal(
        state
        | {"final_layer.linear.weight": torch.zeros(24, 48), "final_layer.linear.bias": torch.zeros(24)},
        tmp_path,
    )
    path = saved(state, tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointInvalid, match="expected"):
        load_transformer(path)
    with pytest.raises(CheckpointInvalid, match="found none"):
        load_transformer(tmp_path / "no.pt")


def test_a_training_checkpoint_gives_its_ema(tmp_path: Path) -> None:
    ema, other = random_state(TINY, 1), random_state(TINY, 2)
    torch.save({"model": other, "ema": ema}, tmp_path / "0400000.pt")
    model = load_transformer(tmp_path / "0400000.pt")
    assert error(model(*inputs(), 1)[0], original(ema, TINY.heads, *inputs())) < 2e-5


def test_a_width_whose_heads_are_unknown_is_refused(tmp_path: Path) -> None:
    path = saved(random_state(replace(TINY, width=40)), tmp_path)
    with pytest.raises(BadInput, match="1152, 1024, 768, 384, 48, found 40"):
        load_transformer(path)


def test_a_specification_that_cannot_be_is_refused() -> None:
    for odd, message in (
        ({"heads": 5}, "divisible by heads .* 48/5"),
        ({"latent_size": 7}, "latent_size by patch, .* 7/2"),
        ({"classes": 0}, "classes of 1 or more"),
        ({"thinking": ThinkingSpec(blocks=(3,))}, r"within 0\.\.2"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **odd)  # type: ignore[arg-type]


def test_recipe_covers_the_state_and_every_name_once() -> None:
    made = conversions(TINY)
    assert made.keys() == DiT(TINY).state_dict().keys()
    names = [name for entry in made.values() for name in entry.names]
    assert sorted(names) == sorted(original_names(TINY))
    assert spec_from_tensors(Shapes(original_names(TINY))) == TINY


# Export.


def in_onnx(model: DiT, depth: int, folder: Path) -> list[Callable[..., list[Tensor]]]:
    """`model` in ONNX Runtime, through the exporter's own graph, once with each body of the routing operator."""
    thinking = model.spec.thinking
    outputs = ("epsilon", "routes") if thinking else ("epsilon",)
    latents, timestep, label = inputs(model.spec, 2)
    known = {"timestep": timestep, "class_id": label}
    onnx.save(
        onnx_ir.to_proto(to_onnx(Graph(ConditionsGraph(model), known, ("conditions",)))),
        folder / "conditions.onnx",
    )
    table = onnxruntime.InferenceSession(folder / "conditions.onnx", providers=["CPUExecutionProvider"])
    assert {value.name: value.type for value in table.get_inputs()}["class_id"] == "tensor(int64)"
    example = {"latents": latents, "conditions": model.conditions(timestep, label)}
    graph = Graph(TransformerGraph(model, depth, bool(thinking)), example, outputs)
    proto = onnx_ir.to_proto(to_onnx(graph))
    runs = []
    for body in (masked(), permuted(thinking.experts)) if thinking else (None,):
        del proto.functions[:]
        proto.functions.extend([body] if body else [])
        onnx.save(proto, folder / "model.onnx")
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

        def run(*given: Tensor, session: onnxruntime.InferenceSession = session) -> list[Tensor]:
            x, *inputs = (value.numpy() for value in given)
            [conditions] = table.run(None, dict(zip(known, inputs, strict=True)))
            found = session.run(None, {"latents": x, "conditions": conditions})
            return [torch.from_numpy(np.asarray(value)) for value in found]

        runs.append(run)
    return runs


def test_onnx_runtime_computes_the_same_at_depth_2(tmp_path: Path) -> None:
    model = random_experts(attach(load_transformer(saved(random_state(TINY), tmp_path)), THINKING))
    for run in in_onnx(model, 2, tmp_path):
        for batch in (1, 2, 3):
            expected, routes = model(*inputs(batch=batch), 2)
            found, found_routes = run(*inputs(batch=batch))
            assert error(found, expected.double()) < 1e-4
            assert torch.equal(found_routes, routes)
            assert routes.unique().numel() > 1


def test_onnx_of_a_model_that_does_not_think(tmp_path: Path) -> None:
    spec = replace(TINY, blocks=1, learned_sigma=False)
    model = load_transformer(saved(random_state(spec), tmp_path))
    [run] = in_onnx(model, 1, tmp_path)
    [found] = run(*inputs())
    assert error(found, model(*inputs(), 1)[0].double()) < 1e-4


def test_onnx_of_a_model_in_another_precision_than_the_stored_one(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in random_state(TINY).items()}
    model = cast_to_precision(load_transformer(saved(state, tmp_path)), "fp32")
    for run in in_onnx(model, 1, tmp_path):
        found = run(*inputs())[0]
        assert error(found, model(*inputs(), 1)[0].double()) < 1e-4
