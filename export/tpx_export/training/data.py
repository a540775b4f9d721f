"""The data of each training step: images in a seeded random order, with their captions or classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpx_export.training.cache import Cache, key
from tpx_runtime.conditioning import EncoderOutput, combine
from tpx_runtime.manifest import ModelSpec

Conditioning = tuple[Tensor, ...]  # context [B, L, W] and pooled [B, P], or class_id [B]


def seeded_generator(*numbers: int) -> torch.Generator:
    """A random generator for that tuple of numbers, independent of the generators of other tuples."""
    return torch.Generator().manual_seed(int(key(*numbers)[:15], 16))


@dataclass(frozen=True)
class Data:
    """Images and their captions or classes. `latents` has the cache key of each image's latents.

    `captions` has the cache keys of the text encoders' outputs for every caption and for "".
    """

    model: ModelSpec
    cache: Cache
    latents: tuple[str, ...]
    conditions: tuple[str | int, ...]
    captions: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def fingerprint(self) -> str:
        """A hash of the images, their sizes, captions or classes, and order."""
        return key(self.latents, self.conditions)

    def rows(self, seed: int, step: int, batch: int) -> list[int]:
        """The indices of the images of a step. Each epoch has all images in a new random order."""
        positions, orders = range(step * batch, (step + 1) * batch), dict[int, list[int]]()
        for epoch in {position // len(self) for position in positions}:
            orders[epoch] = torch.randperm(len(self), generator=seeded_generator(seed, 1, epoch)).tolist()
        return [orders[position // len(self)][position % len(self)] for position in positions]

    def batch(self, rows: Sequence[int], dropped: Sequence[bool], device: str) -> tuple[Tensor, Conditioning]:
        """Latents float32 [B, C, H, W] of `rows`, and their conditioning, which is unconditional if `dropped`."""
        latents = torch.stack([self.cache.get(self.latents[row])["latents"] for row in rows]).to(device)
        conditions = [self.conditions[row] for row in rows]
        if self.model.classes:
            ids = [self.model.classes if drop else c for c, drop in zip(conditions, dropped, strict=True)]
            return latents, (torch.tensor(ids, device=device),)
        texts = ["" if drop else str(c) for c, drop in zip(conditions, dropped, strict=True)]
        encoders = range(len(self.captions[""]))
        combined = combine([self._text_output(encoder, texts) for encoder in encoders], self.model)
        return latents, tuple(torch.from_numpy(combined[n]).to(device) for n in ("context", "pooled"))

    def _text_output(self, encoder: int, texts: Sequence[str]) -> EncoderOutput:
        """The output of text encoder number `encoder` for `texts`, from the cache."""
        entries = [self.cache.get(self.captions[text][encoder]) for text in texts]
        context = torch.stack([entry["context"] for entry in entries]).numpy()
        pooled = (
            torch.stack([entry["pooled"] for entry in entries]).numpy() if "pooled" in entries[0] else None
        )
        return context, pooled
