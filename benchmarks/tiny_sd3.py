"""Tiny random Stable Diffusion 3 pipelines, saved by diffusers, for measuring and testing parity.

Their vocabularies are small, so that nothing is downloaded; test_tokenizer_parity.py compares the real ones.
"""

import json
import shutil
import string
from pathlib import Path
from typing import Any

import torch

MERGES = ("r e", "re d</w>", "b l", "bl u", "blu e</w>", "c u", "o n</w>", "a</w> !</w>")
PIECES = ("▁red", "▁blue", "▁cube", "▁on", "▁a", "▁b", "ball", "▁")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

VARIANTS: dict[str, dict[str, Any]] = {
    "sd3-medium": {},
    "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "sd3.5-large": {"qk_norm": "rms_norm", "num_layers": 4},
}


def clip_words() -> list[str]:
    """A CLIP vocabulary in id order: bytes, bytes that end a word, merges, BOS and EOS."""
    bytes_ = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in bytes_] + [chr(256 + i) for i in range(256 - len(bytes_))]
    return [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m.split()) for m in MERGES), BOS, EOS]


def write_clip_tokenizer(folder: Path, pad: str) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, as CLIPTokenizer saves them."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(clip_words())}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    facts = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad, "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps({**facts, "tokenizer_class": "CLIPTokenizer"}))


def randomise(module: torch.nn.Module, scale: float = 0.2) -> torch.nn.Module:
    """Randomise all parameters, also norms and biases, so that a test notices a missing one."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * scale / 2)
            elif "embedding" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module.eval()


def save_pipeline(folder: Path, variant: str, seed: int = 0) -> Any:
    """Save a StableDiffusion3Pipeline with random weights, small vocabularies and 32 x 32 pixels in `folder`; returns it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    torch.manual_seed(seed)
    tokenizers, clips = [], []
    for number, (width, act, pad) in enumerate(((16, "quick_gelu", "<|endoftext|>"), (24, "gelu", "!"))):
        write_clip_tokenizer(folder / f"vocabulary{number}", pad)
        tokenizers.append(CLIPTokenizer.from_pretrained(folder / f"vocabulary{number}"))
        config = CLIPTextConfig(
            vocab_size=len(clip_words()),
            bos_token_id=len(clip_words()) - 2,
            eos_token_id=len(clip_words()) - 1,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_act=act,
        )
        clips.append(randomise(CLIPTextModelWithProjection(config)))
        shutil.rmtree(folder / f"vocabulary{number}")
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -3.0) for p in PIECES)]
    t5_tokenizer = T5TokenizerFast(vocab=[*pieces, *((c, -6.0) for c in letters)])
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=48,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    transformer = {
        "sample_size": 16,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 40,
        "pos_embed_max_size": 12,
        **VARIANTS[variant],
    }
    pipeline = StableDiffusion3Pipeline(
        text_encoder=clips[0],
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=randomise(T5EncoderModel(t5)),
        tokenizer_3=t5_tokenizer,
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        # Last, so that all variants have the same encoders and autoencoder.
        transformer=randomise(SD3Transformer2DModel(**transformer)),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def tiny_vae(**changes: Any) -> Any:
    """A small autoencoder with SD3's configuration, or another one with `changes`."""
    from diffusers import AutoencoderKL

    settings = {
        "latent_channels": 16,
        "block_out_channels": (32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        **changes,
    }
    vae = AutoencoderKL(**settings)
    randomise(vae)
    with torch.no_grad():
        # Grey images, because clipped black and white would hide errors.
        vae.decoder.conv_out.weight.mul_(0.1)
    return vae
