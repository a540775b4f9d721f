"""Image-to-image and inpainting: where the loop starts, and what it may change.

The start is that of SDEdit (Meng et al., 2108.01073): the picture's latents with the noise of a later step. What a mask
keeps follows its exact path back to the picture, in every sampler: there the velocity is not the model's but the path's.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import BadInput
from .sampling import Array, Prediction, Schedule

Mask = npt.NDArray[np.bool_]

DEFAULT_STRENGTH = 0.6  # diffusers' for Stable Diffusion 3


@dataclass(frozen=True)
class Edit:
    """A picture to start from: itself at the model's size, its latents [1, C, H, W], and where to paint anew.

    `mask` is a black and white picture of the same size, white where to paint, and `repaint` [1, 1, H, W] the same for
    latents. `sources` is what pictures say of what they came from.
    """

    picture: Image.Image
    latents: Array
    mask: Image.Image | None = None
    repaint: Mask | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def paste(self, image: Image.Image) -> Image.Image:
        """`image`, with what the mask keeps taken from the picture itself."""
        return Image.composite(image, self.picture, self.mask) if self.mask else image


def starting_strength(image: object, mask: object, strength: float | None) -> float | None:
    """The strength to plan with: the default where there is an image and none is named, None without an image.

    Raises BadInput for a mask or a strength without an image.
    """
    if image is not None:
        return DEFAULT_STRENGTH if strength is None else strength
    if mask is None and strength is None:
        return None
    odd = "strength" if mask is None else "mask"
    raise BadInput(f"expected an image with a {odd}, found none; give the image to start from")


def sources_of(picture: Image.Image, mask: Image.Image | None) -> dict[str, str]:
    """SHA-256 of the RGB bytes of a picture, upright and as large as it came, and of a mask's."""
    given = {"image_sha256": picture} | ({"mask_sha256": mask} if mask else {})
    return {name: hashlib.sha256(one.tobytes()).hexdigest() for name, one in given.items()}


def to_pixels(picture: Image.Image) -> Array:
    """RGB to [1, 3, height, width] in -1..1."""
    values = np.asarray(picture, np.float32).transpose(2, 0, 1)[None]
    return values / np.float32(127.5) - np.float32(1)


def to_repaint(mask: Image.Image, latent_size: tuple[int, int]) -> Mask:
    """[1, 1, H, W]: true for each latent that stands for a white pixel, so no painted pixel depends on a kept latent."""
    height, width = latent_size
    white = np.asarray(mask) > 0
    painted: Mask = np.any(white.reshape(height, white.shape[0] // height, width, -1), axis=(1, 3))
    return painted[None, None]


def last_steps(schedule: Schedule, strength: float) -> Schedule:
    """The last `strength` (0..1) of a schedule's steps: what diffusers takes, which rounds up, and at least one."""
    steps = len(schedule.timesteps)
    first = min(int(steps - steps * strength), steps - 1)
    return Schedule(schedule.sigmas[first:], schedule.timesteps[first:])


def add_noise(latents: Array, noise: Array, sigma: float) -> Array:
    """(1 - sigma) x0 + sigma noise."""
    return np.float32(1 - sigma) * latents + np.float32(sigma) * noise


class InpaintingPrediction:
    """A velocity that is the model's where `repaint` is true, and elsewhere leads straight from the noise to the picture.

    `latents` [B, C, H, W] are the picture's and `noise` is what the loop starts with: the way back is (1 - sigma) latents +
    sigma noise, whose derivative is the same at every sigma, so that any sampler stays on it.
    """

    def __init__(self, velocity: Prediction, latents: Array, noise: Array, repaint: Mask) -> None:
        self._velocity, self._back, self._repaint = velocity, noise - latents, repaint

    def __call__(self, latents: Array, timestep: float) -> Array:
        return np.where(self._repaint, self._velocity(latents, timestep), self._back)
