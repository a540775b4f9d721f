"""A small convolutional autoencoder (Rombach et al., 2112.10752).

Shapes: B batch, C channels, h x w latent size; images are 8h x 8w pixels.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpx_export.model.checks import check_positive

_GROUPS = 8  # of the group norms


@dataclass(frozen=True)
class AutoencoderSpec:
    """`widths` are the channels at 1/8, 1/4 and 1/2 of the image's resolution."""

    latent_channels: int = 4
    widths: tuple[int, int, int] = (96, 64, 32)
    scale: float = 1.0  # latents seen by the transformer are (z - shift) * scale, as in SD3
    shift: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "latent_channels")
        if any(width < _GROUPS or width % _GROUPS for width in self.widths):
            raise ValueError(f"expected widths that are multiples of {_GROUPS}, got {self.widths}")
        if self.scale == 0:
            raise ValueError("expected a scale other than 0, got 0")

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 8


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Encoder(nn.Module):
    """Images [B, 3, 8h, 8w] in -1..1 -> mean and log variance, each [B, latent_channels, h, w]."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        deep, middle, _ = spec.widths
        self.net = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, middle, 3, padding=1),
            ResidualBlock(middle),
            nn.Conv2d(middle, deep, 3, stride=2, padding=1),
            ResidualBlock(deep),
            ResidualBlock(deep),
            nn.SiLU(),
            nn.Conv2d(deep, 2 * spec.latent_channels, 3, padding=1),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.net(image).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 4)


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w] -> images [B, 3, 8h, 8w], about -1..1."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        deep, middle, fine = spec.widths
        self.net = nn.Sequential(
            nn.Conv2d(spec.latent_channels, deep, 3, padding=1),
            ResidualBlock(deep),
            ResidualBlock(deep),
            nn.Conv2d(deep, 4 * middle, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(middle),
            ResidualBlock(middle),
            nn.Conv2d(middle, 4 * fine, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(fine),
            nn.SiLU(),
            nn.Conv2d(fine, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.net(latents)


class LatentAutoencoder(nn.Module):
    """An encoder, a decoder, and the affine map between their latents and those of the transformer."""

    def __init__(self, spec: Any, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.spec = spec  # AutoencoderSpec, AutoencoderKLSpec or AutoencoderTinySpec: each has factor, scale and shift
        self.encoder, self.decoder = encoder, decoder

    def encode(self, image: Tensor) -> Tensor:
        """Images [B, 3, H, W] in -1..1 -> transformer latents [B, C, H/8, W/8], the posterior's mean."""
        return (self.encoder(image)[0] - self.spec.shift) * self.spec.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Transformer latents -> images in -1..1."""
        return self.decoder(latents / self.spec.scale + self.spec.shift).clamp(-1, 1)


class Autoencoder(LatentAutoencoder):
    """The sample model's autoencoder."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__(spec, Encoder(spec), Decoder(spec))

    def reconstruct(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct from a sample of the posterior. Returns images and the mean KL divergence to N(0, 1) per latent."""
        mean, log_variance = self.encoder(image)
        z = mean + noise * torch.exp(0.5 * log_variance)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return self.decoder(z), kl
