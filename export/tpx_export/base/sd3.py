"""Loads Stable Diffusion 3 and 3.5 transformers, a diffusers folder or an original single file, into our MMDiT."""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from tpx_export.base.conversion import Conversion, check_shapes, foreign_shapes, load_foreign
from tpx_export.base.sd3_names import from_diffusers, from_original
from tpx_export.base.sd3_spec import spec_from_config, spec_from_shapes
from tpx_export.base.tensors import Tensors, open_tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.mmdit import MMDiT, MMDiTSpec
from tpx_export.precision import cast_weights
from tpx_runtime.errors import BadInput

PREFIX = "model.diffusion_model."
_DIFFUSERS_TABLE, _ORIGINAL_TABLE = "pos_embed.pos_embed", "pos_embed"  # the position table
_MAX_LATENT_SIZE = 2**24


def load_transformer(source: Path, latent_size: tuple[int, int] = (128, 128)) -> MMDiT:
    """Load the transformer at `source` for latents of that height and width (an eighth of the image size in pixels).

    `source` is a diffusers folder (with config.json, or with transformer/config.json) or an original single file. Weights
    keep their stored precision, but float8 becomes float16, and the embedders of time and pooled text are float32. Raises
    CheckpointInvalid for a checkpoint that is not SD3's, damaged or incomplete, BadInput for a latent size that its position
    table does not cover.
    """
    if source.is_dir():
        folder = source if (source / "config.json").exists() else source / "transformer"
        tensors = open_tensors(folder)
        spec = spec_from_config(folder, tensors)
        conversions, table = from_diffusers(spec), _DIFFUSERS_TABLE
    else:
        tensors = open_tensors(source)
        tensors = tensors.with_prefix(PREFIX) or tensors
        spec = spec_from_shapes(tensors)
        conversions, table = from_original(spec), _ORIGINAL_TABLE
    sides = latent_sides(spec, tensors)
    if not all(side in sides for side in latent_size):
        raise BadInput(
            f"expected latents with sides of {sides[0]}..{sides[-1]} in steps of {sides.step}, as the position table of "
            f"{tensors.path} allows, found {list(latent_size)}"
        )
    spec = dataclasses.replace(spec, latent_size=latent_size)
    conversions["positions"] = Conversion((table,), lambda values: crop_positions(values, spec.grid))
    with torch.device("meta"):
        model = MMDiT(spec)
    shapes = foreign_shapes(model, conversions) | {
        conversions["patch_in.weight"].names[0]: (spec.width, spec.latent_channels, spec.patch, spec.patch)
    }
    # The table is larger than ours; latent_sides has checked it.
    del shapes[table]
    kinds = "floating-point tensors of this model's shapes"
    check_shapes(shapes, tensors, lambda dtype: dtype.is_floating_point, kinds)
    load_foreign(model, conversions, tensors)
    cast_weights(model, model.patch_in.weight.dtype)
    return model


def crop_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """The central (rows, columns) of a square position table [1, max^2, D] -> [rows columns, D]."""
    max_side = math.isqrt(table.shape[1])
    rows, columns = (slice((max_side - size) // 2, (max_side + size) // 2) for size in grid)
    return table.reshape(max_side, max_side, -1)[rows, columns].flatten(0, 1).contiguous()


def latent_sides(spec: MMDiTSpec, tensors: Tensors) -> range:
    """The heights and widths of latents that the position table covers; all if it is missing, as `load_foreign` reports.

    Raises CheckpointInvalid for a table that is not square or not of the model's width.
    """
    table = next((name for name in (_DIFFUSERS_TABLE, _ORIGINAL_TABLE) if name in tensors), None)
    if table is None:
        return range(spec.patch, _MAX_LATENT_SIZE, spec.patch)
    shape = tensors[table].shape
    side = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if not side or shape != (1, side**2, spec.width):
        raise CheckpointInvalid(
            f"{tensors.path}: expected {table} of [1, side^2, {spec.width}], found {list(shape)}; check the file"
        )
    return range(spec.patch, side * spec.patch + 1, spec.patch)
