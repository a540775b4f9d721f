"""A class-to-image model: autoencoder and transformer in one module, with their specification."""

from dataclasses import dataclass

from torch import nn

from tpx_export.model.autoencoder import Autoencoder, AutoencoderSpec
from tpx_export.model.checks import check_depth, check_license, check_name, check_same
from tpx_export.model.dit import DiT, DiTSpec
from tpx_runtime.manifest import Defaults


@dataclass(frozen=True)
class ClassToImageSpec:
    """`defaults` are the settings of a call that names none; the transformer must allow their `depth`."""

    name: str
    license: str
    autoencoder: AutoencoderSpec
    transformer: DiTSpec
    defaults: Defaults

    def __post_init__(self) -> None:
        check_name(self.name)
        check_license(self.license)
        check_same("latent_channels", self.transformer.latent_channels, self.autoencoder.latent_channels)
        check_depth(self.defaults, self.transformer.max_depth)


class ClassToImage(nn.Module):
    """Class -> epsilon of latents -> image. The runtime has the sampling loop."""

    def __init__(self, spec: ClassToImageSpec) -> None:
        super().__init__()
        self.spec = spec
        self.autoencoder = Autoencoder(spec.autoencoder)
        self.transformer = DiT(spec.transformer)
