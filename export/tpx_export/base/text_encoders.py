"""SD3's text encoders from transformers' folders and from single files.

| ours | transformers |
|---|---|
| CLIPText | CLIPTextModelWithProjection: text_model.{embeddings, encoder.layers.N, final_layer_norm}, text_projection |
| T5Encoder | T5EncoderModel: shared, encoder.{block.N.layer.{0, 1}, final_layer_norm} |

Single files have the same names, each encoder under its prefix.
"""

from pathlib import Path

import torch

from tpx_export.base.facts import numbered, read_config, shape
from tpx_export.base.recipe import From, linear, load_foreign, same
from tpx_export.base.tensors import Tensors, open_tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.clip import ACTIVATIONS, CLIPText, CLIPTextSpec
from tpx_export.model.t5 import T5Encoder, T5Spec

CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))

_HEAD_WIDTH = 64  # of every CLIP; shapes do not say it
_LAYERS = 1000
_EMBEDDINGS, _PROJECTION = "text_model.embeddings", "text_projection.weight"
_WORDS = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor, under one name or both
_DISTANCES = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def load_clip(folder: Path) -> CLIPText:
    """Load a folder that transformers' CLIPTextModelWithProjection was saved in. Raises CheckpointInvalid."""
    config = read_config(folder)
    config.one_of("model_type", ("clip_text_model",))
    width, vocabulary = config.count("hidden_size", 512), config.count("vocab_size", 49_408)
    heads = config.count("num_attention_heads", 8)
    if width % heads:
        raise config.unfit(f"num_attention_heads that divide hidden_size {width}", heads)
    # The end of a text is looked for as its largest id. Files before transformers 4.31 call it 2, and mean that too.
    config.one_of("eos_token_id", (2, vocabulary - 1), 49_407)
    spec = CLIPTextSpec(
        vocabulary=vocabulary,
        tokens=config.count("max_position_embeddings", 77),
        width=width,
        heads=heads,
        layers=config.count("num_hidden_layers", 12, _LAYERS),
        mlp_width=config.count("intermediate_size", 2048),
        projection=config.count("projection_dim", 512),
        activation=config.one_of("hidden_act", ACTIVATIONS, "quick_gelu"),
        eps=config.real("layer_norm_eps", 1e-5),
    )
    return _fill_clip(spec, open_tensors(folder), projected=True)


def clip_of(tensors: Tensors, activation: str) -> CLIPText:
    """Load a single file's tensors under CLIP_L, whose activation is "quick_gelu", or CLIP_G, whose is "gelu".

    A CLIP without a projection has the identity, as in diffusers. Raises CheckpointInvalid.
    """
    vocabulary, width = shape(tensors, f"{_EMBEDDINGS}.token_embedding.weight", 2)
    if width % _HEAD_WIDTH:
        raise CheckpointInvalid(
            f"{tensors.where}: expected a CLIP of whole heads of {_HEAD_WIDTH}, found a width of {width}; check the file"
        )
    projected = _PROJECTION in tensors
    spec = CLIPTextSpec(
        vocabulary=vocabulary,
        tokens=shape(tensors, f"{_EMBEDDINGS}.position_embedding.weight", 2)[0],
        width=width,
        heads=width // _HEAD_WIDTH,
        layers=numbered(tensors, "text_model.encoder.layers"),
        mlp_width=shape(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        projection=shape(tensors, _PROJECTION, 2)[0] if projected else width,
        activation=activation,
    )
    return _fill_clip(spec, tensors, projected)


def load_t5(folder: Path) -> T5Encoder:
    """Load a folder that transformers' T5EncoderModel was saved in. Raises CheckpointInvalid."""
    config = read_config(folder)
    config.one_of("model_type", ("t5",))
    config.one_of("feed_forward_proj", ("gated-gelu",), "relu")
    buckets = config.count("relative_attention_num_buckets", 32)
    max_distance = config.count("relative_attention_max_distance", 128)
    if buckets % 4 or max_distance <= buckets // 4:
        raise config.unfit("relative_attention buckets in fours, fewer than its distance", buckets)
    spec = T5Spec(
        vocabulary=config.count("vocab_size", 32_128),
        width=config.count("d_model", 512),
        heads=config.count("num_heads", 8),
        head_width=config.count("d_kv", 64),
        mlp_width=config.count("d_ff", 2048),
        layers=config.count("num_layers", 6, _LAYERS),
        buckets=buckets,
        max_distance=max_distance,
        eps=config.real("layer_norm_epsilon", 1e-6),
    )
    return _fill_t5(spec, open_tensors(folder))


def t5_of(tensors: Tensors) -> T5Encoder:
    """Load a single file's tensors under T5. Raises CheckpointInvalid."""
    first = "encoder.block.0.layer"
    vocabulary, width = shape(tensors, _words(tensors), 2)
    buckets, heads = shape(tensors, _DISTANCES, 2)
    inner = shape(tensors, f"{first}.0.SelfAttention.q.weight", 2)[0]
    if buckets % 4 or buckets >= 512 or inner % heads:
        raise CheckpointInvalid(
            f"{tensors.where}: expected a T5 with buckets in fours and whole heads, found {buckets} and {heads} heads of "
            f"{inner}; check the file"
        )
    spec = T5Spec(
        vocabulary=vocabulary,
        width=width,
        heads=heads,
        head_width=inner // heads,
        mlp_width=shape(tensors, f"{first}.1.DenseReluDense.wi_0.weight", 2)[0],
        layers=numbered(tensors, "encoder.block"),
        buckets=buckets,
    )
    return _fill_t5(spec, tensors)


def _fill_clip(spec: CLIPTextSpec, tensors: Tensors, projected: bool) -> CLIPText:
    with torch.device("meta"):
        model = CLIPText(spec)
    norm = "text_model.final_layer_norm"
    recipe = {
        "words.weight": same(f"{_EMBEDDINGS}.token_embedding.weight"),
        "places": same(f"{_EMBEDDINGS}.position_embedding.weight"),
        **linear("norm", norm),
        "projection.weight": same(_PROJECTION)
        if projected
        else From((f"{norm}.weight",), lambda weight: torch.eye(weight.numel()).to(weight.dtype)),
    }
    for index in range(spec.layers):
        ours, theirs = f"layers.{index}", f"text_model.encoder.layers.{index}"
        recipe |= linear(f"{ours}.norm1", f"{theirs}.layer_norm1")
        recipe |= linear(f"{ours}.norm2", f"{theirs}.layer_norm2")
        for name in "qkv":
            recipe |= linear(f"{ours}.{name}", f"{theirs}.self_attn.{name}_proj")
        recipe |= linear(f"{ours}.proj", f"{theirs}.self_attn.out_proj")
        recipe |= linear(f"{ours}.mlp_in", f"{theirs}.mlp.fc1")
        recipe |= linear(f"{ours}.mlp_out", f"{theirs}.mlp.fc2")
    unused = (f"{_EMBEDDINGS}.position_ids", "logit_scale")
    load_foreign(model, recipe, tensors, unused)
    return model.to(model.words.weight.dtype)


def _fill_t5(spec: T5Spec, tensors: Tensors) -> T5Encoder:
    with torch.device("meta"):
        model = T5Encoder(spec)
    recipe = {
        "words.weight": same(_words(tensors)),
        "distances.weight": same(_DISTANCES),
        "norm.weight": same("encoder.final_layer_norm.weight"),
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
        recipe |= {f"{ours}.{ours_}.weight": same(f"{theirs}.{name}.weight") for ours_, name in names.items()}
    decoder = (name for name in tensors if name.startswith(("decoder.", "lm_head.")))
    return load_foreign(model, recipe, tensors, (*_WORDS, *decoder, "logit_scale"))


def _words(tensors: Tensors) -> str:
    return next((name for name in _WORDS if name in tensors), _WORDS[0])
