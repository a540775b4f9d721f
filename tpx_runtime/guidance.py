"""Classifier-free guidance: Ho and Salimans 2022 (arXiv:2207.12598), both branches in one batched call."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .engine import Session, output
from .samplers import Array


@dataclass(frozen=True)
class Conditioning:
    """What the text encoder says of a batch: context [B, text_tokens, width] and pooled [B, width]."""

    context: Array
    pooled: Array


class GuidedVelocity:
    """A velocity function for the samplers: v = v_negative + guidance (v_prompt - v_negative).

    Each call runs `transformer` once, on the batch [negative, prompt], or [prompt] where `negative` is None.
    `routes` collects [B, S, N] of the prompt's branch for each call, where the model has thinking blocks.
    """

    def __init__(
        self, transformer: Session, prompt: Conditioning, negative: Conditioning | None, guidance: float
    ) -> None:
        self._transformer, self._guidance = transformer, guidance
        self._branches = [prompt] if negative is None else [negative, prompt]
        self._context = np.concatenate([branch.context for branch in self._branches])
        self._pooled = np.concatenate([branch.pooled for branch in self._branches])
        self.routes: list[npt.NDArray[np.int64]] = []

    def __call__(self, latents: Array, timestep: float) -> Array:
        batch = np.concatenate([latents] * len(self._branches))
        outputs = self._transformer.run(
            {
                "latents": batch,
                "timestep": np.full(len(batch), timestep, np.float32),
                "context": self._context,
                "pooled": self._pooled,
            }
        )
        if "routes" in outputs:
            self.routes.append(outputs["routes"][-len(latents) :])
        velocity: Array = output(outputs, "velocity", batch.shape)
        if len(self._branches) == 1:
            return velocity
        negative, prompt = velocity[: len(latents)], velocity[len(latents) :]
        return negative + self._guidance * (prompt - negative)
