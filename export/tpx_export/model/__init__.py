"""The reference models: autoencoders, text encoders, and diffusion transformers with thinking blocks."""

from tpx_export.model.autoencoder import Autoencoder, AutoencoderSpec
from tpx_export.model.class_to_image import ClassToImage, ClassToImageSpec
from tpx_export.model.dit import DiT, DiTSpec
from tpx_export.model.mmdit import MMDiT, MMDiTSpec
from tpx_export.model.text_encoder import TextEncoder, TextEncoderSpec
from tpx_export.model.text_to_image import TextToImage, TextToImageSpec
from tpx_export.model.thinking import ThinkingSpec

__all__ = [
    "Autoencoder",
    "AutoencoderSpec",
    "ClassToImage",
    "ClassToImageSpec",
    "DiT",
    "DiTSpec",
    "MMDiT",
    "MMDiTSpec",
    "TextEncoder",
    "TextEncoderSpec",
    "TextToImage",
    "TextToImageSpec",
    "ThinkingSpec",
]
