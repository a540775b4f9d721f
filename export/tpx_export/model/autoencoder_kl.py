"""The autoencoder of latent diffusion (Rombach et al., 2112.10752) in the sizes of SD1 and SD3.

Shapes: B batch, C channels, h x w latent size; with four widths images are 8h x 8w pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpx_export.model.autoencoder import LatentAutoencoder

_MAX_QUERIES = 2048  # per attention call: for all 16,384 of a 1,024-pixel image the scores take a gigabyte


@dataclass(frozen=True)
class AutoencoderKLSpec:
    """The defaults are SD3's. `widths` are the channels at 1, 1/2, 1/4 and 1/8 of the image's resolution.

    The transformer's latents are (z - shift) * scale. `quant` adds a 1x1 convolution on either side of the latents.
    """

    latent_channels: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2  # per width in the encoder; the decoder has one more
    groups: int = 32
    quant: bool = False
    scale: float = 1.5305
    shift: float = 0.0609

    def __post_init__(self) -> None:
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"expected widths divisible by {self.groups}, found {self.widths}")

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return int(2 ** (len(self.widths) - 1))


class GroupNorm(nn.GroupNorm):
    """Group norm of [B, C, H, W] in float32; means are computed within rows, then over rows.

    torch's exporter would write InstanceNormalization. ONNX Runtime sums its millions of pixels with an error of 8e-5 in an
    image of 1,024 pixels.
    """

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        rows = wide.reshape(x.shape[0], self.num_groups, -1, x.shape[3])  # [B, G, C/G H, W]
        mean = rows.mean(3, keepdim=True).mean(2, keepdim=True)
        centred = rows - mean
        variance = (centred * centred).mean(3, keepdim=True).mean(2, keepdim=True)
        scale = self.weight.float().view(self.num_groups, -1, 1) / (variance + self.eps).sqrt()
        shift = self.bias.float().view(self.num_groups, -1, 1) - mean * scale
        scale, shift = (part.reshape(x.shape[0], -1, 1, 1) for part in (scale, shift))
        return (wide * scale + shift).to(x.dtype)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), [B, C, H, W] -> [B, C', H, W]; x is projected if C' differs from C."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = GroupNorm(groups, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention of all pixels with one head, [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.q, self.k, self.v, self.proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, H W, C]
        q, k, v = self.q(pixels), self.k(pixels), self.v(pixels)
        count = -(-q.shape[2] // _MAX_QUERIES)
        chunks = q.split(-(-q.shape[2] // count), dim=2) if count > 1 else (q,)
        outputs = [F.scaled_dot_product_attention(chunk, k, v) for chunk in chunks]
        attended = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        return x + self.proj(attended).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """Residual blocks at one resolution, then downsampling ("down"), upsampling ("up") or neither ("")."""

    def __init__(self, channels: int, out: int, blocks: int, groups: int, direction: str = "") -> None:
        super().__init__()
        inputs = [channels, *[out] * (blocks - 1)]
        self.blocks = nn.Sequential(*(ResidualBlock(each, out, groups) for each in inputs))
        self.direction = direction
        if direction:
            down = direction == "down"
            self.resample = nn.Conv2d(out, out, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.direction == "down":
            return self.resample(F.pad(x, (0, 1, 0, 1)))
        if self.direction == "up":
            return self.resample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


def middle(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, groups),
        Attention(channels, groups),
        ResidualBlock(channels, channels, groups),
    )


class Encoder(nn.Module):
    """Images [B, 3, 8h, 8w] in -1..1 -> mean and log variance, each [B, latent_channels, h, w]."""

    def __init__(self, spec: AutoencoderKLSpec) -> None:
        super().__init__()
        widths, out = spec.widths, 2 * spec.latent_channels
        directions = ["down"] * (len(widths) - 1) + [""]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.Sequential(
            *(
                Stage(before, width, spec.blocks, spec.groups, direction)
                for before, width, direction in zip((widths[0], *widths), widths, directions, strict=False)
            )
        )
        self.middle = middle(widths[-1], spec.groups)
        self.norm_out = GroupNorm(spec.groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)
        self.quant = nn.Conv2d(out, out, 1) if spec.quant else nn.Identity()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.middle(self.stages(self.conv_in(image)))
        mean, log_variance = self.quant(self.conv_out(F.silu(self.norm_out(x)))).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)


class Decoder(nn.Module):
    """Latents z [B, latent_channels, h, w] -> images [B, 3, 8h, 8w], about -1..1."""

    def __init__(self, spec: AutoencoderKLSpec) -> None:
        super().__init__()
        widths = spec.widths[::-1]
        directions = ["up"] * (len(widths) - 1) + [""]
        self.quant = nn.Conv2d(spec.latent_channels, spec.latent_channels, 1) if spec.quant else nn.Identity()
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[0], 3, padding=1)
        self.middle = middle(widths[0], spec.groups)
        self.stages = nn.Sequential(
            *(
                Stage(before, width, spec.blocks + 1, spec.groups, direction)
                for before, width, direction in zip((widths[0], *widths), widths, directions, strict=False)
            )
        )
        self.norm_out = GroupNorm(spec.groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.stages(self.middle(self.conv_in(self.quant(latents))))
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(LatentAutoencoder):
    """The autoencoder of SD3 and SD1."""

    def __init__(self, spec: AutoencoderKLSpec) -> None:
        super().__init__(spec, Encoder(spec), Decoder(spec))
