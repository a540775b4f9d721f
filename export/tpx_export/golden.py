"""Golden tensors: the outputs of the PyTorch model in float32 for fixed inputs, which every engine is compared with.

Each function makes the arrays of one part, by the names of docs/bundle.md, while the exporter has that part in memory.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tpx_export.pipeline import TextPart
from tpx_export.precision import in_float32
from tpx_runtime.conditioning import combine
from tpx_runtime.manifest import LatentSpec, ModelSpec
from tpx_runtime.noise import batch_noise
from tpx_runtime.sampling import SAMPLERS_FOR, Array

Golden = dict[str, npt.NDArray[np.generic]]

SEED = 20260428
_STEPS, _STEPS_LARGE = 4, 2
_LARGE = 1024  # visual tokens: above, one row is used instead of two, to save time and memory


@torch.no_grad()
def text_golden(part: TextPart, module: nn.Module) -> Golden:
    """`FOLDER.ids`, `FOLDER.context` and, where the encoder pools, `FOLDER.pooled`."""
    with in_float32(module):
        said = module(torch.from_numpy(part.ids))
    names = ("context", "pooled") if part.spec.pooled_width else ("context",)
    values = said if isinstance(said, tuple) else (said,)
    made: Golden = {"ids": part.ids, **{n: v.numpy() for n, v in zip(names, values, strict=True)}}
    return {f"{part.spec.folder}.{name}": value for name, value in made.items()}


def told_of(parts: tuple[TextPart, ...], golden: Golden, model: ModelSpec) -> Golden:
    """The transformer's conditioning in both rows: `context` and `pooled` of two prompts, or `class_id`."""
    if model.classes:
        return {"class_id": np.array([model.classes // 2, 0], np.int64)}
    folders = [(part.spec.folder, part.spec.pooled_width) for part in parts]
    said = [
        (golden[f"{folder}.context"], golden[f"{folder}.pooled"] if pools else None)
        for folder, pools in folders
    ]
    return dict(combine(said, model))  # type: ignore[arg-type]


@torch.no_grad()
def transformer_golden(
    module: nn.Module, model: ModelSpec, inputs: Golden, shift: float | None, depths: tuple[int, ...]
) -> Golden:
    """`latents`, `timestep`, the conditioning, `conditions`, and for every depth the prediction and routes.

    The latents are taken from a short sampling trajectory of the model itself: row 0 from its noisy start, row 1 from
    half-way, because some experts are only told apart on latents with less noise. A large model has only row 1. `end` is
    the end of the trajectory.
    """
    large = model.visual_tokens > _LARGE
    rows, steps = slice(1 if large else 0, 2), _STEPS_LARGE if large else _STEPS
    told = {name: value[rows] for name, value in inputs.items()}
    given = [torch.from_numpy(value) for value in told.values()]

    def predict(x: Array, timestep: float, depth: int = depths[-1]) -> Array:
        times = torch.full((len(x),), timestep, dtype=torch.float32)
        prediction: Array = module(torch.from_numpy(x), times, *given, depth)[0].numpy()
        return prediction

    sampler = SAMPLERS_FOR[model.prediction]["euler" if model.prediction == "velocity" else "ddim"]
    schedule = sampler.schedule(steps, shift or 1.0)
    noise = batch_noise([SEED, SEED + 1][rows], model.latent_shape)
    with in_float32(module):
        path = [noise, *sampler.denoise(predict, noise, schedule, lambda step: noise)]
        half = steps // 2
        latents, times = path[half][-1:], schedule.timesteps[half : half + 1]
        if not large:
            latents, times = np.concatenate([noise[:1], latents]), [schedule.timesteps[0], *times]
        timestep = np.array(times, np.float32)
        made: Golden = {"latents": latents, "timestep": timestep, **told, "end": path[-1]}
        known = (torch.from_numpy(made[name]) for name in model.conditions_inputs)
        made["conditions"] = module.conditions(*known).numpy()  # type: ignore[operator]
        denoise = [torch.from_numpy(made[name]) for name in model.transformer_inputs]
        for depth in depths:
            values = module.denoise(*denoise, depth)  # type: ignore[operator]
            made[f"{model.prediction}_{depth}"] = values[0].numpy()
            if model.thinking_blocks:
                made[f"routes_{depth}"] = values[1].numpy()
    return made


@torch.no_grad()
def vae_golden(module: nn.Module, end: Array, latent: LatentSpec) -> Golden:
    """`decoder_latents` -> `image` -> `encoder_latents`, from the trajectory's `end`."""
    z = torch.from_numpy((end / latent.scale + latent.shift).astype(np.float32))
    with in_float32(module):
        image = module.decoder(z).clamp(-1, 1)  # type: ignore[operator]
        mean = module.encoder(image)[0]  # type: ignore[operator]
    return {"decoder_latents": z.numpy(), "image": image.numpy(), "encoder_latents": mean.numpy()}
