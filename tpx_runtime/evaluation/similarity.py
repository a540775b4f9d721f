"""How alike two pictures are."""

import math

import numpy as np
from PIL import Image


def psnr_db(picture: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of RGB pictures of 8 bits, in dB; infinity where all is equal, 0 where sizes differ."""
    if picture.size != reference.size:
        return 0.0
    a, b = (np.asarray(image.convert("RGB"), np.float64) for image in (picture, reference))
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10.0 * math.log10(255.0**2 / error)
