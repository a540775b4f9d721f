"""The tiny autoencoder TAESD (https://github.com/madebyollin/taesd), distilled from a latent diffusion's own.

Shapes: B batch, C channels, h x w latent size; with four stages images are 8h x 8w pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpx_export.model.autoencoder import LatentAutoencoder

_LIMIT = 3.0  # of the decoder's latents


@dataclass(frozen=True)
class AutoencoderTinySpec:
    """The defaults are TAESD3's. `encoder_blocks` and `decoder_blocks` are the residual blocks of each stage, in order.

    Between two stages the encoder halves the resolution and the decoder doubles it. The latents are the transformer's own.
    """

    latent_channels: int = 16
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ValueError(
                f"expected as many stages in both halves, got {self.encoder_blocks} and {self.decoder_blocks}"
            )

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return int(2 ** (len(self.encoder_blocks) - 1))


class Block(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x)))))), [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


class Encoder(nn.Module):
    """Images [B, 3, 8h, 8w] in -1..1 -> (latents [B, latent_channels, h, w],), which have no variance."""

    def __init__(self, spec: AutoencoderTinySpec) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, blocks in enumerate(spec.encoder_blocks):
            first = nn.Conv2d(3, spec.width, 3, padding=1)
            down = nn.Conv2d(spec.width, spec.width, 3, stride=2, padding=1, bias=False)
            layers += [down if stage else first, *(Block(spec.width) for _ in range(blocks))]
        self.layers = nn.Sequential(*layers, nn.Conv2d(spec.width, spec.latent_channels, 3, padding=1))

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.layers((image + 1) / 2),)


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w] -> images [B, 3, 8h, 8w], about -1..1."""

    def __init__(self, spec: AutoencoderTinySpec) -> None:
        super().__init__()
        width = spec.width
        layers: list[nn.Module] = [nn.Conv2d(spec.latent_channels, width, 3, padding=1), nn.ReLU()]
        for stage, blocks in enumerate(spec.decoder_blocks):
            if stage:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
            layers += (Block(width) for _ in range(blocks))
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(torch.tanh(latents / _LIMIT) * _LIMIT) * 2 - 1


class AutoencoderTiny(LatentAutoencoder):
    """TAESD, with diffusers' names of tensors."""

    def __init__(self, spec: AutoencoderTinySpec) -> None:
        super().__init__(spec, Encoder(spec), Decoder(spec))
