"""DiT as a pipeline: an original checkpoint, and its VAE from the components."""

from pathlib import Path

from tpx_export.base.dit import from_tensors, spec_of
from tpx_export.base.sources import Sources, name_of, precision_of
from tpx_export.base.tensors import open_tensors
from tpx_export.base.vae import load_vae
from tpx_export.pipeline import Pipeline, model_spec
from tpx_runtime.errors import BadInput
from tpx_runtime.manifest import Defaults, LatentSpec

_GUIDED = 3  # of the channels: what the original's sampling guides
_MARK = "y_embedder.embedding_table.weight"


def recognises(path: Path) -> bool:
    """Whether a file is an original DiT checkpoint."""
    return path.is_file() and _MARK in open_tensors(path)


def open_pipeline(sources: Sources, image_size_px: int | None = None) -> Pipeline:
    """The parts of a DiT. Raises CheckpointInvalid, BadInput for another image size than its own."""
    tensors = open_tensors(sources.path)
    spec = spec_of(tensors)
    folder = sources.components
    if folder is None or not (folder / "config.json").exists():
        folder = sources.folder("vae")
    factor = load_vae(folder, spec.latent_size * 64).spec.factor
    size = spec.latent_size * factor
    if image_size_px not in (None, size):
        raise BadInput(
            f"expected an image size of {size}, which this DiT was made for, found {image_size_px}; leave it out"
        )
    latent = load_vae(folder, size).spec
    return Pipeline(
        name=name_of(sources.path),
        license="the base model's own",
        model=model_spec(spec, size, guided_channels=min(_GUIDED, spec.latent_channels)),
        latent=LatentSpec(latent.scale, latent.shift),
        defaults=Defaults(sampler="ddpm", steps=250, guidance=4.0, depth=1),  # the original's sample.py
        shift=None,
        text=(),
        blocks=spec.blocks,
        width=spec.width,
        transformer=lambda: from_tensors(tensors),
        autoencoder=lambda: load_vae(folder, size),
        precision=precision_of(tensors.dtype),
    )
