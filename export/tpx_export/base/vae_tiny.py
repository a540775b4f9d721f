"""Loads TAESD from a folder that diffusers' AutoencoderTiny was saved in; its tensors have our names."""

import torch

from tpx_export.base.config import Config
from tpx_export.base.conversion import load_foreign, unchanged
from tpx_export.base.tensors import Tensors
from tpx_export.model.autoencoder_tiny import AutoencoderTiny, AutoencoderTinySpec


def tiny_spec(config: Config) -> AutoencoderTinySpec:
    """The specification in a config.json. Raises CheckpointInvalid for an unsupported model."""
    for name, expected in (
        ("in_channels", 3),
        ("out_channels", 3),
        ("act_fn", "relu"),
        ("upsample_fn", "nearest"),
        ("upsampling_scaling_factor", 2),
    ):
        config.one_of(name, (expected,), expected)
    stages = {
        half: config.counts(f"num_{half}_blocks", default)
        for half, default in (("encoder", (1, 3, 3, 3)), ("decoder", (3, 3, 3, 1)))
    }
    if len(stages["encoder"]) != len(stages["decoder"]) or len(stages["encoder"]) > 8:
        raise config.invalid(
            "as many num_decoder_blocks as num_encoder_blocks, up to 8", list(stages.values())
        )
    if (blocks := max(*stages["encoder"], *stages["decoder"])) > 100:
        raise config.invalid("up to 100 blocks per stage", blocks)
    widths = {
        width
        for half in stages
        for width in config.counts(f"{half}_block_out_channels", (64,) * len(stages[half]))
    }
    if len(widths) > 1:
        raise config.invalid("equal block_out_channels", sorted(widths))
    return AutoencoderTinySpec(
        latent_channels=config.count("latent_channels", 4),
        width=widths.pop(),
        encoder_blocks=stages["encoder"],
        decoder_blocks=stages["decoder"],
        scale=config.scale("scaling_factor", 1.0),
        shift=config.real("shift_factor", 0.0),
    )


def load_tiny(spec: AutoencoderTinySpec, tensors: Tensors) -> AutoencoderTiny:
    """The autoencoder with these tensors. Raises CheckpointInvalid."""
    with torch.device("meta"):
        model = AutoencoderTiny(spec)
    return load_foreign(model, {name: unchanged(name) for name in model.state_dict()}, tensors)
