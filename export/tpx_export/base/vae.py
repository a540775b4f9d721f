"""Loads the autoencoder of SD3 or SD1 from a diffusers folder, or from a single file with the names of latent diffusion.

TAESD, which may replace it, is loaded in vae_tiny.py; these are the names of the others:

| ours | diffusers | single file, under first_stage_model. |
|---|---|---|
| encoder.stages.N.blocks.M | encoder.down_blocks.N.resnets.M | encoder.down.N.block.M |
| encoder.stages.N.resample | encoder.down_blocks.N.downsamplers.0.conv | encoder.down.N.downsample.conv |
| decoder.stages.N.blocks.M | decoder.up_blocks.N.resnets.M | decoder.up.(last - N).block.M |
| decoder.stages.N.resample | decoder.up_blocks.N.upsamplers.0.conv | decoder.up.(last - N).upsample.conv |
| middle.{0, 1, 2} | mid_block.{resnets.0, attentions.0, resnets.1} | mid.{block_1, attn_1, block_2} |
| encoder.quant, decoder.quant | quant_conv, post_quant_conv | the same |
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tpx_export.base.config import count_numbered, read_config, tensor_shape
from tpx_export.base.conversion import Conversion, load_foreign
from tpx_export.base.tensors import Tensors, open_tensors
from tpx_export.base.vae_tiny import load_tiny, tiny_spec
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.autoencoder import LatentAutoencoder
from tpx_export.model.autoencoder_kl import AutoencoderKL, AutoencoderKLSpec
from tpx_export.model.autoencoder_tiny import AutoencoderTiny, AutoencoderTinySpec

VAE = "first_stage_model."

SCALES = {16: (1.5305, 0.0609), 4: (0.18215, 0.0)}  # latent channels -> scale and shift: SD3, SD1
_ATTENTION = ("norm", "q", "k", "v", "proj")
_NEW = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")  # diffusers
_OLD = ("group_norm", "query", "key", "value", "proj_attn")  # diffusers until 2023

VaeSpec = AutoencoderKLSpec | AutoencoderTinySpec
# (is encoder, number of stages) -> foreign names by our names
Names = Callable[[bool, int], dict[str, str]]


def new_vae(spec: VaeSpec) -> LatentAutoencoder:
    """An autoencoder without weights of its own yet."""
    return AutoencoderTiny(spec) if isinstance(spec, AutoencoderTinySpec) else AutoencoderKL(spec)


def load_vae(folder: Path) -> LatentAutoencoder:
    """Load a folder that diffusers' AutoencoderKL or AutoencoderTiny was saved in. Raises CheckpointInvalid."""
    spec, tensors = vae_spec(folder), open_tensors(folder)
    if isinstance(spec, AutoencoderTinySpec):
        return load_tiny(spec, tensors)
    old = "encoder.mid_block.attentions.0.query.weight" in tensors
    return _fill(spec, tensors, partial(_diffusers, attention=_OLD if old else _NEW))


def vae_spec(folder: Path) -> VaeSpec:
    """The specification in such a folder's config.json. Raises CheckpointInvalid for an unsupported model."""
    config = read_config(folder)
    if config.one_of("_class_name", ("AutoencoderKL", "AutoencoderTiny")) == "AutoencoderTiny":
        return tiny_spec(config)
    widths = config.counts("block_out_channels", (64,))
    groups = config.count("norm_num_groups", 32)
    if any(width % groups for width in widths) or len(widths) > 8:
        raise config.invalid(f"up to 8 block_out_channels divisible by {groups}", list(widths))
    for name, allowed, default in (
        ("down_block_types", ["DownEncoderBlock2D"] * len(widths), ["DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"] * len(widths), ["UpDecoderBlock2D"]),
        ("act_fn", "silu", "silu"),
        ("in_channels", 3, 3),
        ("out_channels", 3, 3),
        ("mid_block_add_attention", True, True),
        ("latents_mean", None, None),
        ("latents_std", None, None),
    ):
        config.one_of(name, (allowed,), default)
    quant = config.one_of("use_quant_conv", (True, False), True)
    config.one_of("use_post_quant_conv", (quant,), True)
    return AutoencoderKLSpec(
        latent_channels=config.count("latent_channels", 4),
        widths=widths,
        blocks=config.count("layers_per_block", 1, 100),
        groups=groups,
        quant=quant,
        scale=config.scale("scaling_factor", 0.18215),
        shift=config.real("shift_factor", 0.0),
    )


def vae_from_tensors(tensors: Tensors) -> AutoencoderKL:
    """Load the tensors of a single file under VAE. Raises CheckpointInvalid."""
    return _fill(vae_spec_from_shapes(tensors), tensors, _latent_diffusion)


def vae_spec_from_shapes(tensors: Tensors) -> AutoencoderKLSpec:
    """The specification, from the shapes of a single file's tensors under VAE. Raises CheckpointInvalid.

    The scale and shift of 16-channel latents are SD3's, of 4-channel latents SD1's.
    """
    stages = count_numbered(tensors, "encoder.down")
    channels = tensor_shape(tensors, "decoder.conv_in.weight", 4)[1]
    widths = tuple(
        tensor_shape(tensors, f"encoder.down.{i}.block.0.conv2.weight", 4)[0] for i in range(stages)
    )
    if channels not in SCALES or any(width % 32 for width in widths):
        raise CheckpointInvalid(
            f"{tensors.path}: expected an autoencoder with 16 or 4 latent channels and widths divisible by 32, found "
            f"{channels} and {list(widths)}; check the file"
        )
    scale, shift = SCALES[channels]
    return AutoencoderKLSpec(
        latent_channels=channels,
        widths=widths,
        blocks=count_numbered(tensors, "encoder.down.0.block"),
        quant="quant_conv.weight" in tensors,
        scale=scale,
        shift=shift,
    )


def _fill(spec: AutoencoderKLSpec, tensors: Tensors, names: Names) -> AutoencoderKL:
    with torch.device("meta"):
        model = AutoencoderKL(spec)
    conversions = {}
    for half in ("encoder", "decoder"):
        encoder = half == "encoder"
        renames = names(encoder, len(spec.widths))
        for ours in getattr(model, half).state_dict():
            part, _, kind = ours.rpartition(".")
            quant = "quant_conv" if encoder else "post_quant_conv"
            theirs = quant if part == "quant" else f"{half}.{_renamed(part, renames)}"
            convert = _matrix if part.startswith("middle.1.") else _identity
            conversions[f"{half}.{ours}"] = Conversion((f"{theirs}.{kind}",), convert)
    unused = (found for found in tensors if found.startswith(("loss.", "model_ema.")))
    load_foreign(model, conversions, tensors, unused)
    return model.to(next(model.decoder.parameters()).dtype)


def _diffusers(encoder: bool, stages: int, attention: tuple[str, ...]) -> dict[str, str]:
    direction = "down" if encoder else "up"
    names = {"middle.0": "mid_block.resnets.0", "middle.2": "mid_block.resnets.1"}
    for ours, theirs in zip(_ATTENTION, attention, strict=True):
        names[f"middle.1.{ours}"] = f"mid_block.attentions.0.{theirs}"
    for index in range(stages):
        names[f"stages.{index}.blocks"] = f"{direction}_blocks.{index}.resnets"
        names[f"stages.{index}.resample"] = f"{direction}_blocks.{index}.{direction}samplers.0.conv"
    return names | {"norm_out": "conv_norm_out", "shortcut": "conv_shortcut"}


def _latent_diffusion(encoder: bool, stages: int) -> dict[str, str]:
    direction = "down" if encoder else "up"
    names = {"middle.0": "mid.block_1", "middle.1": "mid.attn_1", "middle.2": "mid.block_2"}
    names["middle.1.proj"] = "mid.attn_1.proj_out"
    for index in range(stages):
        level = index if encoder else stages - 1 - index  # 0 is the full resolution
        names[f"stages.{index}.blocks"] = f"{direction}.{level}.block"
        names[f"stages.{index}.resample"] = f"{direction}.{level}.{direction}sample.conv"
    return names | {"shortcut": "nin_shortcut"}


def _renamed(part: str, names: dict[str, str]) -> str:
    """`part` with its longest prefix in `names` replaced, and a final `shortcut` too."""
    for ours in sorted(names, key=len, reverse=True):
        if part == ours or part.startswith(f"{ours}."):
            part = names[ours] + part.removeprefix(ours)
            break
    before, _, last = part.rpartition(".")
    return f"{before}.{names['shortcut']}" if last == "shortcut" else part


def _identity(value: Tensor) -> Tensor:
    return value


def _matrix(value: Tensor) -> Tensor:
    """The weight of a 1x1 convolution as a matrix; other values unchanged."""
    return value.flatten(1) if value.ndim == 4 else value
