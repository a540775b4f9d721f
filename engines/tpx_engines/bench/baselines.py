"""What a user without a bundle could run: the checkpoint in PyTorch, eager, in the runtime's sampling loop. Needs torch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt
import torch
from torch import Tensor, nn

from tpx_export import checkpoint
from tpx_export.pipeline import Pipeline
from tpx_runtime.bundle import Bundle
from tpx_runtime.errors import BadInput, shorten
from tpx_runtime.manifest import Manifest

from .sampling import BaselineGenerator, Network
from .subject import Subject, Work


class Denoiser(nn.Module):
    """The whole transformer at one depth: latents [B, C, H, W], timestep [B] and what it is told -> prediction."""

    def __init__(self, transformer: nn.Module, depth: int) -> None:
        super().__init__()
        self.transformer, self.depth = transformer, depth

    def forward(self, latents: Tensor, timestep: Tensor, *told: Tensor) -> Tensor:
        prediction: Tensor = self.transformer(latents, timestep, *told, self.depth)[0]
        return prediction


class Decoder(nn.Module):
    """Latents, scaled and shifted -> image in -1..1."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.decoder = cast(nn.Module, autoencoder.decoder)

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.decoder(latents).clamp(-1, 1)
        return image


def open_pipeline(ckpt: Path) -> Pipeline:
    """The model of a checkpoint of ours. Raises CheckpointInvalid."""
    return Pipeline.from_model(checkpoint.load(ckpt))


def require_fits(ckpt: Path, manifest: Manifest) -> None:
    """The checkpoint makes a model of the manifest's name and sizes; whether of its weights too, only pictures tell.

    Raises BadInput, CheckpointInvalid.
    """
    pipeline = open_pipeline(ckpt)
    parts = tuple(part.spec for part in pipeline.text)
    found = {
        "name": pipeline.name,
        **asdict(pipeline.model),
        "text_encoders": parts,
        "latent": pipeline.latent,
    }
    wanted = {
        "name": manifest.name,
        **asdict(manifest.model),
        "text_encoders": manifest.text_encoders,
        "latent": manifest.latent,
    }
    # `tpx-export --depth` leaves out the last.
    found["depths"] = found["depths"][: len(manifest.model.depths)]
    for fact, value in wanted.items():
        if found[fact] != value:
            raise BadInput(
                f"expected in --ckpt the checkpoint of bundle {manifest.name} ({fact} {shorten(value)}), found {ckpt} with "
                f"{fact} {shorten(found[fact])}; name the one that it was exported from"
            )


def autocast(precision: str) -> AbstractContextManager[Any]:
    """PyTorch's own mixed precision in bf16; nothing in fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def network(module: Callable[..., Any], precision: str) -> Network:
    """A module, or what it was compiled to, as a function of arrays; it answers in float32."""

    def run(*arrays: npt.NDArray[Any]) -> Sequence[npt.NDArray[Any]]:
        with torch.no_grad(), autocast(precision):
            said = module(*map(torch.from_numpy, arrays))
        return [
            part.float().numpy() if part.is_floating_point() else part.numpy()
            for part in (said if isinstance(said, tuple) else (said,))
        ]

    return run


def text_encoders(pipeline: Pipeline, precision: str) -> dict[str, Network]:
    """Of each folder its encoder."""
    return {part.spec.folder: network(part.load().eval(), precision) for part in pipeline.text}


def of_eager(work: Work, options: dict[str, Any]) -> Subject:
    """PyTorch as it is, in options["precision"]."""
    assert work.ckpt is not None
    precision, pipeline = options["precision"], open_pipeline(work.ckpt)
    others = text_encoders(pipeline, precision)
    others["vae_decoder"] = network(Decoder(pipeline.autoencoder()).eval(), precision)
    denoiser = network(Denoiser(pipeline.transformer(), work.depth).eval(), precision)
    return Subject(BaselineGenerator(Bundle.open(work.bundle), options["name"], denoiser, others), work, {})
