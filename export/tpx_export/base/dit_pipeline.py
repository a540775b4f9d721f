"""DiT as a pipeline: an original checkpoint, with a VAE from the components folder."""

from pathlib import Path

from tpx_export.base.dit import spec_from_tensors, transformer_from_tensors
from tpx_export.base.model_files import ModelFiles, name_of, precision_of
from tpx_export.base.tensors import open_tensors
from tpx_export.base.vae import load_vae
from tpx_export.pipeline import Pipeline, model_spec
from tpx_runtime.errors import BadInput
from tpx_runtime.manifest import Defaults, LatentSpec

_GUIDED_CHANNELS = 3  # as in the original's sampling
_DIT_TENSOR = "y_embedder.embedding_table.weight"  # only DiT has it


def is_dit_checkpoint(path: Path) -> bool:
    """Whether a file is an original DiT checkpoint."""
    return path.is_file() and _DIT_TENSOR in open_tensors(path)


def open_pipeline(files: ModelFiles, image_size_px: int | None = None) -> Pipeline:
    """The parts of a DiT. Raises CheckpointInvalid, BadInput for an image size other than its own."""
    tensors = open_tensors(files.path)
    spec = spec_from_tensors(tensors)
    folder = files.components
    if folder is None or not (folder / "config.json").exists():
        folder = files.component_folder("vae")
    factor = load_vae(folder, spec.latent_size * 64).spec.factor
    size = spec.latent_size * factor
    if image_size_px not in (None, size):
        raise BadInput(
            f"expected an image size of {size}, that of this DiT, found {image_size_px}; leave it out"
        )
    latent = load_vae(folder, size).spec
    return Pipeline(
        name=name_of(files.path),
        license="the base model's own",
        model=model_spec(spec, size, guided_channels=min(_GUIDED_CHANNELS, spec.latent_channels)),
        latent=LatentSpec(latent.scale, latent.shift),
        defaults=Defaults(sampler="ddpm", steps=250, guidance=4.0, depth=1),  # the original's sample.py
        shift=None,
        text=(),
        blocks=spec.blocks,
        width=spec.width,
        transformer=lambda: transformer_from_tensors(tensors),
        autoencoder=lambda: load_vae(folder, size),
        precision=precision_of(tensors.dtype),
    )
