"""What a step learns from: which pictures, in which order, and what the model is told of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpx_export.training.cache import Cache, key
from tpx_runtime.conditioning import Said, combine
from tpx_runtime.manifest import ModelSpec

Told = tuple[Tensor, ...]  # context [B, L, W] and pooled [B, P], or class_id [B]


def seeded(*numbers: int) -> torch.Generator:
    """A random stream of its own for every tuple of numbers."""
    return torch.Generator().manual_seed(int(key(*numbers)[:15], 16))


@dataclass(frozen=True)
class Data:
    """Pictures by their cached latents, told by captions or classes; `captions` has the keys of every caption and of ""."""

    model: ModelSpec
    cache: Cache
    latents: tuple[str, ...]
    told: tuple[str | int, ...]
    captions: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def fingerprint(self) -> str:
        """Of the pictures, their sizes, captions and order."""
        return key(self.latents, self.told)

    def rows(self, seed: int, step: int, batch: int) -> list[int]:
        """The pictures of a step: all of them in a random order, then again in another."""
        places, orders = range(step * batch, (step + 1) * batch), dict[int, list[int]]()
        for epoch in {place // len(self) for place in places}:
            orders[epoch] = torch.randperm(len(self), generator=seeded(seed, 1, epoch)).tolist()
        return [orders[place // len(self)][place % len(self)] for place in places]

    def batch(self, rows: Sequence[int], dropped: Sequence[bool], device: str) -> tuple[Tensor, Told]:
        """Latents float32 [B, C, S, S] of `rows` and what is told of them, which is nothing where `dropped`."""
        clean = torch.stack([self.cache.get(self.latents[row])["latents"] for row in rows])
        told = [self.told[row] for row in rows]
        if self.model.classes:
            ids = [self.model.classes if drop else t for t, drop in zip(told, dropped, strict=True)]
            return clean.to(device), (torch.tensor(ids, device=device),)
        texts = ["" if drop else str(t) for t, drop in zip(told, dropped, strict=True)]
        joined = combine([self._said(part, texts) for part in range(len(self.captions[""]))], self.model)
        return clean.to(device), tuple(torch.from_numpy(joined[n]).to(device) for n in ("context", "pooled"))

    def _said(self, part: int, texts: Sequence[str]) -> Said:
        """What encoder number `part` says of texts."""
        entries = [self.cache.get(self.captions[text][part]) for text in texts]
        context = torch.stack([entry["context"] for entry in entries]).numpy()
        pooled = (
            torch.stack([entry["pooled"] for entry in entries]).numpy() if "pooled" in entries[0] else None
        )
        return context, pooled
