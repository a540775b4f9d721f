"""Classifier-free guidance: Ho and Salimans 2022 (arXiv:2207.12598), both branches in one batched call."""

import numpy as np
import numpy.typing as npt

from .engine import Arrays, Session, output
from .manifest import ModelSpec
from .samplers import Array


def guide(negative: Array, prompt: Array, guidance: float, channels: int) -> Array:
    """negative + guidance (prompt - negative) in the first `channels` of [B, C, H, W]; the others are the prompt's."""
    guided = negative[:, :channels] + guidance * (prompt[:, :channels] - negative[:, :channels])
    return np.concatenate([guided, prompt[:, channels:]], axis=1) if channels < prompt.shape[1] else guided


class GuidedPrediction:
    """The function that samplers call: the guided velocity, or epsilon, at latents [B, C, H, W] and a timestep.

    `prompt` and `negative` are what a conditioner made. Each call runs `transformer` once, on the batch [negative, prompt],
    or [prompt] where `negative` is None. `routes` collects [B, S, N] of the prompt's branch for each call, where the model
    has thinking blocks.
    """

    def __init__(
        self, transformer: Session, model: ModelSpec, prompt: Arrays, negative: Arrays | None, guidance: float
    ) -> None:
        self._transformer, self._model, self._guidance = transformer, model, guidance
        self._branches = [prompt] if negative is None else [negative, prompt]
        self._told = {name: np.concatenate([b[name] for b in self._branches]) for name in prompt}
        self.routes: list[npt.NDArray[np.int64]] = []

    def __call__(self, latents: Array, timestep: float) -> Array:
        batch, model = np.concatenate([latents] * len(self._branches)), self._model
        times = np.full(len(batch), timestep, np.float32)
        outputs = self._transformer.run({"latents": batch, "timestep": times, **self._told})
        if "routes" in outputs:
            self.routes.append(outputs["routes"][-len(latents) :])
        shape = (len(batch), model.out_channels, *model.latent_size)
        prediction: Array = output(outputs, model.prediction, shape)
        if len(self._branches) == 1:
            return prediction
        negative, prompt = prediction[: len(latents)], prediction[len(latents) :]
        return guide(negative, prompt, self._guidance, model.guided_channels)
