"""The magnitudes of activations, from hooks on every layer, over whole sampling trajectories of the float32 model.

These use the model's own sampler, steps and guidance, with both branches, at every depth 1..T: the layers are the same at
all depths, so one range serves all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tpx_export.golden import Golden
from tpx_export.pipeline import Pipeline, TextPart
from tpx_export.precision import in_float32
from tpx_export.quantise.grid import Magnitudes
from tpx_export.quantise.layers import Layers
from tpx_export.quantise.prompts import drawn_together
from tpx_runtime.conditioning import EncoderOutput, combine
from tpx_runtime.guidance import apply_guidance, is_guided
from tpx_runtime.noise import batch_noise
from tpx_runtime.sampling import SAMPLERS_FOR, Array
from tpx_runtime.tokenizer import make_tokenizer

SEED = 20260501  # of the first trajectory; pictures shown afterwards have other seeds


@dataclass
class Told:
    """Conditioning rows for calibration: row 0 is unconditional, then one per prompt or class.

    Text encoders add their outputs one after another, each while it is in memory.
    """

    subjects: Sequence[str | int]
    said: list[EncoderOutput] = field(default_factory=list)

    @torch.no_grad()
    def hear(self, part: TextPart, encoder: nn.Module) -> None:
        """Add a text encoder's outputs for every prompt."""
        tokenizer = make_tokenizer(part.vocabulary, Path("vocab.json"))
        every = [tokenizer.encode_empty(), *(tokenizer.encode(str(prompt)) for prompt in self.subjects)]
        with in_float32(encoder):
            rows = [encoder(torch.tensor([one.ids])) for one in every]
        if part.spec.pooled_width:
            context, pooled = (torch.cat(values).numpy() for values in zip(*rows, strict=True))
            self.said.append((context, pooled))
        else:
            firsts = [row[0] if isinstance(row, tuple) else row for row in rows]
            self.said.append((torch.cat(firsts).numpy(), None))

    def rows(self, pipeline: Pipeline) -> Golden:
        """The transformer's inputs by name, each [1 + subjects, ...]."""
        if classes := pipeline.model.classes:
            return {"class_id": np.array([classes, *self.subjects], np.int64)}
        return dict(combine(self.said, pipeline.model))


@torch.no_grad()
def activations(
    transformer: nn.Module,
    layers: Layers,
    seen: Mapping[str, Magnitudes],
    pipeline: Pipeline,
    told: Golden,
    depth: int,
) -> None:
    """Sample a trajectory for every row of `told` (from `Told.rows`), and add the inputs of each of `layers` to `seen`.

    Raises ValueError for activations that are not finite.
    """
    model, defaults = pipeline.model, pipeline.defaults
    sampler = SAMPLERS_FOR[model.prediction][defaults.sampler]
    schedule = sampler.schedule(defaults.steps, pipeline.shift or 1.0)
    rows = len(next(iter(told.values()))) - 1
    at_once = drawn_together(model)
    with in_float32(transformer), watched(layers, seen):
        for first in range(1, rows + 1, at_once):
            some = range(first, min(first + at_once, rows + 1))
            noise_at = partial(batch_noise, [SEED + row for row in some], model.latent_shape)
            predict = _guided(transformer, pipeline, told, some, depth)
            for _ in sampler.denoise(predict, noise_at(), schedule, noise_at):
                pass


@contextmanager
def watched(layers: Layers, seen: Mapping[str, Magnitudes]) -> Iterator[None]:
    """Within it, the inputs of each of `layers` are added to the magnitudes under its name."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].add(inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _guided(
    transformer: nn.Module, pipeline: Pipeline, told: Golden, some: range, depth: int
) -> Callable[[Array, float], Array]:
    guidance, channels = pipeline.defaults.guidance, pipeline.model.guided_channels
    interval = pipeline.defaults.guidance_interval
    branches = [0] * len(some) * (guidance != 1) + list(some)
    given = [torch.from_numpy(values[branches]) for values in told.values()]

    def predict(x: Array, timestep: float) -> Array:
        latents = torch.from_numpy(np.concatenate([x] * (len(branches) // len(x))).astype(np.float32))
        times = torch.full((len(latents),), timestep, dtype=torch.float32)
        prediction: Array = transformer(latents, times, *given, depth)[0].numpy()
        negative, prompt = prediction[: len(x)], prediction[-len(x) :]
        return (
            apply_guidance(negative, prompt, guidance, channels)
            if is_guided(timestep, guidance, interval)
            else prompt
        )

    return predict
