"""Similarity of two images."""

import math

import numpy as np
from PIL import Image


def psnr_db(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of 8-bit RGB images in dB; infinity if they are equal, 0 if their sizes differ."""
    if image.size != reference.size:
        return 0.0
    a, b = (np.asarray(one.convert("RGB"), np.float64) for one in (image, reference))
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10.0 * math.log10(255.0**2 / error)
