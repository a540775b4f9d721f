"""Stable Diffusion 3 and 3.5 transformers: a diffusers folder, or an original single file, as our MMDiT."""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from tpx_export.base.recipe import From, check_shapes, foreign_shapes, load_foreign
from tpx_export.base.sd3_names import from_diffusers, from_original
from tpx_export.base.sd3_spec import spec_of_config, spec_of_shapes
from tpx_export.base.tensors import Tensors, open_tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.mmdit import MMDiT, MMDiTSpec
from tpx_runtime.errors import BadInput

PREFIX = "model.diffusion_model."
_DIFFUSERS_TABLE, _ORIGINAL_TABLE = "pos_embed.pos_embed", "pos_embed"  # of positions
_ANY = 2**24


def load_transformer(source: Path, latent_size: int = 128) -> MMDiT:
    """The transformer at `source` for square latents of that size (an eighth of the picture's pixels).

    `source` is a diffusers folder (with config.json, or with transformer/config.json) or an original single file. Weights
    keep their stored precision, but float8 becomes float16, and the embedders of time and condition are float32. Raises
    CheckpointInvalid for a checkpoint that is not SD3's, damaged or incomplete, BadInput for a latent size that its table
    of positions does not cover.
    """
    if source.is_dir():
        folder = source if (source / "config.json").exists() else source / "transformer"
        tensors = open_tensors(folder)
        spec = spec_of_config(folder, tensors)
        recipe, table = from_diffusers(spec), _DIFFUSERS_TABLE
    else:
        tensors = open_tensors(source)
        tensors = tensors.under(PREFIX) or tensors
        spec = spec_of_shapes(tensors)
        recipe, table = from_original(spec), _ORIGINAL_TABLE
    sizes = latent_sizes(spec, tensors)
    if latent_size not in sizes:
        raise BadInput(
            f"expected a latent size of {sizes[0]}..{sizes[-1]} in steps of {sizes.step}, as the table of positions of "
            f"{tensors.where} allows, found {latent_size}"
        )
    spec, side = dataclasses.replace(spec, latent_size=latent_size), latent_size // spec.patch
    recipe["positions"] = From((table,), lambda values: cropped(values, side))
    with torch.device("meta"):
        model = MMDiT(spec)
    shapes = foreign_shapes(model, recipe) | {
        recipe["patch_in.weight"].names[0]: (spec.width, spec.latent_channels, spec.patch, spec.patch)
    }
    # latent_sizes has checked the table, which is larger than ours.
    del shapes[table]
    kinds = "real tensors of this model's shapes"
    check_shapes(shapes, tensors, lambda dtype: dtype.is_floating_point, kinds)
    load_foreign(model, recipe, tensors)
    model.to(model.patch_in.weight.dtype)
    for embedder in (model.time, model.pooled):
        embedder.float()
    return model


def cropped(table: Tensor, side: int) -> Tensor:
    """The middle side x side of a square table of positions [1, max^2, D] -> [side^2, D]."""
    most = math.isqrt(table.shape[1])
    first = (most - side) // 2
    rows = table.reshape(most, most, -1)[first : first + side, first : first + side]
    return rows.flatten(0, 1).contiguous()


def latent_sizes(spec: MMDiTSpec, tensors: Tensors) -> range:
    """The latent sizes that the table of positions covers; any size if it is missing, which `load_foreign` reports.

    Raises CheckpointInvalid for a table that is not square or not of the model's width.
    """
    table = next((name for name in (_DIFFUSERS_TABLE, _ORIGINAL_TABLE) if name in tensors), None)
    if table is None:
        return range(spec.patch, _ANY, spec.patch)
    shape = tensors[table].shape
    side = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if not side or shape != (1, side**2, spec.width):
        raise CheckpointInvalid(
            f"{tensors.where}: expected {table} of [1, side^2, {spec.width}], found {list(shape)}; check the file"
        )
    return range(spec.patch, side * spec.patch + 1, spec.patch)
