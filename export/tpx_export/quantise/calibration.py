"""Calibration: what is to be known of the inputs of every layer, over whole sampling trajectories of the float32 model.

Trajectories use the model's default sampler, steps and guidance, with both branches, at every depth 1..T. All depths share
their layers, so each layer has one record for all of them: a Gram matrix for weights, and a histogram for int8 activations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import nn

from tpx_export.golden import Golden
from tpx_export.pipeline import Pipeline, TextPart
from tpx_export.precision import in_float32
from tpx_export.quantise.activation_grid import MagnitudeHistogram
from tpx_export.quantise.gptq import Gram
from tpx_export.quantise.layers import Layers
from tpx_export.quantise.prompts import images_per_batch
from tpx_runtime.conditioning import EncoderOutput, combine
from tpx_runtime.guidance import apply_guidance, is_guided
from tpx_runtime.noise import batch_noise
from tpx_runtime.sampling import SAMPLERS_FOR, Array

SEED = 20260501  # of the first trajectory; the images of the comparison have other seeds


class Recorder(Protocol):
    """What keeps a record of the inputs of a layer."""

    def add(self, x: torch.Tensor) -> None:
        """Add inputs of the layer. Raises ValueError if any is not finite."""


class HistogramAndGram:
    """Both records of a layer's inputs."""

    def __init__(self) -> None:
        self.histogram, self.gram = MagnitudeHistogram(), Gram()

    def add(self, x: torch.Tensor) -> None:
        self.histogram.add(x)
        self.gram.add(x)


@dataclass
class CalibrationInputs:
    """The conditioning of the calibration trajectories: row 0 is unconditional, then one row per prompt or class.

    `add_text_encoder` is called for one text encoder after another, while each is in memory.
    """

    subjects: Sequence[str | int]
    text_outputs: list[EncoderOutput] = field(default_factory=list)

    @torch.no_grad()
    def add_text_encoder(self, part: TextPart, encoder: nn.Module) -> None:
        """Add the outputs of a text encoder for every prompt."""
        tokenizer = part.tokenizer()
        encodings = [tokenizer.encode_empty(), *(tokenizer.encode(str(prompt)) for prompt in self.subjects)]
        with in_float32(encoder):
            outputs = [encoder(torch.tensor([encoding.ids])) for encoding in encodings]
        context, *pooled = (torch.cat(values).numpy() for values in zip(*outputs, strict=True))
        self.text_outputs.append((context, pooled[0] if pooled else None))

    def rows(self, pipeline: Pipeline) -> Golden:
        """The transformer's inputs by name, each [1 + subjects, ...]."""
        if classes := pipeline.model.classes:
            return {"class_id": np.array([classes, *self.subjects], np.int64)}
        return dict(combine(self.text_outputs, pipeline.model))


@torch.no_grad()
def collect_activations(
    transformer: nn.Module,
    layers: Layers,
    records: Mapping[str, Recorder],
    pipeline: Pipeline,
    conditioning: Golden,
    depth: int,
) -> None:
    """Sample a trajectory for every row of `conditioning` (from `CalibrationInputs.rows`) but the unconditional one.

    The inputs of each of `layers` are added to the record of its name. Raises ValueError for inputs that are not finite.
    """
    model, defaults = pipeline.model, pipeline.defaults
    sampler = SAMPLERS_FOR[model.prediction][defaults.sampler]
    schedule = sampler.schedule(defaults.steps, pipeline.schedule_shift)
    row_count = len(next(iter(conditioning.values())))
    batch_size = images_per_batch(model)
    with in_float32(transformer), record_inputs(layers, records):
        for first in range(1, row_count, batch_size):
            rows = range(first, min(first + batch_size, row_count))
            noise_at = partial(batch_noise, [SEED + row for row in rows], model.latent_shape)
            predict = _guided(transformer, pipeline, conditioning, rows, depth)
            for _ in sampler.denoise(predict, noise_at(), schedule, noise_at):
                pass


@contextmanager
def record_inputs(layers: Layers, records: Mapping[str, Recorder]) -> Iterator[None]:
    """Add all inputs of each of `layers` to the record of its name."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: records[name].add(inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _guided(
    transformer: nn.Module, pipeline: Pipeline, conditioning: Golden, rows: range, depth: int
) -> Callable[[Array, float], Array]:
    """A guided prediction (latents, timestep) -> prediction for those rows of `conditioning`."""
    guidance, channels = pipeline.defaults.guidance, pipeline.model.guided_channels
    interval = pipeline.defaults.guidance_interval
    branches = [0] * len(rows) * (guidance != 1) + list(rows)
    conditioning_tensors = [torch.from_numpy(values[branches]) for values in conditioning.values()]

    def predict(x: Array, timestep: float) -> Array:
        latents = torch.from_numpy(np.concatenate([x] * (len(branches) // len(x))).astype(np.float32))
        times = torch.full((len(latents),), timestep, dtype=torch.float32)
        prediction: Array = transformer(latents, times, *conditioning_tensors, depth)[0].numpy()
        negative, positive = prediction[: len(x)], prediction[-len(x) :]
        if is_guided(timestep, guidance, interval):
            return apply_guidance(negative, positive, guidance, channels)
        return positive

    return predict
