"""Conversions of SD3's and SD3.5's tensors to those of our MMDiT, from diffusers' names and from the original names.

| ours | diffusers | original, under model.diffusion_model. |
|---|---|---|
| patch_in, positions | pos_embed.{proj, pos_embed} | x_embedder.proj, pos_embed |
| time, pooled | time_text_embed.{timestep,text}_embedder | {t,y}_embedder.mlp |
| context_in | context_embedder | context_embedder |
| blocks.N.visual | transformer_blocks.N.{norm1, attn, ff} | joint_blocks.N.x_block |
| blocks.N.text | transformer_blocks.N.{norm1_context, attn.*add*, ff_context} | joint_blocks.N.context_block |
| blocks.N.second | transformer_blocks.N.attn2 | joint_blocks.N.x_block.attn2 |
| out_modulation, patch_out | norm_out.linear, proj_out | final_layer.{adaLN_modulation.1, linear} |

We modulate by (shift, scale) everywhere, as the original does; diffusers has (scale, shift) in two places: the final layer's
modulation and the last block's text modulation. The rows of the last projection are (p, q, channel) in both, (channel, p, q)
in ours.
"""

from tpx_export.base.conversion import Conversion, linear, patch_layers, swapped_halves, unchanged
from tpx_export.model.mmdit import MMDiTSpec


def from_diffusers(spec: MMDiTSpec) -> dict[str, Conversion]:
    """Conversions of all tensors except `positions` from the names of diffusers' SD3Transformer2DModel."""
    conversions = {
        **patch_layers(spec.patch, spec.latent_channels, "pos_embed.proj", "proj_out"),
        **linear("time.linear_1", "time_text_embed.timestep_embedder.linear_1"),
        **linear("time.linear_2", "time_text_embed.timestep_embedder.linear_2"),
        **linear("pooled.linear_1", "time_text_embed.text_embedder.linear_1"),
        **linear("pooled.linear_2", "time_text_embed.text_embedder.linear_2"),
        **linear("context_in", "context_embedder"),
        **_swapped("out_modulation", "norm_out.linear"),
    }
    for index in range(spec.blocks):
        last = index == spec.blocks - 1
        visual, text, second = (f"blocks.{index}.{part}" for part in ("visual", "text", "second"))
        block = f"transformer_blocks.{index}"
        attn, attn2 = f"{block}.attn", f"{block}.attn2"
        conversions |= linear(f"{visual}.modulation", f"{block}.norm1.linear")
        conversions |= linear(f"{visual}.qkv", *(f"{attn}.to_{part}" for part in "qkv"))
        conversions |= linear(f"{visual}.proj", f"{attn}.to_out.0")
        conversions |= linear(f"{visual}.mlp_in", f"{block}.ff.net.0.proj")
        conversions |= linear(f"{visual}.mlp_out", f"{block}.ff.net.2")
        conversions |= (_swapped if last else linear)(f"{text}.modulation", f"{block}.norm1_context.linear")
        conversions |= linear(f"{text}.qkv", *(f"{attn}.add_{part}_proj" for part in "qkv"))
        if not last:
            conversions |= linear(f"{text}.proj", f"{attn}.to_add_out")
            conversions |= linear(f"{text}.mlp_in", f"{block}.ff_context.net.0.proj")
            conversions |= linear(f"{text}.mlp_out", f"{block}.ff_context.net.2")
        if index in spec.dual_blocks:
            conversions |= linear(f"{second}.qkv", *(f"{attn2}.to_{part}" for part in "qkv"))
            conversions |= linear(f"{second}.proj", f"{attn2}.to_out.0")
        if spec.qk_norm:
            conversions |= _norms(visual, f"{attn}.norm_") | _norms(text, f"{attn}.norm_added_")
            conversions |= _norms(second, f"{attn2}.norm_") if index in spec.dual_blocks else {}
    return conversions


def from_original(spec: MMDiTSpec) -> dict[str, Conversion]:
    """Conversions of all tensors except `positions` from the names of the original single files, without their prefix."""
    conversions = {
        **patch_layers(spec.patch, spec.latent_channels, "x_embedder.proj", "final_layer.linear"),
        **linear("time.linear_1", "t_embedder.mlp.0"),
        **linear("time.linear_2", "t_embedder.mlp.2"),
        **linear("pooled.linear_1", "y_embedder.mlp.0"),
        **linear("pooled.linear_2", "y_embedder.mlp.2"),
        **linear("context_in", "context_embedder"),
        **linear("out_modulation", "final_layer.adaLN_modulation.1"),
    }
    for index in range(spec.blocks):
        second, attn2 = f"blocks.{index}.second", f"joint_blocks.{index}.x_block.attn2"
        for ours, theirs in (("visual", "x_block"), ("text", "context_block")):
            stream, block = f"blocks.{index}.{ours}", f"joint_blocks.{index}.{theirs}"
            conversions |= linear(f"{stream}.modulation", f"{block}.adaLN_modulation.1")
            conversions |= linear(f"{stream}.qkv", f"{block}.attn.qkv")
            conversions |= _norms(stream, f"{block}.attn.ln_") if spec.qk_norm else {}
            if ours == "visual" or index < spec.blocks - 1:
                conversions |= linear(f"{stream}.proj", f"{block}.attn.proj")
                conversions |= linear(f"{stream}.mlp_in", f"{block}.mlp.fc1")
                conversions |= linear(f"{stream}.mlp_out", f"{block}.mlp.fc2")
        if index in spec.dual_blocks:
            conversions |= linear(f"{second}.qkv", f"{attn2}.qkv") | linear(f"{second}.proj", f"{attn2}.proj")
            conversions |= _norms(second, f"{attn2}.ln_") if spec.qk_norm else {}
    return conversions


def _swapped(ours: str, theirs: str) -> dict[str, Conversion]:
    return {f"{ours}.{part}": swapped_halves(f"{theirs}.{part}") for part in ("weight", "bias")}


def _norms(ours: str, theirs: str) -> dict[str, Conversion]:
    return {f"{ours}.norm_{part}.weight": unchanged(f"{theirs}{part}.weight") for part in "qk"}
