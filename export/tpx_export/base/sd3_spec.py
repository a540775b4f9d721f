"""The specification of an SD3 or SD3.5 transformer: from diffusers' config.json, or from the shapes of a single file.

The caller sets the latent size: here it is one patch, as a placeholder.
"""

from pathlib import Path

from tpx_export.base.config import count_numbered, read_config, tensor_shape
from tpx_export.base.tensors import Tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.mmdit import MMDiTSpec

CLASS = "SD3Transformer2DModel"
CLIP_TOKENS, T5_TOKENS = 77, 256  # the context has CLIP's tokens, then T5's
HEAD_WIDTH = 64  # of every SD3; cannot be read from an original file without query-key norms


def spec_from_config(folder: Path, tensors: Tensors) -> MMDiTSpec:
    """Read config.json and check it against the weights `tensors` in the same folder. Raises CheckpointInvalid."""
    config = read_config(folder)
    config.one_of("_class_name", (CLASS,))
    layers, heads = config.count("num_layers"), config.count("num_attention_heads")
    width = heads * config.count("attention_head_dim")
    channels, patch = config.count("in_channels"), config.count("patch_size")
    config.one_of("num_layers", (count_numbered(tensors, "transformer_blocks", minimum=0),))
    config.one_of("caption_projection_dim", (width,))
    config.one_of("out_channels", (None, channels))
    dual = config.fields.get("dual_attention_layers", [])
    if not isinstance(dual, list) or not all(type(i) is int and 0 <= i < layers for i in dual):
        raise config.invalid(f"dual_attention_layers within 0..{layers - 1}", dual)
    return MMDiTSpec(
        latent_channels=channels,
        latent_size=(patch, patch),
        patch=patch,
        width=width,
        heads=heads,
        blocks=layers,
        context_tokens=CLIP_TOKENS + T5_TOKENS,
        context_width=config.count("joint_attention_dim"),
        pooled_width=config.count("pooled_projection_dim"),
        qk_norm=config.one_of("qk_norm", (None, "rms_norm")) is not None,
        dual_blocks=tuple(sorted(set(dual))),
        stored_positions=True,
    )


def spec_from_shapes(tensors: Tensors) -> MMDiTSpec:
    """Read the shapes of an original single file's tensors, named without their prefix. Raises CheckpointInvalid."""
    blocks = count_numbered(tensors, "joint_blocks", minimum=0)
    if not blocks:
        found = "diffusers' names; use its folder, with config.json"
        raise CheckpointInvalid(
            f"{tensors.path}: expected an SD3 transformer's joint_blocks under model.diffusion_model., found "
            + (found if count_numbered(tensors, "transformer_blocks", minimum=0) else "none; check the file")
        )
    width, channels, patch, _ = tensor_shape(tensors, "x_embedder.proj.weight", 4)
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head_width = tensor_shape(tensors, norm, 1)[0] if norm in tensors else HEAD_WIDTH
    if width % head_width:
        raise CheckpointInvalid(
            f"{tensors.path}: expected a width divisible by the head width {head_width}, found {width}; check the file"
        )
    return MMDiTSpec(
        latent_channels=channels,
        latent_size=(patch, patch),
        patch=patch,
        width=width,
        heads=width // head_width,
        blocks=blocks,
        context_tokens=CLIP_TOKENS + T5_TOKENS,
        context_width=tensor_shape(tensors, "context_embedder.weight", 2)[1],
        pooled_width=tensor_shape(tensors, "y_embedder.mlp.0.weight", 2)[1],
        qk_norm=norm in tensors,
        dual_blocks=tuple(
            i for i in range(blocks) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in tensors
        ),
        stored_positions=True,
    )
