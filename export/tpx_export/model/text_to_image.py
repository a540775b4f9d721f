"""The three networks of a text-to-image model in one module, with everything that describes them."""

import re
from dataclasses import dataclass

from torch import nn

from tpx_export.model.autoencoder import Autoencoder, AutoencoderSpec
from tpx_export.model.mmdit import MMDiT, MMDiTSpec
from tpx_export.model.text_encoder import TextEncoder, TextEncoderSpec
from tpx_runtime.manifest import Defaults


def check_name(name: str) -> None:
    """Check that a model's name can be a folder's. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"expected a name of letters, digits, dots and dashes, got {name!r}")


def check_same(name: str, expected: int, found: int) -> None:
    """Check a size that a part must share with the transformer. Raises ValueError."""
    if expected != found:
        raise ValueError(f"expected {name} {expected} as in the transformer, got {found}")


@dataclass(frozen=True)
class TextToImageSpec:
    """`shift` is the time shift of the flow-matching schedule; `defaults` are used where a call names no value."""

    name: str
    license: str
    autoencoder: AutoencoderSpec
    text_encoder: TextEncoderSpec
    transformer: MMDiTSpec
    shift: float
    defaults: Defaults

    def __post_init__(self) -> None:
        check_name(self.name)
        seen, given = self.transformer, self.text_encoder
        check_same("latent_channels", seen.latent_channels, self.autoencoder.latent_channels)
        check_same("latent_size", seen.latent_size, self.autoencoder.latent_size)
        check_same("context_tokens", seen.context_tokens, given.tokens)
        check_same("context_width", seen.context_width, given.width)
        check_same("pooled_width", seen.pooled_width, given.width)


class TextToImage(nn.Module):
    """Prompt ids -> context -> velocity of latents -> picture; the loop between them is the runtime's."""

    def __init__(self, spec: TextToImageSpec) -> None:
        super().__init__()
        self.spec = spec
        self.autoencoder = Autoencoder(spec.autoencoder)
        self.text_encoder = TextEncoder(spec.text_encoder)
        self.transformer = MMDiT(spec.transformer)
