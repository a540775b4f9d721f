"""A published model as a pipeline to export: Stable Diffusion 3 and 3.5, DiT.

    PATH a diffusers folder     transformer/, vae/, text_encoder{,_2,_3}/, tokenizer{,_2,_3}/, scheduler/
    PATH a single file          SD3's transformer, perhaps the VAE and the text encoders; or an original DiT checkpoint

What PATH lacks is taken from `components`, a diffusers folder.
"""

import shlex
from dataclasses import replace
from pathlib import Path

from tpx_export.adapters import attach, load_adapters
from tpx_export.base import dit_pipeline, sd3_pipeline
from tpx_export.base.sources import Sources
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.pipeline import Pipeline
from tpx_runtime.errors import BadInput


def open_base(
    path: Path,
    components: Path | None = None,
    image_size_px: int | None = None,
    adapters: Path | None = None,
    t5: bool = True,
) -> Pipeline:
    """The model at `path`, with the thinking adapters of a tpx.safetensors file, if any.

    Pictures are square, of `image_size_px` or the model's own size. Raises CheckpointInvalid for files that are missing or
    do not fit, BadInput for an image size that the model cannot draw.
    """
    for root in (path, components):
        if root is not None and not root.exists():
            raise CheckpointInvalid(f"{root}: expected a model, found nothing there; {_mend(root)}")
    if image_size_px is not None and image_size_px < 1:
        raise BadInput(f"expected an image size of some pixels, found {image_size_px}")
    sources = Sources(path, components)
    if dit_pipeline.recognises(path):
        pipeline = dit_pipeline.open_pipeline(sources, image_size_px)
    else:
        pipeline = sd3_pipeline.open_pipeline(sources, image_size_px, t5)
    return with_adapters(pipeline, adapters) if adapters else pipeline


def _mend(root: Path) -> str:
    """How to mend a missing path: OWNER/NAME may be a model on a hub, from which nothing is downloaded here."""
    if len(root.parts) == 2 and not root.is_absolute() and not root.parent.exists():
        name, folder = shlex.quote(root.as_posix()), shlex.quote(root.name)
        return f"download it with `hf download {name} --local-dir {folder}`, or check the path"
    return "check the path"


def with_adapters(pipeline: Pipeline, path: Path) -> Pipeline:
    """`pipeline` with the thinking adapters of a file attached to its transformer. Raises CheckpointInvalid."""
    thinking, state, facts = load_adapters(path)
    if facts.width != pipeline.width or thinking.blocks[-1] >= pipeline.blocks:
        raise CheckpointInvalid(
            f"{path}: expected thinking adapters for {pipeline.blocks} blocks of width {pipeline.width}, found some for "
            f"blocks {', '.join(map(str, thinking.blocks))} of width {facts.width}; take those that were trained on this "
            "base"
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
        transformer=lambda: attach(pipeline.transformer(), thinking, state).requires_grad_(False),
    )
