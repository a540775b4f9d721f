"""What a bundle says about its model: the manifest, the vocabulary, the schedule (docs/bundle.md)."""

from dataclasses import replace
from pathlib import Path

from tpx_export.model import MMDiT
from tpx_export.model.text_to_image import TextToImage
from tpx_export.precision import TOLERANCES
from tpx_runtime import __version__
from tpx_runtime.bundle import LatentSpec, Manifest, ModelSpec, describe_files


def manifest(model: TextToImage, depths: tuple[int, ...], precision: str, folder: Path) -> Manifest:
    spec, transformer = model.spec, model.transformer.spec
    picture, latent = spec.autoencoder.image_size_px, spec.autoencoder.latent_size
    return Manifest(
        name=spec.name,
        license=spec.license,
        producer=f"tpx {__version__}",
        precision=precision,
        model=ModelSpec(
            latent_channels=transformer.latent_channels,
            latent_size=(latent, latent),
            image_size_px=(picture, picture),
            text_tokens=spec.text_encoder.tokens,
            context_width=transformer.context_width,
            pooled_width=transformer.pooled_width,
            visual_tokens=transformer.visual_tokens,
            depths=depths,
            experts=experts(model.transformer),
            thinking_blocks=transformer.thinking.blocks if transformer.thinking else (),
        ),
        latent=LatentSpec(spec.autoencoder.scale, spec.autoencoder.shift),
        defaults=replace(spec.defaults, depth=min(spec.defaults.depth, depths[-1])),
        tolerance=TOLERANCES[precision],
        files=describe_files(folder),
    )


def vocabulary(model: TextToImage) -> dict[str, object]:
    spec = model.spec.text_encoder
    return {"kind": "word", "tokens": list(spec.vocabulary), "text_tokens": spec.tokens}


def scheduler(model: TextToImage) -> dict[str, object]:
    """diffusers' configuration of the schedule that the model was trained for."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": model.spec.shift,
        "use_dynamic_shifting": False,
    }


def experts(transformer: MMDiT) -> int:
    return transformer.spec.thinking.experts if transformer.spec.thinking else 0
