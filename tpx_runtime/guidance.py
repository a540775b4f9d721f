"""Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), both branches in one batched call.

Two settings skip the negative branch, which halves the cost of a step. Outside an interval of noise levels (Kynkaanniemi et
al. 2024, arXiv:2404.07724) only the branch of the prompt is computed. And once the layout of an image is decided, the
difference between the branches changes little from step to step, so that some steps can reuse the previous difference
(`reused_timesteps`; LinearAG of Castillo et al. 2023, arXiv:2312.12487, and FasterCache, arXiv:2410.19355, are related).
"""

import math
from collections.abc import Collection, Sequence

import numpy as np

from .engine import Arrays, Session, checked_output
from .manifest import ModelSpec
from .modulation import Conditions
from .sampling import TRAIN_TIMESTEPS, Array


def apply_guidance(negative: Array, prompt: Array, guidance: float, channels: int) -> Array:
    """negative + guidance (prompt - negative) in the first `channels` of [B, C, H, W]; the other channels of `prompt`."""
    guided = negative[:, :channels] + guidance * (prompt[:, :channels] - negative[:, :channels])
    return np.concatenate([guided, prompt[:, channels:]], axis=1) if channels < prompt.shape[1] else guided


def guidance_matrix(guidance: float, images: int) -> Array:
    """`apply_guidance` as a matrix [rows, rows] over the batch: `images` rows at guidance 1, else twice as many.

    Both rows of an image get its guided sum, because it is the input of both branches in the next call.
    """
    identity = np.eye(images, dtype=np.float32)
    if guidance == 1:
        return identity
    return np.tile(np.hstack([(1 - guidance) * identity, guidance * identity]), (2, 1))


def is_guided(timestep: float, guidance: float, interval: tuple[float, float]) -> bool:
    """Whether guidance acts at a step; `interval` (inclusive) limits timestep / 1000: 1 is pure noise, 0 the image."""
    low, high = interval
    return guidance != 1 and low <= timestep / TRAIN_TIMESTEPS <= high


def skipped_timesteps(timesteps: Sequence[float], every: int) -> frozenset[float]:
    """All `timesteps` but the first two fifths, where the layout is decided, and every `every`-th of the others.

    A timestep that occurs twice, as the rounded ones of long schedules do, is not skipped if one of them is not.
    """
    first = math.ceil(2 * len(timesteps) / 5)
    return frozenset(timesteps).difference(timesteps[:first], timesteps[first + every - 1 :: every])


def reused_timesteps(
    timesteps: Sequence[float], guidance: float, interval: tuple[float, float], every: int
) -> frozenset[float]:
    """The timesteps at which the difference of the branches is reused from an earlier step.

    Both branches are computed at the first two fifths of the guided steps, then at every `every`-th guided step.
    """
    return skipped_timesteps([t for t in timesteps if is_guided(t, guidance, interval)], every)


class GuidedPrediction:
    """The prediction that samplers call: the guided velocity or epsilon at latents [B, C, H, W] and a timestep.

    `conditioning` is a conditioner's output for the branches [negative, prompt], or only [prompt] at guidance 1, each with
    as many rows as the latents; `conditions` are those of the same rows. Each call runs `transformer` once: on all rows, or
    only on those of the prompt outside `interval` (see `is_guided`) and at the timesteps in `reused`.
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
        # Sliced only once, because engines do not upload an array again that is the same object as in the previous call.
        self._prompt_conditioning = {
            name: rows if guidance == 1 else rows[len(rows) // 2 :]
            for name, rows in self._conditioning.items()
        }
        self._difference: Array  # [B, C, H, W], of the last call with both branches

    def __call__(self, latents: Array, timestep: float) -> Array:
        model, conditions = self._model, self._conditions.for_timestep(timestep)
        guided = is_guided(timestep, self._guidance, self._interval)
        both = guided and timestep not in self._reused
        if both:
            batch, conditioning = np.concatenate([latents] * 2), self._conditioning
        else:
            batch, conditioning = latents, self._prompt_conditioning
            conditions = conditions[-len(latents) :]
        outputs = self._transformer.run({"latents": batch, "conditions": conditions, **conditioning})
        shape = (len(batch), model.out_channels, *model.latent_size)
        prediction: Array = checked_output(outputs, model.prediction, shape)
        prompt = prediction[-len(latents) :]
        if not guided:
            return prompt
        if both:
            self._difference = prompt - prediction[: len(latents)]
        negative = prediction[: len(latents)] if both else prompt - self._difference
        return apply_guidance(negative, prompt, self._guidance, model.guided_channels)
