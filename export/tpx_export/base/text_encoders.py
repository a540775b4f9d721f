"""Loads SD3's text encoders from transformers' folders and from single files.

| ours | transformers |
|---|---|
| CLIPText | CLIPTextModelWithProjection: text_model.{embeddings, encoder.layers.N, final_layer_norm}, text_projection |
| T5Encoder | T5EncoderModel: shared, encoder.{block.N.layer.{0, 1}, final_layer_norm} |

Single files have the same names, with a prefix for each encoder.
"""

from pathlib import Path

import torch

from tpx_export.base.config import count_numbered, read_config, tensor_shape
from tpx_export.base.conversion import Conversion, linear, load_foreign, unchanged
from tpx_export.base.tensors import Tensors, open_tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.checks import MAX_LAYERS
from tpx_export.model.clip import ACTIVATIONS, CLIPText, CLIPTextSpec
from tpx_export.model.t5 import T5Encoder, T5Spec

CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))

_HEAD_WIDTH = 64  # of every CLIP; cannot be read from shapes
_EMBEDDINGS, _PROJECTION = "text_model.embeddings", "text_projection.weight"
_WORDS = ("shared.weight", "encoder.embed_tokens.weight")  # the same tensor, under one name or both
_DISTANCES = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def load_clip(folder: Path) -> CLIPText:
    """Load a folder that transformers' CLIPTextModelWithProjection was saved in. Raises CheckpointInvalid."""
    return _fill_clip(clip_spec(folder), open_tensors(folder), projected=True)


def clip_spec(folder: Path) -> CLIPTextSpec:
    """The sizes of the CLIP in a folder, read from its configuration alone. Raises CheckpointInvalid."""
    config = read_config(folder)
    config.one_of("model_type", ("clip_text_model",))
    width, vocabulary = config.count("hidden_size", 512), config.count("vocab_size", 49_408)
    heads = config.count("num_attention_heads", 8)
    if width % heads:
        raise config.invalid(f"num_attention_heads that divide hidden_size {width}", heads)
    # The end-of-text token must have the largest id. Files from before transformers 4.31 have 2 instead, but mean the same.
    config.one_of("eos_token_id", (2, vocabulary - 1), 49_407)
    return CLIPTextSpec(
        vocabulary=vocabulary,
        tokens=config.count("max_position_embeddings", 77),
        width=width,
        heads=heads,
        layers=config.count("num_hidden_layers", 12, MAX_LAYERS),
        mlp_width=config.count("intermediate_size", 2048),
        projection=config.count("projection_dim", 512),
        activation=config.one_of("hidden_act", ACTIVATIONS, "quick_gelu"),
        eps=config.real("layer_norm_eps", 1e-5),
    )


def clip_from_tensors(tensors: Tensors, activation: str) -> CLIPText:
    """Load the tensors of a single file under CLIP_L (activation "quick_gelu") or CLIP_G ("gelu").

    Without a projection in the file it is the identity, as in diffusers. Raises CheckpointInvalid.
    """
    return _fill_clip(clip_spec_from_shapes(tensors, activation), tensors, _PROJECTION in tensors)


def clip_spec_from_shapes(tensors: Tensors, activation: str) -> CLIPTextSpec:
    """The sizes of such a CLIP, from the shapes of its tensors. Raises CheckpointInvalid."""
    vocabulary, width = tensor_shape(tensors, f"{_EMBEDDINGS}.token_embedding.weight", 2)
    if width % _HEAD_WIDTH:
        raise CheckpointInvalid(
            f"{tensors.path}: expected a CLIP width divisible by the head width {_HEAD_WIDTH}, found {width}; check the file"
        )
    projected = _PROJECTION in tensors
    return CLIPTextSpec(
        vocabulary=vocabulary,
        tokens=tensor_shape(tensors, f"{_EMBEDDINGS}.position_embedding.weight", 2)[0],
        width=width,
        heads=width // _HEAD_WIDTH,
        layers=count_numbered(tensors, "text_model.encoder.layers"),
        mlp_width=tensor_shape(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        projection=tensor_shape(tensors, _PROJECTION, 2)[0] if projected else width,
        activation=activation,
    )


def load_t5(folder: Path) -> T5Encoder:
    """Load a folder that transformers' T5EncoderModel was saved in. Raises CheckpointInvalid."""
    return _fill_t5(t5_spec(folder), open_tensors(folder))


def t5_spec(folder: Path) -> T5Spec:
    """The sizes of the T5 in a folder, read from its configuration alone. Raises CheckpointInvalid."""
    config = read_config(folder)
    config.one_of("model_type", ("t5",))
    config.one_of("feed_forward_proj", ("gated-gelu",), "relu")
    buckets = config.count("relative_attention_num_buckets", 32)
    max_distance = config.count("relative_attention_max_distance", 128)
    if buckets % 4 or max_distance <= buckets // 4:
        raise config.invalid(
            "relative_attention_num_buckets divisible by 4, with a quarter below the max_distance", buckets
        )
    return T5Spec(
        vocabulary=config.count("vocab_size", 32_128),
        width=config.count("d_model", 512),
        heads=config.count("num_heads", 8),
        head_width=config.count("d_kv", 64),
        mlp_width=config.count("d_ff", 2048),
        layers=config.count("num_layers", 6, MAX_LAYERS),
        buckets=buckets,
        max_distance=max_distance,
        eps=config.real("layer_norm_epsilon", 1e-6),
    )


def t5_from_tensors(tensors: Tensors) -> T5Encoder:
    """Load the tensors of a single file under T5. Raises CheckpointInvalid."""
    return _fill_t5(t5_spec_from_shapes(tensors), tensors)


def t5_spec_from_shapes(tensors: Tensors) -> T5Spec:
    """The sizes of such a T5, from the shapes of its tensors. Raises CheckpointInvalid."""
    first = "encoder.block.0.layer"
    vocabulary, width = tensor_shape(tensors, _words(tensors), 2)
    buckets, heads = tensor_shape(tensors, _DISTANCES, 2)
    inner = tensor_shape(tensors, f"{first}.0.SelfAttention.q.weight", 2)[0]
    if buckets % 4 or buckets >= 512 or inner % heads:
        raise CheckpointInvalid(
            f"{tensors.path}: expected a T5 with buckets divisible by 4 and a width divisible by its heads, found {buckets} "
            f"buckets and {heads} heads of {inner}; check the file"
        )
    return T5Spec(
        vocabulary=vocabulary,
        width=width,
        heads=heads,
        head_width=inner // heads,
        mlp_width=tensor_shape(tensors, f"{first}.1.DenseReluDense.wi_0.weight", 2)[0],
        layers=count_numbered(tensors, "encoder.block"),
        buckets=buckets,
    )


def clip_conversions(spec: CLIPTextSpec, projected: bool = True) -> dict[str, Conversion]:
    """Conversions of all tensors of a CLIP; without a projection in the file it is the identity."""
    norm = "text_model.final_layer_norm"
    conversions = {
        "words.weight": unchanged(f"{_EMBEDDINGS}.token_embedding.weight"),
        "places": unchanged(f"{_EMBEDDINGS}.position_embedding.weight"),
        **linear("norm", norm),
        "projection.weight": unchanged(_PROJECTION)
        if projected
        else Conversion((f"{norm}.weight",), lambda weight: torch.eye(weight.numel()).to(weight.dtype)),
    }
    for index in range(spec.layers):
        ours, theirs = f"layers.{index}", f"text_model.encoder.layers.{index}"
        conversions |= linear(f"{ours}.norm1", f"{theirs}.layer_norm1")
        conversions |= linear(f"{ours}.norm2", f"{theirs}.layer_norm2")
        for name in "qkv":
            conversions |= linear(f"{ours}.{name}", f"{theirs}.self_attn.{name}_proj")
        conversions |= linear(f"{ours}.proj", f"{theirs}.self_attn.out_proj")
        conversions |= linear(f"{ours}.mlp_in", f"{theirs}.mlp.fc1")
        conversions |= linear(f"{ours}.mlp_out", f"{theirs}.mlp.fc2")
    return conversions


def t5_conversions(spec: T5Spec, words: str = _WORDS[0]) -> dict[str, Conversion]:
    """Conversions of all tensors of a T5 whose embedding is named `words`."""
    conversions = {
        "words.weight": unchanged(words),
        "distances.weight": unchanged(_DISTANCES),
        "norm.weight": unchanged("encoder.final_layer_norm.weight"),
    }
    for index in range(spec.layers):
        ours, theirs = f"layers.{index}", f"encoder.block.{index}.layer"
        names = {
            "norm1": "0.layer_norm",
            **{name: f"0.SelfAttention.{name}" for name in "qkv"},
            "proj": "0.SelfAttention.o",
            "norm2": "1.layer_norm",
            "gate": "1.DenseReluDense.wi_0",
            "mlp_in": "1.DenseReluDense.wi_1",
            "mlp_out": "1.DenseReluDense.wo",
        }
        conversions |= {
            f"{ours}.{ours_}.weight": unchanged(f"{theirs}.{name}.weight") for ours_, name in names.items()
        }
    return conversions


def _fill_clip(spec: CLIPTextSpec, tensors: Tensors, projected: bool) -> CLIPText:
    with torch.device("meta"):
        model = CLIPText(spec)
    unused = (f"{_EMBEDDINGS}.position_ids", "logit_scale")
    load_foreign(model, clip_conversions(spec, projected), tensors, unused)
    return model.to(model.words.weight.dtype)


def _fill_t5(spec: T5Spec, tensors: Tensors) -> T5Encoder:
    with torch.device("meta"):
        model = T5Encoder(spec)
    decoder = (name for name in tensors if name.startswith(("decoder.", "lm_head.")))
    conversions = t5_conversions(spec, _words(tensors))
    return load_foreign(model, conversions, tensors, (*_WORDS, *decoder, "logit_scale"))


def _words(tensors: Tensors) -> str:
    return next((name for name in _WORDS if name in tensors), _WORDS[0])
