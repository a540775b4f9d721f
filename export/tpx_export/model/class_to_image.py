"""The two networks of a class-to-image model in one module, with everything that describes them."""

from dataclasses import dataclass

from torch import nn

from tpx_export.model.autoencoder import Autoencoder, AutoencoderSpec
from tpx_export.model.dit import DiT, DiTSpec
from tpx_export.model.text_to_image import check_name, check_same
from tpx_runtime.manifest import Defaults


@dataclass(frozen=True)
class ClassToImageSpec:
    """`defaults` are used where a call names no value; the transformer must allow their `depth`."""

    name: str
    license: str
    autoencoder: AutoencoderSpec
    transformer: DiTSpec
    defaults: Defaults

    def __post_init__(self) -> None:
        check_name(self.name)
        seen = self.transformer
        check_same("latent_channels", seen.latent_channels, self.autoencoder.latent_channels)
        check_same("latent_size", seen.latent_size, self.autoencoder.latent_size)


class ClassToImage(nn.Module):
    """Class -> epsilon of latents -> picture; the loop between them is the runtime's."""

    def __init__(self, spec: ClassToImageSpec) -> None:
        super().__init__()
        self.spec = spec
        self.autoencoder = Autoencoder(spec.autoencoder)
        self.transformer = DiT(spec.transformer)
