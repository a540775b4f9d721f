"""Classifier-free guidance: Ho and Salimans 2022 (arXiv:2207.12598), both branches in one batched call.

Two settings skip the negative branch, half of a step's work. Outside an interval of noise levels (Kynkaanniemi et al. 2024,
arXiv:2404.07724) only the prompt's branch is computed. And once a picture is laid out, the difference between the branches
changes little from step to step, so that some steps may reuse the previous one (as LinearAG of Castillo et al. 2023,
arXiv:2312.12487, and FasterCache, arXiv:2410.19355, do in other ways): `reused`.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from .engine import Arrays, Session, output
from .manifest import ModelSpec
from .modulation import Conditions
from .sampling import TRAIN_TIMESTEPS, Array


def guide(negative: Array, prompt: Array, guidance: float, channels: int) -> Array:
    """negative + guidance (prompt - negative) in the first `channels` of [B, C, H, W]; the others are the prompt's."""
    guided = negative[:, :channels] + guidance * (prompt[:, :channels] - negative[:, :channels])
    return np.concatenate([guided, prompt[:, channels:]], axis=1) if channels < prompt.shape[1] else guided


def mixing(guidance: float, pictures: int) -> Array:
    """`guide` as a matrix [rows, rows] over the rows of a call: `pictures` of them at guidance 1, else twice as many.

    Both rows of a picture get its guided sum, which is the input of the next call.
    """
    one = np.eye(pictures, dtype=np.float32)
    return one if guidance == 1 else np.tile(np.hstack([(1 - guidance) * one, guidance * one]), (2, 1))


def is_guided(timestep: float, guidance: float, interval: tuple[float, float]) -> bool:
    """Whether a step has both branches; `interval` is of timestep / 1000: 1 is noise alone, 0 the picture, ends included."""
    low, high = interval
    return guidance != 1 and low <= timestep / TRAIN_TIMESTEPS <= high


def reused(
    timesteps: Sequence[float], guidance: float, interval: tuple[float, float], every: int
) -> frozenset[float]:
    """Those of a loop's timesteps that take the difference of the branches from a step before.

    The first two fifths of the guided steps, where the layout is decided, have both branches; of the others each `every`-th.
    """
    guided = [at for at in timesteps if is_guided(at, guidance, interval)]
    later = guided[math.ceil(2 * len(guided) / 5) :]
    return frozenset(at for i, at in enumerate(later, start=1) if i % every)


class GuidedPrediction:
    """The function that samplers call: the guided velocity, or epsilon, at latents [B, C, H, W] and a timestep.

    `conditioning` is a conditioner's output for the branches [negative, prompt], or [prompt] alone at guidance 1, each with
    as many rows as the latents; `conditions` are those of the same rows. Each call runs `transformer` once: on all rows, or
    on the prompt's outside `interval` (of `is_guided`) and at timesteps that are `reused`. `routes` collects [B, S, N] of
    the prompt's branch for each call, if the model has thinking blocks.
    """

    def __init__(
        self,
        transformer: Session,
        model: ModelSpec,
        conditioning: Arrays,
        conditions: Conditions,
        guidance: float,
        interval: tuple[float, float],
        reused: Collection[float] = (),
    ) -> None:
        self._transformer, self._model, self._conditions = transformer, model, conditions
        self._guidance, self._interval, self._reused = guidance, interval, reused
        self._conditioning = {
            name: conditioning[name] for name in model.transformer_inputs if name in conditioning
        }
        # Made once: engines do not upload again what is the array of the call before.
        self._prompts = {
            name: rows if guidance == 1 else rows[len(rows) // 2 :]
            for name, rows in self._conditioning.items()
        }
        self._difference: Array  # [B, C, H, W], of the last call that had both branches
        self.routes: list[npt.NDArray[np.int64]] = []

    def __call__(self, latents: Array, timestep: float) -> Array:
        model, conditions = self._model, self._conditions.at(timestep)
        guided = is_guided(timestep, self._guidance, self._interval)
        both = guided and timestep not in self._reused
        if both:
            batch, conditioning = np.concatenate([latents] * 2), self._conditioning
        else:
            batch, conditioning, conditions = latents, self._prompts, conditions[-len(latents) :]
        outputs = self._transformer.run({"latents": batch, "conditions": conditions, **conditioning})
        if "routes" in outputs:
            self.routes.append(outputs["routes"][-len(latents) :])
        shape = (len(batch), model.out_channels, *model.latent_size)
        prediction: Array = output(outputs, model.prediction, shape)
        prompt = prediction[-len(latents) :]
        if not guided:
            return prompt
        if both:
            self._difference = prompt - prediction[: len(latents)]
        negative = prediction[: len(latents)] if both else prompt - self._difference
        return guide(negative, prompt, self._guidance, model.guided_channels)
