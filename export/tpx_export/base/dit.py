"""DiT's original checkpoints as our DiT.

| ours | original |
|---|---|
| patch_in, positions | x_embedder.proj, pos_embed |
| time, classes | t_embedder.mlp.{0,2}, y_embedder.embedding_table |
| blocks.N.visual.{modulation, qkv, proj} | blocks.N.{adaLN_modulation.1, attn.qkv, attn.proj} |
| blocks.N.visual.{mlp_in, mlp_out} | blocks.N.mlp.{fc1, fc2} |
| out_modulation, patch_out | final_layer.{adaLN_modulation.1, linear} |

Both modulate by (shift, scale, gate). The original has the last projection's rows as (p, q, channel), we as (channel, p, q).
diffusers' port computes other numbers (its sinusoids, its second layer norm) and is refused.
"""

import math
from pathlib import Path

import torch

from tpx_export.base.facts import numbered
from tpx_export.base.recipe import (
    From,
    check_shapes,
    foreign_shapes,
    linear,
    load_foreign,
    patch_layers,
    same,
)
from tpx_export.base.tensors import Tensors, open_tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.dit import DiT, DiTSpec
from tpx_export.precision import STORED
from tpx_runtime.errors import BadInput

HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}  # by width: XL, L, B, S; a checkpoint does not say it
_LAYERS = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
_SIZES = {  # tensors that sizes are read from, and their dimensions
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}


def load_transformer(source: Path) -> DiT:
    """The transformer at `source`, an original DiT state dict in .pt or .safetensors.

    Weights keep their stored precision, but the embedder of time is float32. Raises CheckpointInvalid for a checkpoint that
    is not DiT's, damaged or incomplete, BadInput for a width other than those of DiT-S, B, L and XL.
    """
    return from_tensors(open_tensors(source))


def from_tensors(tensors: Tensors) -> DiT:
    """`load_transformer` of tensors that are open already."""
    spec = spec_of(tensors)
    kinds = "tensors of this model's shapes in float32, float16 or bfloat16"
    check_shapes(shapes_of(spec), tensors, STORED.__contains__, kinds)
    with torch.device("meta"):
        model = DiT(spec)
    load_foreign(model, recipe(spec), tensors)
    model.to(model.patch_in.weight.dtype)
    model.time.float()
    return model


def spec_of(tensors: Tensors) -> DiTSpec:
    """The sizes that the shapes of an original checkpoint say. Raises CheckpointInvalid, BadInput."""
    shapes = _sizes(tensors)
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    side = math.isqrt(shapes["pos_embed"][1])
    spoken, values = shapes["final_layer.linear.weight"][0], channels * patch**2
    if spoken not in (values, 2 * values) or width % 4:
        raise CheckpointInvalid(
            f"{tensors.where}: expected final_layer.linear.weight of {values} or {2 * values} rows (with learned sigma) and "
            f"a width of whole fours, found {spoken} and {width}; check the file"
        )
    return DiTSpec(
        latent_channels=channels,
        latent_size=side * patch,
        patch=patch,
        width=width,
        heads=_heads(tensors, width),
        blocks=numbered(tensors, "blocks"),
        classes=max(1, shapes["y_embedder.embedding_table.weight"][0] - 1),
        learned_sigma=spoken == 2 * values,
    )


def recipe(spec: DiTSpec) -> dict[str, From]:
    """Where each tensor of our DiT, without thinking, comes from."""
    made = {
        **patch_layers(spec.patch, spec.out_channels, "x_embedder.proj", "final_layer.linear"),
        "positions": From(("pos_embed",), lambda table: table.squeeze(0)),
        "classes.weight": same("y_embedder.embedding_table.weight"),
        **linear("time.linear_1", "t_embedder.mlp.0"),
        **linear("time.linear_2", "t_embedder.mlp.2"),
        **linear("out_modulation", "final_layer.adaLN_modulation.1"),
    }
    for index in range(spec.blocks):
        for ours, theirs in _LAYERS.items():
            made |= linear(f"blocks.{index}.visual.{ours}", f"blocks.{index}.{theirs}")
    return made


def shapes_of(spec: DiTSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an original checkpoint of that spec, by its original name."""
    with torch.device("meta"):
        model = DiT(spec)
    return foreign_shapes(model, recipe(spec)) | {
        "x_embedder.proj.weight": (spec.width, spec.latent_channels, spec.patch, spec.patch),
        "pos_embed": (1, spec.visual_tokens, spec.width),
    }


def _heads(tensors: Tensors, width: int) -> int:
    if width not in HEADS:
        raise BadInput(
            f"{tensors.where}: expected a width of {', '.join(map(str, HEADS))}, found {width}; "
            "other DiTs cannot be imported"
        )
    return HEADS[width]


def _sizes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    if missing := [name for name in _SIZES if name not in tensors]:
        port = "; diffusers' port of DiT computes other numbers, give the original checkpoint"
        hint = port if any(name.startswith("transformer_blocks.") for name in tensors) else "; check the file"
        raise CheckpointInvalid(
            f"{tensors.where}: expected an original DiT checkpoint, found {len(missing)} of its tensors missing: "
            f"{', '.join(missing)}{hint}"
        )
    shapes = {name: tuple(tensors[name].shape) for name in _SIZES}
    odd = [name for name, dimensions in _SIZES.items() if len(shapes[name]) != dimensions]
    odd = odd or [name for name, shape in shapes.items() if 0 in shape]
    if not odd and math.isqrt(shapes["pos_embed"][1]) ** 2 != shapes["pos_embed"][1]:
        odd = ["pos_embed"]
    if odd:
        raise CheckpointInvalid(
            f"{tensors.where}: expected the shapes of an original DiT checkpoint (pos_embed of a square), found "
            f"{odd[0]} {list(shapes[odd[0]])}; check the file"
        )
    return shapes
