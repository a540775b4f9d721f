"""Loads original DiT checkpoints into our DiT.

| ours | original |
|---|---|
| patch_in, positions | x_embedder.proj, pos_embed |
| time, classes | t_embedder.mlp.{0,2}, y_embedder.embedding_table |
| blocks.N.visual.{modulation, qkv, proj} | blocks.N.{adaLN_modulation.1, attn.qkv, attn.proj} |
| blocks.N.visual.{mlp_in, mlp_out} | blocks.N.mlp.{fc1, fc2} |
| out_modulation, patch_out | final_layer.{adaLN_modulation.1, linear} |

Both modulate by (shift, scale, gate). The rows of the last projection are (p, q, channel) in the original, (channel, p, q)
in ours. diffusers' port computes different numbers (its sinusoids, its second layer norm) and is rejected.
"""

import math
from pathlib import Path

import torch

from tpx_export.base.config import count_numbered
from tpx_export.base.conversion import (
    Conversion,
    check_shapes,
    foreign_shapes,
    linear,
    load_foreign,
    patch_layers,
    unchanged,
)
from tpx_export.base.tensors import Tensors, open_tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.dit import DiT, DiTSpec
from tpx_export.precision import STORED_DTYPES, cast_weights
from tpx_runtime.errors import BadInput

HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}  # by width: XL, L, B, S; checkpoints do not store it
_LAYERS = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
# Tensors whose shapes determine the specification, and their number of dimensions.
_SIZES = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}


def load_transformer(source: Path) -> DiT:
    """Load the transformer at `source`, an original DiT state dict in .pt or .safetensors.

    Weights keep their stored precision, except the float32 time embedder. Raises CheckpointInvalid for a checkpoint that is
    not a DiT, damaged or incomplete, BadInput for a width other than those of DiT-S, B, L and XL.
    """
    return transformer_from_tensors(open_tensors(source))


def transformer_from_tensors(tensors: Tensors) -> DiT:
    """Like `load_transformer`, from open tensors."""
    spec = spec_from_tensors(tensors)
    kinds = "tensors of this model's shapes in float32, float16 or bfloat16"
    check_shapes(shapes_of(spec), tensors, STORED_DTYPES.__contains__, kinds)
    with torch.device("meta"):
        model = DiT(spec)
    load_foreign(model, conversions(spec), tensors)
    cast_weights(model, model.patch_in.weight.dtype)
    return model


def spec_from_tensors(tensors: Tensors) -> DiTSpec:
    """The specification, from the shapes of an original checkpoint. Raises CheckpointInvalid, BadInput."""
    shapes = _checked_shapes(tensors)
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    side = math.isqrt(shapes["pos_embed"][1])
    rows, values = shapes["final_layer.linear.weight"][0], channels * patch**2
    if rows not in (values, 2 * values) or width % 4:
        raise CheckpointInvalid(
            f"{tensors.path}: expected final_layer.linear.weight of {values} or {2 * values} rows (with learned sigma) and "
            f"a width divisible by 4, found {rows} and {width}; check the file"
        )
    return DiTSpec(
        latent_channels=channels,
        latent_size=(side * patch, side * patch),
        patch=patch,
        width=width,
        heads=_heads(tensors, width),
        blocks=count_numbered(tensors, "blocks"),
        classes=max(1, shapes["y_embedder.embedding_table.weight"][0] - 1),
        learned_sigma=rows == 2 * values,
    )


def conversions(spec: DiTSpec) -> dict[str, Conversion]:
    """The conversion of each tensor of our DiT, without thinking adapters."""
    result = {
        **patch_layers(spec.patch, spec.out_channels, "x_embedder.proj", "final_layer.linear"),
        "positions": Conversion(("pos_embed",), lambda table: table.squeeze(0)),
        "classes.weight": unchanged("y_embedder.embedding_table.weight"),
        **linear("time.linear_1", "t_embedder.mlp.0"),
        **linear("time.linear_2", "t_embedder.mlp.2"),
        **linear("out_modulation", "final_layer.adaLN_modulation.1"),
    }
    for index in range(spec.blocks):
        for ours, theirs in _LAYERS.items():
            result |= linear(f"blocks.{index}.visual.{ours}", f"blocks.{index}.{theirs}")
    return result


def shapes_of(spec: DiTSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an original checkpoint with that specification, by its original name."""
    with torch.device("meta"):
        model = DiT(spec)
    return foreign_shapes(model, conversions(spec)) | {
        "x_embedder.proj.weight": (spec.width, spec.latent_channels, spec.patch, spec.patch),
        "pos_embed": (1, spec.visual_tokens, spec.width),
    }


def _heads(tensors: Tensors, width: int) -> int:
    if width not in HEADS:
        raise BadInput(
            f"{tensors.path}: expected a width of {', '.join(map(str, HEADS))}, found {width}; "
            "other DiTs cannot be imported"
        )
    return HEADS[width]


def _checked_shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of _SIZES. Raises CheckpointInvalid if they cannot be those of a DiT."""
    if missing := [name for name in _SIZES if name not in tensors]:
        port = "; diffusers' port of DiT computes different numbers, use the original checkpoint"
        hint = port if any(name.startswith("transformer_blocks.") for name in tensors) else "; check the file"
        raise CheckpointInvalid(
            f"{tensors.path}: expected an original DiT checkpoint, found {len(missing)} of its tensors missing: "
            f"{', '.join(missing)}{hint}"
        )
    shapes = {name: tuple(tensors[name].shape) for name in _SIZES}
    invalid = [name for name, dimensions in _SIZES.items() if len(shapes[name]) != dimensions]
    invalid = invalid or [name for name, shape in shapes.items() if 0 in shape]
    if not invalid and math.isqrt(shapes["pos_embed"][1]) ** 2 != shapes["pos_embed"][1]:
        invalid = ["pos_embed"]
    if invalid:
        raise CheckpointInvalid(
            f"{tensors.path}: expected the shapes of an original DiT checkpoint (pos_embed of a square), found "
            f"{invalid[0]} {list(shapes[invalid[0]])}; check the file"
        )
    return shapes
