"""The eager PyTorch baseline: the checkpoint in the runtime's sampling loop. Needs torch."""

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

from .runner import Runner, Workload
from .sampling import BaselineGenerator, Network


class Denoiser(nn.Module):
    """The whole transformer at one depth: latents [B, C, H, W], timestep [B], conditioning -> prediction."""

    def __init__(self, transformer: nn.Module, depth: int) -> None:
        super().__init__()
        self.transformer, self.depth = transformer, depth

    def forward(self, latents: Tensor, timestep: Tensor, *conditioning: Tensor) -> Tensor:
        prediction: Tensor = self.transformer(latents, timestep, *conditioning, self.depth)[0]
        return prediction


class Decoder(nn.Module):
    """Latents (scaled and shifted) -> image in -1..1."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.decoder = cast(nn.Module, autoencoder.decoder)

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.decoder(latents).clamp(-1, 1)
        return image


def open_pipeline(ckpt: Path) -> Pipeline:
    """Load the model of a tpx checkpoint. Raises CheckpointInvalid."""
    return Pipeline.from_model(checkpoint.load(ckpt))


def require_fits(ckpt: Path, manifest: Manifest) -> None:
    """Check that the checkpoint's model has the manifest's name and sizes. Raises BadInput, CheckpointInvalid.

    Other weights of the same sizes only show in the images.
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
    # `tpx-export --depth` leaves out the largest depths.
    found["depths"] = found["depths"][: len(manifest.model.depths)]
    for name, value in wanted.items():
        if found[name] != value:
            raise BadInput(
                f"expected in --ckpt the checkpoint of bundle {manifest.name} ({name} {shorten(value)}), found {ckpt} with "
                f"{name} {shorten(found[name])}; pass the checkpoint that the bundle was exported from"
            )


def autocast(precision: str) -> AbstractContextManager[Any]:
    """PyTorch autocast for bf16, a null context for fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def network(module: Callable[..., Any], precision: str) -> Network:
    """A module, eager or compiled, as a function of arrays that returns float32."""

    def run(*arrays: npt.NDArray[Any]) -> Sequence[npt.NDArray[Any]]:
        with torch.no_grad(), autocast(precision):
            outputs = module(*map(torch.from_numpy, arrays))
        return [
            output.float().numpy() if output.is_floating_point() else output.numpy()
            for output in (outputs if isinstance(outputs, tuple) else (outputs,))
        ]

    return run


def text_encoders(pipeline: Pipeline, precision: str) -> dict[str, Network]:
    """The text encoders, by their folder in the bundle."""
    return {part.spec.folder: network(part.load().eval(), precision) for part in pipeline.text}


def eager_runner(workload: Workload, options: dict[str, Any]) -> Runner:
    """Eager PyTorch in options["precision"]."""
    assert workload.ckpt is not None
    precision, pipeline = options["precision"], open_pipeline(workload.ckpt)
    others = text_encoders(pipeline, precision)
    others["vae_decoder"] = network(Decoder(pipeline.autoencoder()).eval(), precision)
    denoiser = network(Denoiser(pipeline.transformer(), workload.depth).eval(), precision)
    return Runner(
        BaselineGenerator(Bundle.open(workload.bundle), options["name"], denoiser, others), workload, {}
    )
