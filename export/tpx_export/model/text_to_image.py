"""A text-to-image model: autoencoder, text encoder and transformer in one module, with their specification."""

from dataclasses import dataclass

from torch import nn

from tpx_export.model.autoencoder import Autoencoder, AutoencoderSpec
from tpx_export.model.checks import check_depth, check_license, check_name, check_same
from tpx_export.model.mmdit import MMDiT, MMDiTSpec
from tpx_export.model.text_encoder import TextEncoder, TextEncoderSpec
from tpx_runtime.manifest import Defaults


@dataclass(frozen=True)
class TextToImageSpec:
    """`shift` is the flow-matching schedule's time shift; `defaults` are the settings of a call that names none."""

    name: str
    license: str
    autoencoder: AutoencoderSpec
    text_encoder: TextEncoderSpec
    transformer: MMDiTSpec
    shift: float
    defaults: Defaults

    def __post_init__(self) -> None:
        check_name(self.name)
        check_license(self.license)
        transformer, text_encoder = self.transformer, self.text_encoder
        check_same("latent_channels", transformer.latent_channels, self.autoencoder.latent_channels)
        check_same("context_tokens", transformer.context_tokens, text_encoder.tokens)
        check_same("context_width", transformer.context_width, text_encoder.width)
        check_same("pooled_width", transformer.pooled_width, text_encoder.width)
        check_depth(self.defaults, transformer.max_depth)


class TextToImage(nn.Module):
    """Prompt ids -> context -> velocity of latents -> image. The runtime has the sampling loop."""

    def __init__(self, spec: TextToImageSpec) -> None:
        super().__init__()
        self.spec = spec
        self.autoencoder = Autoencoder(spec.autoencoder)
        self.text_encoder = TextEncoder(spec.text_encoder)
        self.transformer = MMDiT(spec.transformer)
