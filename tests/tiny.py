"""Small random models in which every weight affects the output."""

import torch

from tpx_export.model import (
    AutoencoderSpec,
    ClassToImage,
    ClassToImageSpec,
    DiTSpec,
    MMDiTSpec,
    TextEncoderSpec,
    TextToImageSpec,
    ThinkingSpec,
)
from tpx_export.model.text_to_image import TextToImage
from tpx_runtime.manifest import Defaults

WORDS = ("a", "an", "and", "blue", "cube", "green", "on", "red", "sphere", "two", ",", ".")


def make_tiny(thinking: ThinkingSpec | None, seed: int = 0) -> TextToImage:
    """A random text-to-image model of 64x64 pixels and 16 visual tokens, in which every weight affects the output."""
    torch.manual_seed(seed)
    spec = TextToImageSpec(
        name="tiny",
        license="Apache-2.0",
        autoencoder=AutoencoderSpec(widths=(16, 16, 8), scale=1.3, shift=0.1),
        text_encoder=TextEncoderSpec(
            ("<pad>", "<bos>", "<eos>", "<unk>", *WORDS), tokens=12, width=32, heads=2, layers=1
        ),
        transformer=MMDiTSpec(
            latent_size=(8, 8),
            width=64,
            heads=2,
            blocks=3,
            context_tokens=12,
            context_width=32,
            pooled_width=32,
            thinking=thinking,
        ),
        shift=1.0,
        defaults=Defaults(
            sampler="euler", steps=4, guidance=2.0, depth=thinking.max_depth if thinking else 1
        ),
    )
    model = TextToImage(spec)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            # Zero-initialised output layers would hide every error in the layers before them.
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def make_tiny_classes(classes: int) -> ClassToImage:
    """A random class-to-image model of 64x64 pixels and 16 visual tokens, in which every weight affects the output."""
    torch.manual_seed(0)
    spec = ClassToImageSpec(
        name="tiny-classes",
        license="Apache-2.0",
        autoencoder=AutoencoderSpec(widths=(16, 16, 8)),
        transformer=DiTSpec(
            latent_size=(8, 8),
            width=64,
            heads=2,
            blocks=3,
            classes=classes,
            learned_sigma=False,
            qk_norm=True,
            thinking=ThinkingSpec(blocks=(0, 2), experts=3, rank=4, max_depth=2),
        ),
        defaults=Defaults(sampler="ddim", steps=3, guidance=2.0, depth=2),
    )
    model = ClassToImage(spec)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval().requires_grad_(False)
