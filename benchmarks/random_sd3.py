"""Writes a Stable Diffusion 3 transformer with random float16 weights and the tensor names and shapes of the release.

    python -m benchmarks.random_sd3 OUT --model sd3-medium [--layers N --heads H] [--adapters M --rank r --depth T]

writes OUT/transformer (config.json, shards of at most 1 GB, their index) one shard at a time, and OUT/tpx.safetensors with M
random experts in each thinking block. It replaces the real weights in measurements of exports and engines; its images are
meaningless. Normal weights with deviation 0.02, unit query-key norms and modulations of about 0.2 keep activations near 1 in
every block.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import click
import torch
from torch import Tensor

from tpx_export import adapters
from tpx_export.model import ThinkingSpec
from tpx_export.model.thinking import Thinking
from tpx_export.tensor_files import write_safetensors
from tpx_runtime.command import TpxCommand

HEAD_WIDTH, CONTEXT, POOLED, CHANNELS, PATCH = 64, 4096, 2048, 16, 2
SHARD_BYTES = 10**9
STEM = "diffusion_pytorch_model"
THINKING_BLOCKS = (4, 8, 12)  # arXiv 2604.25299


@dataclass(frozen=True)
class Size:
    """The sizes in which SD3 models differ; `table` is the side of the square of stored positions."""

    layers: int
    heads: int
    table: int
    qk_norm: bool
    dual: int  # the number of first blocks with a second attention

    @property
    def width(self) -> int:
        return self.heads * HEAD_WIDTH

    @property
    def thinking_blocks(self) -> tuple[int, ...]:
        """The paper's blocks, or the middle block of a model that has none of them."""
        return tuple(b for b in THINKING_BLOCKS if b < self.layers) or (self.layers // 2,)


SIZES = {
    "sd3-medium": Size(layers=24, heads=24, table=192, qk_norm=False, dual=0),
    "sd3.5-medium": Size(layers=24, heads=24, table=384, qk_norm=True, dual=13),
    "sd3.5-large": Size(layers=38, heads=38, table=192, qk_norm=True, dual=0),
}


def size_of(model: str, layers: int | None = None, heads: int | None = None) -> Size:
    """The model's size, optionally with other numbers of layers or heads; the share of dual blocks is kept."""
    full = SIZES[model]
    layers = layers or full.layers
    return replace(full, layers=layers, heads=heads or full.heads, dual=full.dual * layers // full.layers)


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of diffusers' SD3Transformer2DModel, by name."""
    d = size.width
    shape_of: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shape_of[f"{name}.weight"], shape_of[f"{name}.bias"] = (rows, columns), (rows,)

    shape_of["pos_embed.pos_embed"] = (1, size.table**2, d)
    shape_of["pos_embed.proj.weight"], shape_of["pos_embed.proj.bias"] = (d, CHANNELS, PATCH, PATCH), (d,)
    for name, columns in (("timestep", 256), ("text", POOLED)):
        linear(f"time_text_embed.{name}_embedder.linear_1", d, columns)
        linear(f"time_text_embed.{name}_embedder.linear_2", d, d)
    linear("context_embedder", d, CONTEXT)
    for index in range(size.layers):
        last, dual, block = index == size.layers - 1, index < size.dual, f"transformer_blocks.{index}"
        linear(f"{block}.norm1.linear", (9 if dual else 6) * d, d)
        linear(f"{block}.norm1_context.linear", (2 if last else 6) * d, d)
        projections = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"]
        for name in projections if last else [*projections, "to_add_out"]:
            linear(f"{block}.attn.{name}", d, d)
        for name in ("to_q", "to_k", "to_v", "to_out.0") if dual else ():
            linear(f"{block}.attn2.{name}", d, d)
        norms = ["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"]
        for name in [*norms, *(("attn2.norm_q", "attn2.norm_k") if dual else ())] if size.qk_norm else ():
            shape_of[f"{block}.{name}.weight"] = (HEAD_WIDTH,)
        for name in ("ff",) if last else ("ff", "ff_context"):
            linear(f"{block}.{name}.net.0.proj", 4 * d, d)
            linear(f"{block}.{name}.net.2", d, 4 * d)
    linear("norm_out.linear", 2 * d, d)
    linear("proj_out", PATCH**2 * CHANNELS, d)
    return shape_of


def config(size: Size) -> dict[str, object]:
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": PATCH,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": size.layers,
        "num_attention_heads": size.heads,
        "attention_head_dim": HEAD_WIDTH,
        "joint_attention_dim": CONTEXT,
        "caption_projection_dim": size.width,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": size.table,
        "dual_attention_layers": list(range(size.dual)),
        "qk_norm": "rms_norm" if size.qk_norm else None,
    }


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal float16 values: query-key norms around 1; deviation 0.2 for modulation biases, 0.5 for positions, else 0.02."""
    scale = 0.02
    if "norm" in name and name.endswith(".linear.bias"):
        scale = 0.2
    elif name == "pos_embed.pos_embed":
        scale = 0.5
    values = torch.empty(shape, dtype=torch.float16).normal_(std=scale, generator=generator)
    return values.add_(1) if ".norm_" in name else values


def _shards(tensor_shapes: dict[str, tuple[int, ...]], limit_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    used_bytes = 0
    for name, shape in tensor_shapes.items():
        size = 2 * prod(shape)
        if names and used_bytes + size > limit_bytes:
            yield names
            names, used_bytes = [], 0
        names.append(name)
        used_bytes += size
    yield names


def write_transformer(
    folder: Path,
    model: str,
    layers: int | None = None,
    heads: int | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a diffusers `transformer` folder of `model`, a key of SIZES; needs memory for one shard."""
    size, generator = size_of(model, layers, heads), torch.Generator().manual_seed(seed)
    tensor_shapes = shapes(size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(size), indent=2) + "\n", encoding="utf-8")
    shards = list(_shards(tensor_shapes, shard_bytes))
    files = [f"{STEM}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else [f"{STEM}.safetensors"]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: random_tensor(name, tensor_shapes[name], generator) for name in names}
        write_safetensors(tensors, folder / file, {"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(2 * prod(shape) for shape in tensor_shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_adapters(
    path: Path,
    model: str,
    experts: int,
    rank: int,
    max_depth: int,
    layers: int | None = None,
    heads: int | None = None,
    seed: int = 0,
) -> None:
    """Write adapters for the paper's blocks whose random experts change q, k and v by about 0.3."""
    size = size_of(model, layers, heads)
    spec = ThinkingSpec(blocks=size.thinking_blocks, experts=experts, rank=rank, max_depth=max_depth)
    state: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for block in spec.blocks:
            part = Thinking(size.width, spec)
            part.b.normal_(std=0.3 * rank**-0.5)
            part.scale.add_(torch.randn_like(part.scale) * 0.1)
            part.shift.normal_(std=0.1)
            state |= {f"blocks.{block}.thinking.{name}": v for name, v in part.state_dict().items()}
    facts = adapters.AdapterInfo(size.width, model, {"weights": "random"})
    adapters.write_adapters(path, spec, state, facts)


@click.command(cls=TpxCommand)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", type=click.Choice(list(SIZES)), default="sd3-medium", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Number of blocks.  [default: the model's]")
@click.option(
    "--heads", type=click.IntRange(1), help="Number of heads, each 64 wide.  [default: the model's]"
)
@click.option(
    "--adapters",
    "experts",
    type=click.IntRange(1),
    help="Also write adapters with this many experts per block.",
)
@click.option("--rank", type=click.IntRange(1), default=128, show_default=True)
@click.option("--depth", type=click.IntRange(1), default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    out: Path,
    model: str,
    layers: int | None,
    heads: int | None,
    experts: int | None,
    rank: int,
    depth: int,
    seed: int,
) -> None:
    """Write a random SD3 transformer, and adapters for it if asked, into the folder OUT."""
    write_transformer(out / "transformer", model, layers, heads, seed)
    if experts:
        write_adapters(out / adapters.FILE, model, experts, rank, depth, layers, heads, seed)
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    parameters = sum(
        prod(s) for n, s in shapes(size_of(model, layers, heads)).items() if n != "pos_embed.pos_embed"
    )
    click.echo(f"{out}: {parameters:,} parameters, {total:,} bytes")


if __name__ == "__main__":
    main()
