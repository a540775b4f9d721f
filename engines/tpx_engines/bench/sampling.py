"""The runtime's sampling loop around any denoiser: what baselines are drawn with, so that only calls of networks differ."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tpx_runtime.bundle import Bundle
from tpx_runtime.denoising import Callback, Sample, require_finite
from tpx_runtime.editing import Edit
from tpx_runtime.engine import Arrays, Engine, Spelling
from tpx_runtime.generator import Generator
from tpx_runtime.guidance import guide
from tpx_runtime.noise import batch_noise
from tpx_runtime.registry import SAMPLERS_FOR, walk
from tpx_runtime.samplers import Array
from tpx_runtime.settings import Settings

Network = Callable[
    ..., Sequence[npt.NDArray[Any]]
]  # arrays in the order of a graph's inputs -> its outputs in order


class _Session:
    """A network as the runtime's sessions are."""

    def __init__(self, network: Network, names: Sequence[str]) -> None:
        self._network, self._names = network, names

    def run(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._names, self._network(*inputs.values()), strict=False))


class Framework:
    """An engine to the runtime's eyes, which answers for a bundle's text encoders and decoder with networks of its own."""

    spelling: Spelling = "plain"

    def __init__(self, name: str, networks: dict[str, Network]) -> None:
        self.name, self._networks = name, networks

    def open(self, path: Path) -> _Session:
        folder = path.parent.name
        names = ("image",) if folder == "vae_decoder" else ("context", "pooled")
        return _Session(self._networks[folder], names)


class BaselineGenerator(Generator):
    """The runtime's generator, whose denoiser is one function of latents, timestep and what the model is told."""

    def __init__(self, bundle: Bundle, name: str, denoiser: Network, others: dict[str, Network]) -> None:
        super().__init__(bundle, cast(Engine, Framework(name, others)))
        self._denoiser = denoiser

    def generate_latents(
        self, jobs: Sequence[Settings], callback: Callback | None = None, edit: Edit | None = None
    ) -> Sample:
        """The loop of the runtime's own, both branches in one call, for jobs that differ in nothing but the seed."""
        job, model, seeds = jobs[0], self.manifest.model, [job.seed for job in jobs]
        guided = job.guidance != 1
        if self.classes:
            told = self.classes([None] * len(jobs) * guided + [job.class_id] * len(jobs))
        else:
            assert self.text is not None
            told = self.text([None] * len(jobs) * guided + [job.prompt] * len(jobs))

        def predict(x: Array, timestep: float) -> Array:
            batch = np.concatenate([x, x] if guided else [x]).astype(np.float32, copy=False)
            prediction: Array = self._denoiser(
                batch, np.full(len(batch), timestep, np.float32), *told.values()
            )[0]
            if not guided:
                return prediction
            negative, prompt = np.split(prediction, 2)
            return guide(negative, prompt, job.guidance, model.guided_channels)

        sampler = SAMPLERS_FOR[model.prediction][job.sampler]
        shift = self.bundle.schedule_shift if model.prediction == "velocity" else 1.0
        schedule, noise_at = (
            sampler.schedule(job.steps, shift),
            partial(batch_noise, seeds, model.latent_shape),
        )
        noise = batch_noise(seeds, model.latent_shape)
        for step, latents in enumerate(walk(sampler, predict, noise, schedule, noise_at), start=1):
            require_finite(latents, f"latents of step {step}", self.bundle, self.engine)
            if callback:
                callback(step, job.steps, latents)
        return Sample(latents, [])
