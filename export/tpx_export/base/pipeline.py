"""Opens a published model as a pipeline to export: Stable Diffusion 3, 3.5 or DiT.

    PATH a diffusers folder     transformer/, vae/, text_encoder{,_2,_3}/, tokenizer{,_2,_3}/, scheduler/
    PATH a single file          SD3's transformer, optionally its VAE and text encoders; or an original DiT checkpoint

Missing parts are taken from `components`, a diffusers folder.
"""

import shlex
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tpx_export.adapters import FILE, Adapters, attach, load_adapters, state_path
from tpx_export.base import dit_pipeline, sd3_pipeline
from tpx_export.base.foreign_json import read_object
from tpx_export.base.lora import Lora
from tpx_export.base.model_files import INDEX, ModelFiles
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.fingerprint import base_fingerprint
from tpx_export.pipeline import Pipeline
from tpx_runtime.bundle import MANIFEST
from tpx_runtime.errors import BadInput
from tpx_runtime.image_size import format_size


def open_base(
    path: Path,
    components: Path | None = None,
    image_size_px: tuple[int, int] | None = None,
    adapters: Path | None = None,
    t5: bool = True,
    loras: Sequence[Lora] = (),
    vae: Path | None = None,
) -> Pipeline:
    """Open the model at `path`, with the thinking adapters of a tpx.safetensors file, if any.

    `image_size_px` is (height, width), or None for the model's own size. T5 is left out unless `t5`, or if the pipeline was
    saved without it; `loras` (opened with `open_lora`) are merged into its weights. `vae`, a folder of diffusers'
    AutoencoderKL or AutoencoderTiny, replaces the model's own. Raises CheckpointInvalid for files that
    are missing or invalid, BadInput for an image size that the model does not support and for a DiT without `t5` or with
    `loras`. Issues a DifferentBaseWarning for adapters that were trained on another base or with other settings, and an
    UnusedLoraWarning for a part that only a LoRA has.
    """
    for root in (path, components, vae):
        if root is not None and not root.exists():
            raise CheckpointInvalid(
                f"{root}: expected a model, found nothing there; {_missing_path_hint(root)}"
            )
    _check_kind(path)
    files = ModelFiles(path, components, vae)
    if dit_pipeline.is_dit_checkpoint(path):
        if not t5:
            raise BadInput("expected --no-t5 only with Stable Diffusion 3, found it with a DiT; leave it out")
        if loras:
            raise BadInput("expected --lora only with Stable Diffusion 3, found it with a DiT; leave it out")
        pipeline = dit_pipeline.open_pipeline(files, image_size_px)
    else:
        pipeline = sd3_pipeline.open_pipeline(files, image_size_px, t5, loras)
    if adapters is None:
        return pipeline
    loaded = load_adapters(adapters)
    if "base_sha256" in loaded.info.training:
        file = adapters / FILE if adapters.is_dir() else adapters
        # tpx-train may have written these into the base's folder.
        outputs = (file, state_path(file))
        base = base_fingerprint(path, components, outputs)
        _warn_if_different(loaded.info.training, base, pipeline)
    return with_adapters(pipeline, loaded, adapters)


class DifferentBaseWarning(UserWarning):
    """Adapters were trained on another base. This is no error: it may be the same model in another precision."""


def _warn_if_different(training: dict[str, Any], base: str, pipeline: Pipeline) -> None:
    """Issue a DifferentBaseWarning if the adapters' training used another base, image size or text encoders."""
    current: dict[str, Any] = {"base_sha256": base, "image_size": format_size(pipeline.model.image_size_px)}
    if pipeline.text:
        current["t5"] = pipeline.t5
    descriptions = {
        "base_sha256": "on other base files than these",
        "image_size": f"at {training.get('image_size')} pixels, not {current['image_size']}",
        "t5": "without T5" if pipeline.t5 else "with T5",
    }
    different = [descriptions[name] for name, value in current.items() if training.get(name, value) != value]
    if different:
        warnings.warn(f"the adapters were trained {', '.join(different)}", DifferentBaseWarning, stacklevel=3)


def _check_kind(path: Path) -> None:
    """Check that a folder is not of another kind of model, if it says so. Raises CheckpointInvalid."""
    if (path / MANIFEST).is_file():
        raise CheckpointInvalid(
            f"{path}: expected a model to export, found a bundle of TPX; run it with tpx-run --bundle"
        )
    if (path / INDEX).is_file():
        kind = read_object(path / INDEX).get("_class_name")
        if isinstance(kind, str) and not kind.startswith("StableDiffusion3"):
            raise CheckpointInvalid(
                f"{path}: expected Stable Diffusion 3 or 3.5, or an original DiT file, found a {kind}; it is not supported"
            )


def _missing_path_hint(root: Path) -> str:
    """What to do about a missing path. OWNER/NAME may be a model on Hugging Face's hub, which is not downloaded here."""
    if len(root.parts) == 2 and not root.is_absolute() and not root.parent.exists():
        name, folder = shlex.quote(root.as_posix()), shlex.quote(root.name)
        return f"download it with `hf download {name} --local-dir {folder}`, or check the path"
    return "check the path"


def with_adapters(pipeline: Pipeline, adapters: Adapters, path: Path) -> Pipeline:
    """`pipeline` with the thinking adapters of the file at `path` attached to its transformer. Raises CheckpointInvalid."""
    thinking, state, info = adapters
    if info.width != pipeline.width or thinking.blocks[-1] >= pipeline.blocks:
        raise CheckpointInvalid(
            f"{path}: expected thinking adapters for {pipeline.blocks} blocks of width {pipeline.width}, found some for "
            f"blocks {', '.join(map(str, thinking.blocks))} of width {info.width}; use adapters trained on this base"
        )
    model = replace(
        pipeline.model,
        conditions_width=pipeline.model.conditions_width + thinking.conditions_width,
        depths=tuple(range(1, thinking.max_depth + 1)),
        experts=thinking.experts,
        thinking_blocks=thinking.blocks,
    )
    return replace(
        pipeline,
        name=f"{pipeline.name}-thinking",
        model=model,
        defaults=replace(pipeline.defaults, depth=thinking.max_depth),
        # In float32 whatever the base's precision: the exporter converts them to the bundle's precision.
        transformer=lambda: attach(pipeline.transformer(), thinking, state, torch.float32).requires_grad_(
            False
        ),
    )
