"""The eager PyTorch baseline: the checkpoint in the runtime's sampling loop. Needs torch."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt
import torch
from torch import Tensor, nn

from tpx_export import checkpoint
from tpx_export.pipeline import Pipeline
from tpx_export.precision import cast_weights
from tpx_runtime.bundle import Bundle
from tpx_runtime.errors import BadInput, shorten
from tpx_runtime.manifest import Manifest

from .runner import Runner, Workload
from .sampling import BaselineGenerator, Network

BASELINE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TORCH_DEVICES = {"cpu": "cpu", "gpu": "cuda"}


def use_kernel(device: str) -> None:
    """Route tokens on a GPU with TPX's Triton kernel: the plain operator waits for the host once per expert."""
    if device == "gpu":
        with suppress(ImportError):  # Triton is not available for every system
            importlib.import_module("tpx_engines.routed_lora_triton")


class Denoiser(nn.Module):
    """The whole transformer at one depth: latents [B, C, H, W], timestep [B], conditioning -> prediction.

    In bf16 and fp16 the weights are stored in that type, as with `torch_dtype` in other libraries; gates, embedders and the
    timestep stay float32.
    """

    def __init__(self, pipeline: Pipeline, depth: int, precision: str = "fp32") -> None:
        super().__init__()
        self.transformer, self.depth, self.dtype = pipeline.transformer(), depth, BASELINE_DTYPES[precision]
        cast_weights(self.transformer, self.dtype)

    def forward(self, latents: Tensor, timestep: Tensor, *conditioning: Tensor) -> Tensor:
        conditioning = tuple(c.to(self.dtype) if c.is_floating_point() else c for c in conditioning)
        prediction: Tensor = self.transformer(latents.to(self.dtype), timestep, *conditioning, self.depth)[0]
        return prediction


class Decoder(nn.Module):
    """Latents (scaled and shifted) -> image in -1..1."""

    def __init__(self, pipeline: Pipeline, precision: str = "fp32") -> None:
        super().__init__()
        self.decoder = cast(nn.Module, pipeline.autoencoder().decoder)
        self.dtype = BASELINE_DTYPES[precision]
        cast_weights(self.decoder, self.dtype)

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.decoder(latents.to(self.dtype)).clamp(-1, 1)
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


def network(module: Callable[..., Any], device: str) -> Network:
    """A module on `device`, eager or compiled, as a function of arrays that returns float32.

    An array that was already an input of the last call, such as the text of a prompt, is not uploaded again.
    """
    uploaded: dict[int, tuple[npt.NDArray[Any], Tensor]] = {}  # by position

    def upload(position: int, array: npt.NDArray[Any]) -> Tensor:
        if position not in uploaded or uploaded[position][0] is not array:
            uploaded[position] = array, torch.from_numpy(array).to(TORCH_DEVICES[device])
        return uploaded[position][1]

    def run(*arrays: npt.NDArray[Any]) -> Sequence[npt.NDArray[Any]]:
        with torch.no_grad():
            outputs = module(*(upload(position, array) for position, array in enumerate(arrays)))
        return [
            (output.float() if output.is_floating_point() else output).cpu().numpy()
            for output in (outputs if isinstance(outputs, tuple) else (outputs,))
        ]

    return run


def text_encoders(pipeline: Pipeline, precision: str, device: str) -> dict[str, Network]:
    """The text encoders, by their folder in the bundle."""
    encoders = {part.spec.folder: part.load().eval() for part in pipeline.text}
    for encoder in encoders.values():
        cast_weights(encoder, BASELINE_DTYPES[precision])
    return {
        folder: network(encoder.to(TORCH_DEVICES[device]), device) for folder, encoder in encoders.items()
    }


def eager_runner(workload: Workload, options: dict[str, Any]) -> Runner:
    """Eager PyTorch in options["precision"] on options["device"]."""
    assert workload.ckpt is not None
    precision, device, pipeline = options["precision"], options["device"], open_pipeline(workload.ckpt)
    use_kernel(device)
    where = TORCH_DEVICES[device]
    others = text_encoders(pipeline, precision, device)
    others["vae_decoder"] = network(Decoder(pipeline, precision).eval().to(where), device)
    denoiser = network(Denoiser(pipeline, workload.depth, precision).eval().to(where), device)
    return Runner(
        BaselineGenerator(Bundle.open(workload.bundle), options["name"], denoiser, others), workload, {}
    )
