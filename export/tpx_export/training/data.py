"""The data of each training step: which pictures, in which order, and their captions or classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpx_export.training.cache import Cache, key
from tpx_runtime.conditioning import EncoderOutput, combine
from tpx_runtime.manifest import ModelSpec

Told = tuple[Tensor, ...]  # context [B, L, W] and pooled [B, P], or class_id [B]


def seeded(*numbers: int) -> torch.Generator:
    """A random stream for that tuple of numbers, independent of those of others."""
    return torch.Generator().manual_seed(int(key(*numbers)[:15], 16))


@dataclass(frozen=True)
class Data:
    """Pictures with their captions or classes, `told`. `latents` are keys of the cache.

    `captions` has for every caption, and for "", the key of each text encoder's output.
    """

    model: ModelSpec
    cache: Cache
    latents: tuple[str, ...]
    told: tuple[str | int, ...]
    captions: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def fingerprint(self) -> str:
        """A hash of the pictures, their sizes, captions and order."""
        return key(self.latents, self.told)

    def rows(self, seed: int, step: int, batch: int) -> list[int]:
        """The numbers of a step's pictures. Each epoch has all pictures in a random order of its own."""
        places, orders = range(step * batch, (step + 1) * batch), dict[int, list[int]]()
        for epoch in {place // len(self) for place in places}:
            orders[epoch] = torch.randperm(len(self), generator=seeded(seed, 1, epoch)).tolist()
        return [orders[place // len(self)][place % len(self)] for place in places]

    def batch(self, rows: Sequence[int], dropped: Sequence[bool], device: str) -> tuple[Tensor, Told]:
        """Latents float32 [B, C, S, S] of `rows`, and their conditioning, which is unconditional where `dropped`."""
        clean = torch.stack([self.cache.get(self.latents[row])["latents"] for row in rows])
        told = [self.told[row] for row in rows]
        if self.model.classes:
            ids = [self.model.classes if drop else t for t, drop in zip(told, dropped, strict=True)]
            return clean.to(device), (torch.tensor(ids, device=device),)
        texts = ["" if drop else str(t) for t, drop in zip(told, dropped, strict=True)]
        joined = combine([self._said(part, texts) for part in range(len(self.captions[""]))], self.model)
        return clean.to(device), tuple(torch.from_numpy(joined[n]).to(device) for n in ("context", "pooled"))

    def _said(self, part: int, texts: Sequence[str]) -> EncoderOutput:
        """The output of text encoder number `part` for `texts`, from the cache."""
        entries = [self.cache.get(self.captions[text][part]) for text in texts]
        context = torch.stack([entry["context"] for entry in entries]).numpy()
        pooled = (
            torch.stack([entry["pooled"] for entry in entries]).numpy() if "pooled" in entries[0] else None
        )
        return context, pooled
