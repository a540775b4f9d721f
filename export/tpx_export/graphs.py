"""The graphs of a bundle as PyTorch modules, whose floating-point inputs and outputs are float32.

Inside they compute in the precision of the module that they wrap.
"""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn


@dataclass(frozen=True)
class Graph:
    """A graph to export: a module, its inputs by name (example values with batch size 2), and the names of its outputs."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


class TextEncoderGraph(nn.Module):
    """ids -> context, and pooled if the encoder has a pooled output."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.float() for value in self.encoder(ids))


class ConditionsGraph(nn.Module):
    """timestep and pooled, or timestep and class_id -> conditions: the transformer's part that needs no latents."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, timestep: Tensor, condition: Tensor) -> Tensor:
        conditions: Tensor = self.transformer.conditions(timestep, condition)  # type: ignore[operator]
        return conditions


class TransformerGraph(nn.Module):
    """latents, conditions, and context if any -> the prediction, and the routes of a thinking model."""

    def __init__(self, transformer: nn.Module, depth: int, routed: bool) -> None:
        super().__init__()
        self.transformer, self.depth, self.routed = transformer, depth, routed

    def forward(self, latents: Tensor, conditions: Tensor, *context: Tensor) -> tuple[Tensor, ...]:
        dtype = cast(nn.Linear, self.transformer.patch_in).weight.dtype
        context = tuple(value.to(dtype) for value in context)
        prediction, routes = self.transformer.denoise(latents.to(dtype), conditions, *context, self.depth)  # type: ignore[operator]
        return (prediction.float(), routes) if self.routed else (prediction.float(),)


class DecoderGraph(nn.Module):
    """latents, already unscaled and unshifted -> image in -1..1."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.decoder = cast(nn.Module, autoencoder.decoder)

    def forward(self, latents: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        image: Tensor = self.decoder(latents.to(dtype)).clamp(-1, 1)
        return image.float()


class EncoderGraph(nn.Module):
    """image in -1..1 -> latents, the posterior's mean, not yet shifted and scaled."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.encoder = cast(nn.Module, autoencoder.encoder)

    def forward(self, image: Tensor) -> Tensor:
        dtype = next(self.encoder.parameters()).dtype
        mean: Tensor = self.encoder(image.to(dtype))[0]
        return mean.float()
