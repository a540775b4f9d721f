"""DiT as a pipeline: an original checkpoint, with a VAE from the components folder."""

from pathlib import Path

from tpx_export.base.dit import spec_from_tensors, transformer_from_tensors
from tpx_export.base.model_files import ModelFiles, name_of, precision_of
from tpx_export.base.tensors import open_tensors
from tpx_export.base.vae import load_vae, new_vae, vae_spec
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.dit import DiT
from tpx_export.pipeline import Pipeline, count_parameters, model_spec
from tpx_runtime.errors import BadInput
from tpx_runtime.image_size import format_size
from tpx_runtime.manifest import Defaults, LatentSpec

_GUIDED_CHANNELS = 3  # as in the original's sampling
_DIT_TENSOR = "y_embedder.embedding_table.weight"  # only DiT has it


def is_dit_checkpoint(path: Path) -> bool:
    """Whether a file is an original DiT checkpoint."""
    return path.is_file() and _DIT_TENSOR in open_tensors(path)


def open_pipeline(files: ModelFiles, image_size_px: tuple[int, int] | None = None) -> Pipeline:
    """The parts of a DiT. Raises CheckpointInvalid, BadInput for an image size other than its own."""
    tensors = open_tensors(files.path)
    spec = spec_from_tensors(tensors)
    given = files.components
    itself = given if given and (given / "config.json").exists() else None
    folder = files.vae or itself or files.component_folder("vae")
    vae = vae_spec(folder)
    open_tensors(folder)  # a missing file is an error now, not after hours of other work
    if vae.latent_channels != spec.latent_channels:
        raise CheckpointInvalid(
            f"{folder}: expected a VAE of {spec.latent_channels} latent channels, as the DiT has, found one of "
            f"{vae.latent_channels}; use the parts of one model"
        )
    model = model_spec(spec, vae.factor, guided_channels=min(_GUIDED_CHANNELS, spec.latent_channels))
    if image_size_px not in (None, size := model.image_size_px):
        raise BadInput(
            f"expected an image size of {format_size(size)}, that of this DiT, found {format_size(image_size_px)}; "
            "leave it out"
        )
    return Pipeline(
        name=name_of(files.path),
        license="the base model's own",
        model=model,
        latent=LatentSpec(vae.scale, vae.shift),
        defaults=Defaults(sampler="ddpm", steps=250, guidance=4.0, depth=1),  # the original's sample.py
        shift=None,
        text=(),
        blocks=spec.blocks,
        width=spec.width,
        transformer=lambda: transformer_from_tensors(tensors),
        autoencoder=lambda: load_vae(folder),
        precision=precision_of(tensors.dtype),
        parameters=count_parameters(lambda: DiT(spec), lambda: new_vae(vae)),
    )
