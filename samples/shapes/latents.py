"""Latents of rendered training scenes, cached on disk in shards; their prompts are generated again each time."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from samples.shapes.captions import TRAINING_MIX, Prompt, training_pairs
from samples.shapes.fit import atomic_save
from samples.shapes.render import render
from samples.shapes.world import SIDE_PX, Scene
from tpx_export.model.autoencoder import Autoencoder
from tpx_export.training.state import load_saved
from tpx_runtime.errors import BadInput

SHARD_SIZE = 2048
RENDER_BATCH = 32


def load_shard(
    folder: Path,
    index: int,
    seed: int,
    autoencoder: Autoencoder,
    mix: Mapping[str, float] = TRAINING_MIX,
) -> tuple[list[Prompt], Tensor]:
    """Prompts and latents float16 [SHARD_SIZE, C, S, S] of one shard, rendered and encoded if they are not cached."""
    pairs = list(itertools.islice(training_pairs(seed * 1_000_003 + index, mix), SHARD_SIZE))
    # Another mix gives other prompts, which need another file name.
    prompts_hash = hashlib.sha256(repr([prompt for prompt, _ in pairs]).encode()).hexdigest()[:8]
    path = folder / f"latents-{seed}-{fingerprint(autoencoder)}-{prompts_hash}-{index:04d}.pt"
    if not path.exists():
        atomic_save(encode_scenes([scene for _, scene in pairs], autoencoder), path)
    return [prompt for prompt, _ in pairs], read_latents(path, SHARD_SIZE, autoencoder)


def read_latents(path: Path, count: int, autoencoder: Autoencoder) -> Tensor:
    """The cached latents of `count` scenes. Raises BadInput for a file that is damaged or something else."""
    latents = load_saved(path)
    expected = (count, autoencoder.spec.latent_channels, *latent_size(autoencoder))
    if not isinstance(latents, Tensor) or (latents.shape, latents.dtype) != (expected, torch.float16):
        raise BadInput(
            f"expected the latents of {count} scenes in {path}, found something else; delete it to render them again"
        )
    return latents


@torch.no_grad()
def encode_scenes(scenes: Sequence[Scene], autoencoder: Autoencoder) -> Tensor:
    """Render and encode scenes: latents float16 [len(scenes), C, S, S]."""
    device, parts = next(autoencoder.parameters()).device, []
    for start in range(0, len(scenes), RENDER_BATCH):
        group = scenes[start : start + RENDER_BATCH]
        image = render(group, SIDE_PX, str(device), fast=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            parts.append(autoencoder.encode(image * 2 - 1).half().cpu())
    return torch.cat(parts)


def fingerprint(autoencoder: Autoencoder) -> str:
    """Hash of the encoder's weights and the spec, on which latents depend; it is part of the file names of shards."""
    digest = hashlib.sha256(repr(autoencoder.spec).encode())
    for value in autoencoder.encoder.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def latent_size(autoencoder: Autoencoder) -> tuple[int, int]:
    """(height, width) of the latents of an image of the shapes world."""
    side = SIDE_PX // autoencoder.spec.factor
    return side, side
