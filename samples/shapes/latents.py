"""Latents of rendered training scenes, made once and kept in shards; the prompts are drawn anew each time."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from samples.shapes.captions import TRAINING_MIX, Prompt, training_pairs
from samples.shapes.fit import save_whole
from samples.shapes.render import render
from samples.shapes.world import Scene
from tpx_export.model.autoencoder import Autoencoder

SHARD = 2048
RENDER_BATCH = 32


def shard(
    folder: Path,
    index: int,
    seed: int,
    autoencoder: Autoencoder,
    mix: Mapping[str, float] = TRAINING_MIX,
) -> tuple[list[Prompt], Tensor]:
    """Prompts and latents float16 [SHARD, C, S, S] of one shard, rendered and encoded if not there yet."""
    pairs = list(itertools.islice(training_pairs(seed * 1_000_003 + index, mix), SHARD))
    # Another mix has other prompts, and its latents another name.
    told = hashlib.sha256(repr([prompt for prompt, _ in pairs]).encode()).hexdigest()[:8]
    path = folder / f"latents-{seed}-{fingerprint(autoencoder)}-{told}-{index:04d}.pt"
    if not path.exists():
        save_whole(encoded([scene for _, scene in pairs], autoencoder), path)
    return [prompt for prompt, _ in pairs], torch.load(path, weights_only=True)


@torch.no_grad()
def encoded(scenes: Sequence[Scene], autoencoder: Autoencoder) -> Tensor:
    """Scenes rendered and encoded, float16 [len(scenes), C, S, S]."""
    device, parts = next(autoencoder.parameters()).device, []
    for start in range(0, len(scenes), RENDER_BATCH):
        group = scenes[start : start + RENDER_BATCH]
        image = render(group, autoencoder.spec.image_size_px, str(device), fast=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            parts.append(autoencoder.encode(image * 2 - 1).half().cpu())
    return torch.cat(parts)


def fingerprint(autoencoder: Autoencoder) -> str:
    """Of the autoencoder's weights and scale: latents depend on them, so it is in the name of a shard."""
    digest = hashlib.sha256(repr(autoencoder.spec).encode())
    for value in autoencoder.encoder.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
