"""Image-to-image and inpainting: the initial latents, and which latents may change.

The loop starts as in SDEdit (Meng et al., 2108.01073): from the image's latents with the noise of a later step. Latents
outside the mask use the velocity of the straight path back to the image instead of the model's, so they return to it exactly
with every sampler.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import BadInput
from .sampling import Array, Prediction, Schedule

LatentMask = npt.NDArray[np.bool_]

DEFAULT_STRENGTH = 0.6  # diffusers' for Stable Diffusion 3


@dataclass(frozen=True)
class Edit:
    """An input image at the model's size, its latents [1, C, H, W], and optionally the area to repaint.

    `mask` is a black and white image of the same size, white where to repaint; `latent_mask` [1, 1, H, W] is the same for
    latents. `sources` holds the hashes of the inputs for the metadata of generated images.
    """

    image: Image.Image
    latents: Array
    mask: Image.Image | None = None
    latent_mask: LatentMask | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def paste(self, image: Image.Image) -> Image.Image:
        """`image` inside the mask, the input image outside of it."""
        return Image.composite(image, self.image, self.mask) if self.mask else image


def resolve_strength(image: object, mask: object, strength: float | None) -> float | None:
    """The strength to use: DEFAULT_STRENGTH if an image is given without one, None without an image.

    Raises BadInput for a mask or a strength without an image.
    """
    if image is not None:
        return DEFAULT_STRENGTH if strength is None else strength
    if mask is None and strength is None:
        return None
    given = "strength" if mask is None else "mask"
    raise BadInput(
        f"expected an image with a {given}, found none; give the image to start from as image (--image)"
    )


def source_hashes(image: Image.Image, mask: Image.Image | None) -> dict[str, str]:
    """SHA-256 of the RGB bytes of the upright image and mask, before they are resized."""
    sources = {"image_sha256": image} | ({"mask_sha256": mask} if mask else {})
    return {name: hashlib.sha256(source.tobytes()).hexdigest() for name, source in sources.items()}


def to_pixels(image: Image.Image) -> Array:
    """An RGB image as [1, 3, height, width] in -1..1."""
    values = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    return values / np.float32(127.5) - np.float32(1)


def to_latent_mask(mask: Image.Image, latent_size: tuple[int, int]) -> LatentMask:
    """[1, 1, H, W]: true for every latent that covers at least one white pixel of the mask."""
    height, width = latent_size
    white = np.asarray(mask) > 0
    repainted: LatentMask = np.any(white.reshape(height, white.shape[0] // height, width, -1), axis=(1, 3))
    return repainted[None, None]


def last_steps(schedule: Schedule, strength: float) -> Schedule:
    """The last `strength` (0..1) of a schedule's steps, rounded up as in diffusers; at least one."""
    steps = len(schedule.timesteps)
    first = min(int(steps - steps * strength), steps - 1)
    return Schedule(schedule.sigmas[first:], schedule.timesteps[first:])


def add_noise(latents: Array, noise: Array, sigma: float) -> Array:
    """(1 - sigma) x0 + sigma noise."""
    return np.float32(1 - sigma) * latents + np.float32(sigma) * noise


class InpaintingPrediction:
    """The model's velocity where `latent_mask` is true; elsewhere that of the straight path from noise to image.

    `latents` are those of the image, `noise` is the initial noise. The path is (1 - sigma) latents + sigma noise; its
    derivative is the same at every sigma, so that any sampler stays on it.
    """

    def __init__(self, velocity: Prediction, latents: Array, noise: Array, latent_mask: LatentMask) -> None:
        self._velocity, self._path_velocity, self._mask = velocity, noise - latents, latent_mask

    def __call__(self, latents: Array, timestep: float) -> Array:
        return np.where(self._mask, self._velocity(latents, timestep), self._path_velocity)
