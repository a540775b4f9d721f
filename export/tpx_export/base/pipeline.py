"""A published model as a pipeline to export: Stable Diffusion 3 and 3.5, DiT.

    PATH a diffusers folder     transformer/, vae/, text_encoder{,_2,_3}/, tokenizer{,_2,_3}/, scheduler/
    PATH a single file          SD3's transformer, perhaps the VAE and the text encoders; or an original DiT checkpoint

What PATH lacks is taken from `components`, a diffusers folder.
"""

import shlex
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tpx_export.adapters import FILE, Adapters, attach, load_adapters
from tpx_export.base import dit_pipeline, sd3_pipeline
from tpx_export.base.sources import Sources
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.pipeline import Pipeline
from tpx_export.training import fingerprint
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
    do not fit, BadInput for an image size that the model cannot draw; warns, with AnotherBase, of adapters that were trained
    on something else.
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
    if adapters is None:
        return pipeline
    thinking, state, facts = load_adapters(adapters)
    if "base_sha256" in facts.training:
        file = adapters / FILE if adapters.is_dir() else adapters
        ours = (file, file.with_name(f"{file.name}.state.pt"))  # which tpx-train may have left with the base
        base = fingerprint.of_base(path, components, ours)
        _notice_another(facts.training, base, pipeline, t5)
    return with_adapters(pipeline, Adapters(thinking, state, facts), adapters)


class AnotherBase(UserWarning):
    """Adapters are put on another base than they were trained on: no error, for it may be the same in other precision."""


def _notice_another(training: dict[str, Any], base: str, pipeline: Pipeline, t5: bool) -> None:
    """Warn, with AnotherBase, where adapters were trained on something else, as far as their file says on what."""
    found: dict[str, Any] = {"base_sha256": base, "image_size_px": pipeline.model.image_size_px[0]}
    if pipeline.text:
        found["t5"] = t5
    said = {
        "base_sha256": "on other files of a base than these",
        "image_size_px": f"at {training.get('image_size_px')} pixels and not {found['image_size_px']}",
        "t5": "without T5" if t5 else "with T5",
    }
    differing = [said[name] for name, value in found.items() if training.get(name, value) != value]
    if differing:
        warnings.warn(f"the adapters were trained {', '.join(differing)}", AnotherBase, stacklevel=3)


def _mend(root: Path) -> str:
    """How to mend a missing path: OWNER/NAME may be a model on a hub, from which nothing is downloaded here."""
    if len(root.parts) == 2 and not root.is_absolute() and not root.parent.exists():
        name, folder = shlex.quote(root.as_posix()), shlex.quote(root.name)
        return f"download it with `hf download {name} --local-dir {folder}`, or check the path"
    return "check the path"


def with_adapters(pipeline: Pipeline, adapters: Adapters, path: Path) -> Pipeline:
    """`pipeline` with the thinking adapters of the file at `path` attached to its transformer. Raises CheckpointInvalid."""
    thinking, state, facts = adapters
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
        # In float32 whatever the base is stored in: the exporter makes them what the bundle's precision is.
        transformer=lambda: attach(pipeline.transformer(), thinking, state, torch.float32).requires_grad_(
            False
        ),
    )
