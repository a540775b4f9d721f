"""Golden tensors: the float32 outputs of the PyTorch model for fixed inputs, against which every engine is verified.

Each function computes the arrays of one part, named as in docs/bundle.md, while the exporter has that part in memory.
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
_LARGE = 1024  # visual tokens: above, one row is used instead of two to save time and memory


@torch.no_grad()
def text_golden(part: TextPart, module: nn.Module) -> Golden:
    """`FOLDER.ids`, `FOLDER.context` and, if the encoder has a pooled output, `FOLDER.pooled`."""
    with in_float32(module):
        values = module(torch.from_numpy(part.ids))
    arrays: Golden = {"ids": part.ids}
    arrays |= {name: value.numpy() for name, value in zip(part.spec.outputs, values, strict=True)}
    return {f"{part.spec.folder}.{name}": value for name, value in arrays.items()}


def conditioning_inputs(parts: tuple[TextPart, ...], golden: Golden, model: ModelSpec) -> Golden:
    """The transformer's conditioning of both rows: `context` and `pooled` of two prompts, or `class_id`."""
    if model.classes:
        return {"class_id": np.array([model.classes // 2, 0], np.int64)}
    specs = [part.spec for part in parts]
    outputs = [
        (golden[f"{spec.folder}.context"], golden[f"{spec.folder}.pooled"] if spec.pooled_width else None)
        for spec in specs
    ]
    return dict(combine(outputs, model))  # type: ignore[arg-type]


@torch.no_grad()
def transformer_golden(
    module: nn.Module, model: ModelSpec, inputs: Golden, shift: float, depths: tuple[int, ...]
) -> Golden:
    """`latents`, `timestep`, the conditioning, `conditions`, and the prediction and routes of every depth.

    The latents come from a short sampling trajectory of the model itself: row 0 from its noisy start, row 1 from half-way,
    because some experts are chosen only for latents with less noise. A large model has only row 1. `end` is the end of the
    trajectory.
    """
    large = model.visual_tokens > _LARGE
    rows, steps = slice(1 if large else 0, 2), _STEPS_LARGE if large else _STEPS
    conditioning = {name: value[rows] for name, value in inputs.items()}
    conditioning_tensors = [torch.from_numpy(value) for value in conditioning.values()]

    def predict(x: Array, timestep: float, depth: int = depths[-1]) -> Array:
        times = torch.full((len(x),), timestep, dtype=torch.float32)
        prediction: Array = module(torch.from_numpy(x), times, *conditioning_tensors, depth)[0].numpy()
        return prediction

    sampler = SAMPLERS_FOR[model.prediction]["euler" if model.prediction == "velocity" else "ddim"]
    schedule = sampler.schedule(steps, shift)
    noise = batch_noise([SEED, SEED + 1][rows], model.latent_shape)
    with in_float32(module):
        trajectory = [noise, *sampler.denoise(predict, noise, schedule, lambda step: noise)]
        half = steps // 2
        latents, times = trajectory[half][-1:], schedule.timesteps[half : half + 1]
        if not large:
            latents, times = np.concatenate([noise[:1], latents]), [schedule.timesteps[0], *times]
        timestep = np.array(times, np.float32)
        golden: Golden = {"latents": latents, "timestep": timestep, **conditioning, "end": trajectory[-1]}
        conditions_inputs = (torch.from_numpy(golden[name]) for name in model.conditions_inputs)
        golden["conditions"] = module.conditions(*conditions_inputs).numpy()  # type: ignore[operator]
        denoise_inputs = [torch.from_numpy(golden[name]) for name in model.transformer_inputs]
        for depth in depths:
            prediction, routes = module.denoise(*denoise_inputs, depth)  # type: ignore[operator]
            golden[f"{model.prediction}_{depth}"] = prediction.numpy()
            if model.thinking_blocks:
                golden[f"routes_{depth}"] = routes.numpy()
    return golden


@torch.no_grad()
def vae_golden(module: nn.Module, end: Array, latent: LatentSpec) -> Golden:
    """`decoder_latents` -> `image` -> `encoder_latents`, from the trajectory's `end`."""
    z = torch.from_numpy((end / latent.scale + latent.shift).astype(np.float32))
    with in_float32(module):
        image = module.decoder(z).clamp(-1, 1)  # type: ignore[operator]
        mean = module.encoder(image)[0]  # type: ignore[operator]
    return {"decoder_latents": z.numpy(), "image": image.numpy(), "encoder_latents": mean.numpy()}
