"""Sizes of an SD3 or SD3.5 transformer: from diffusers' config.json, or from the shapes of an original single file.

The latent size is the caller's: a spec made here has a placeholder of one patch.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tpx_export.base.facts import read_config, shape
from tpx_export.base.tensors import Tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.mmdit import MMDiTSpec
from tpx_runtime.errors import shorten

CLASS = "SD3Transformer2DModel"
CONTEXT_TOKENS = 333  # 77 of CLIP, then 256 of T5
HEAD_WIDTH = 64  # of every SD3; an original file without query-key norms does not say it
# config.json's field -> its default in diffusers, which files older than the field leave out; ... where it must be there
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("num_layers", "num_attention_heads", "attention_head_dim"), ...),
    **dict.fromkeys(("in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim"), ...),
    "caption_projection_dim": ...,
    "out_channels": None,
    "qk_norm": None,
    "dual_attention_layers": [],
}


def spec_of_config(folder: Path, tensors: Tensors) -> MMDiTSpec:
    """From config.json beside the weights `tensors`. Raises CheckpointInvalid."""
    path = folder / "config.json"
    config = read_config(folder).fields
    if config.get("_class_name") != CLASS:
        raise _unfit(path, f"_class_name {CLASS}", config.get("_class_name"))
    given = {name: config.get(name, default) for name, default in _FIELDS.items()}
    for name, value in given.items():
        if _FIELDS[name] is ... and (type(value) is not int or value < 1):
            raise _unfit(path, f"{name} of 1 or more", None if value is ... else value)
    layers, width = given["num_layers"], given["num_attention_heads"] * given["attention_head_dim"]
    dual = given["dual_attention_layers"]
    if not isinstance(dual, list) or not all(type(i) is int and 0 <= i < layers for i in dual):
        raise _unfit(path, f"dual_attention_layers within 0..{layers - 1}", dual)
    for name, allowed in (
        ("qk_norm", (None, "rms_norm")),
        ("out_channels", (None, given["in_channels"])),
        ("caption_projection_dim", (width,)),
        ("num_layers", (len(_blocks(tensors, "transformer_blocks")),)),
    ):
        if given[name] not in allowed:
            raise _unfit(path, f"{name} {' or '.join(map(str, allowed))} as its weights have", given[name])
    return MMDiTSpec(
        latent_channels=given["in_channels"],
        latent_size=given["patch_size"],
        patch=given["patch_size"],
        width=width,
        heads=given["num_attention_heads"],
        blocks=layers,
        context_tokens=CONTEXT_TOKENS,
        context_width=given["joint_attention_dim"],
        pooled_width=given["pooled_projection_dim"],
        qk_norm=given["qk_norm"] is not None,
        dual_blocks=tuple(sorted(set(dual))),
        stored_positions=True,
    )


def spec_of_shapes(tensors: Tensors) -> MMDiTSpec:
    """From the tensors of an original single file, without their prefix. Raises CheckpointInvalid."""
    blocks = _blocks(tensors, "joint_blocks")
    if not blocks:
        found = "diffusers' names; give its folder, with config.json"
        raise CheckpointInvalid(
            f"{tensors.where}: expected an SD3 transformer's joint_blocks under model.diffusion_model., found "
            + (found if _blocks(tensors, "transformer_blocks") else "none; check the file")
        )
    width, channels, patch, _ = shape(tensors, "x_embedder.proj.weight", 4)
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head_width = shape(tensors, norm, 1)[0] if norm in tensors else HEAD_WIDTH
    if width % head_width:
        raise CheckpointInvalid(
            f"{tensors.where}: expected a width of whole heads of {head_width}, found {width}; check the file"
        )
    return MMDiTSpec(
        latent_channels=channels,
        latent_size=patch,
        patch=patch,
        width=width,
        heads=width // head_width,
        blocks=len(blocks),
        context_tokens=CONTEXT_TOKENS,
        context_width=shape(tensors, "context_embedder.weight", 2)[1],
        pooled_width=shape(tensors, "y_embedder.mlp.0.weight", 2)[1],
        qk_norm=norm in tensors,
        dual_blocks=tuple(i for i in blocks if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in tensors),
        stored_positions=True,
    )


def _blocks(names: Iterable[str], prefix: str) -> range:
    """As many as have tensors: where one is left out, the names after it are unknown."""
    found = (re.match(rf"{prefix}\.(\d+)\.", name) for name in names)
    return range(len({match[1] for match in found if match}))


def _unfit(path: Path, expected: str, found: object) -> CheckpointInvalid:
    return CheckpointInvalid(
        f"{path}: expected {expected}, found {shorten(found)}; check that it is an SD3 transformer's"
    )
