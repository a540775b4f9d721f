"""Classifier-free guidance: Ho and Salimans 2022 (arXiv:2207.12598), both branches in one batched call."""

import numpy as np
import numpy.typing as npt

from .engine import Arrays, Session, output
from .manifest import ModelSpec
from .modulation import Conditions
from .samplers import Array


def guide(negative: Array, prompt: Array, guidance: float, channels: int) -> Array:
    """negative + guidance (prompt - negative) in the first `channels` of [B, C, H, W]; the others are the prompt's."""
    guided = negative[:, :channels] + guidance * (prompt[:, :channels] - negative[:, :channels])
    return np.concatenate([guided, prompt[:, channels:]], axis=1) if channels < prompt.shape[1] else guided


class GuidedPrediction:
    """The function that samplers call: the guided velocity, or epsilon, at latents [B, C, H, W] and a timestep.

    `told` is what a conditioner made of the branches [negative, prompt], or of [prompt] alone at guidance 1, each as long as
    the latents; `conditions` are those of the same rows. Each call runs `transformer` once, on all rows. `routes` collects
    [B, S, N] of the prompt's branch for each call, where the model has thinking blocks.
    """

    def __init__(
        self, transformer: Session, model: ModelSpec, told: Arrays, conditions: Conditions, guidance: float
    ) -> None:
        self._transformer, self._model, self._guidance = transformer, model, guidance
        self._conditions = conditions
        self._told = {name: told[name] for name in model.transformer_inputs if name in told}
        self.routes: list[npt.NDArray[np.int64]] = []

    def __call__(self, latents: Array, timestep: float) -> Array:
        model, conditions = self._model, self._conditions.at(timestep)
        batch = np.concatenate([latents] * (len(conditions) // len(latents)))
        outputs = self._transformer.run({"latents": batch, "conditions": conditions, **self._told})
        if "routes" in outputs:
            self.routes.append(outputs["routes"][-len(latents) :])
        shape = (len(batch), model.out_channels, *model.latent_size)
        prediction: Array = output(outputs, model.prediction, shape)
        if len(batch) == len(latents):
            return prediction
        negative, prompt = prediction[: len(latents)], prediction[len(latents) :]
        return guide(negative, prompt, self._guidance, model.guided_channels)
