"""Stable Diffusion 3 and 3.5 as a pipeline: a diffusers folder, or an original single file and its components."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from tpx_export.base.config import Config, read_config
from tpx_export.base.foreign_json import read_object
from tpx_export.base.lora import Lora, merged_into, warn_of_unused
from tpx_export.base.model_files import ModelFiles, name_of, precision_of
from tpx_export.base.sd3 import PREFIX, latent_sides, load_transformer
from tpx_export.base.sd3_names import from_diffusers, from_original
from tpx_export.base.sd3_spec import CLIP_TOKENS, T5_TOKENS, spec_from_config, spec_from_shapes
from tpx_export.base.tensors import Tensors, open_tensors
from tpx_export.base.text_encoders import (
    CLIP_G,
    CLIP_L,
    T5,
    clip_conversions,
    clip_from_tensors,
    clip_spec,
    clip_spec_from_shapes,
    load_clip,
    load_t5,
    t5_conversions,
    t5_from_tensors,
    t5_spec,
    t5_spec_from_shapes,
)
from tpx_export.base.tokenizers import clip_tokenizer, t5_tokenizer
from tpx_export.base.vae import (
    VAE,
    VaeSpec,
    load_vae,
    new_vae,
    vae_from_tensors,
    vae_spec,
    vae_spec_from_shapes,
)
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.autoencoder import LatentAutoencoder
from tpx_export.model.clip import CLIPText
from tpx_export.model.mmdit import MMDiT, MMDiTSpec
from tpx_export.model.t5 import T5Encoder
from tpx_export.pipeline import Pipeline, TextPart, count_parameters, example_ids, model_spec
from tpx_runtime.bundle import SHIFT_RANGE
from tpx_runtime.errors import BadInput, first_few
from tpx_runtime.image_size import format_size
from tpx_runtime.manifest import Defaults, EncoderSpec, LatentSpec

_SHIFT = 3.0
_SAMPLE_SIZE = 128  # the default latent size; single files do not store it
_EULER = "FlowMatchEulerDiscreteScheduler"
# The sampler for each of diffusers' schedulers; Heun's schedule is Euler's.
_SAMPLERS = {_EULER: "euler", "FlowMatchHeunDiscreteScheduler": "heun"}
# Settings of diffusers' schedulers that would change the schedule or add noise.
_UNSUPPORTED = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


def open_pipeline(
    files: ModelFiles, image_size_px: tuple[int, int] | None, t5: bool, loras: Sequence[Lora] = ()
) -> Pipeline:
    """The parts of an SD3 model, with `loras` merged; T5 is left out unless `t5`, or if there is none.

    Raises CheckpointInvalid, BadInput.
    """
    single = files.path.is_file()
    tensors = open_tensors(files.path) if single else None
    if tensors is not None:
        _check_names(tensors)
    path = files.path if single else files.component_folder("transformer")
    spec, stored = _transformer(path)
    vae, load_autoencoder = _vae(files, tensors)
    side = _sample_size(path) * vae.factor
    height, width = image_size_px or (side, side)
    _check_size((height, width), vae.factor, latent_sides(spec, stored), stored.path)
    latent_size = (height // vae.factor, width // vae.factor)
    text = (
        _clip(files, tensors, "", CLIP_L, loras),
        _clip(files, tensors, "_2", CLIP_G, loras),
        *([_t5(files, tensors, loras)] if t5 and _has_t5(files, tensors) else []),
    )
    _check_parts(spec, vae.latent_channels, text, path)
    warn_of_unused(loras, ("transformer", *(part.spec.folder for part in text)))
    transformer = merged_into(
        "transformer",
        lambda: load_transformer(path, latent_size),
        loras,
        lambda: MMDiT(spec),
        (from_diffusers(spec), from_original(spec)),
    )
    sampler, shift = _schedule(files)
    return Pipeline(
        name="-".join([name_of(files.path), *(name_of(lora.path) for lora in loras)]),
        license="the base model's own",
        model=model_spec(replace(spec, latent_size=latent_size), vae.factor),
        latent=LatentSpec(vae.scale, vae.shift),
        defaults=Defaults(sampler=sampler, steps=28, guidance=7.0, depth=1),  # as in diffusers
        shift=shift,
        text=text,
        blocks=spec.blocks,
        width=spec.width,
        transformer=transformer,
        autoencoder=load_autoencoder,
        precision=precision_of(stored.dtype),
        parameters=count_parameters(
            lambda: MMDiT(replace(spec, latent_size=latent_size)), lambda: new_vae(vae)
        ),
    )


def _transformer(path: Path) -> tuple[MMDiTSpec, Tensors]:
    tensors = open_tensors(path)
    if path.is_dir():
        return spec_from_config(path, tensors), tensors
    tensors = tensors.with_prefix(PREFIX) or tensors
    return spec_from_shapes(tensors), tensors


def _check_names(tensors: Tensors) -> None:
    """Check that a single file of several parts has no unknown tensors. Raises CheckpointInvalid."""
    known = (PREFIX, VAE, CLIP_L, CLIP_G, T5)
    if not any(name.startswith(PREFIX) for name in tensors):
        return  # only the transformer, without prefix: loading it reports unknown tensors
    scales = {f"{prefix.removesuffix('transformer.')}logit_scale" for prefix in (CLIP_L, CLIP_G, T5)}
    if unknown := sorted(name for name in tensors if not name.startswith(known) and name not in scales):
        raise CheckpointInvalid(
            f"{tensors.path}: expected only tensors under {', '.join(known)}, found {len(unknown)} others: "
            f"{first_few(unknown)}"
        )


def _vae(files: ModelFiles, single: Tensors | None) -> tuple[VaeSpec, Callable[[], LatentAutoencoder]]:
    if files.vae is None and single is not None and (part := single.with_prefix(VAE)):
        return vae_spec_from_shapes(part), lambda: vae_from_tensors(part)
    folder = files.vae or files.component_folder("vae")
    open_tensors(folder)  # a missing file is an error now, not after hours of other work
    return vae_spec(folder), lambda: load_vae(folder)


def _clip(
    files: ModelFiles, single: Tensors | None, number: str, prefix: str, loras: Sequence[Lora]
) -> TextPart:
    name = f"text_encoder{number}"
    load: Callable[[], CLIPText]
    if single is not None and (part := single.with_prefix(prefix)):
        activation = "quick_gelu" if prefix == CLIP_L else "gelu"
        spec, load = clip_spec_from_shapes(part, activation), lambda: clip_from_tensors(part, activation)
    else:
        folder = files.component_folder(name)
        spec, load = clip_spec(folder), lambda: load_clip(folder)
        open_tensors(folder)  # as for the VAE
    new = partial(CLIPText, spec)
    load = merged_into(name, load, loras, new, [clip_conversions(spec)])
    vocabulary = clip_tokenizer(files.any_folder(f"tokenizer{number}"), CLIP_TOKENS)
    entry = EncoderSpec(name, f"tokenizer{number}", CLIP_TOKENS, spec.width, spec.projection)
    return _text_part(entry, vocabulary, load, new)


def _has_t5(files: ModelFiles, single: Tensors | None) -> bool:
    """Whether the model should have T5: unless its pipeline was saved without it."""
    return bool(single and single.with_prefix(T5)) or not files.saved_without("text_encoder_3")


def _t5(files: ModelFiles, single: Tensors | None, loras: Sequence[Lora]) -> TextPart:
    load: Callable[[], T5Encoder]
    if single is not None and (part := single.with_prefix(T5)):
        spec, load = t5_spec_from_shapes(part), lambda: t5_from_tensors(part)
    else:
        folder = files.component_folder("text_encoder_3", hint="or leave out T5 with --no-t5")
        spec, load = t5_spec(folder), lambda: load_t5(folder)
        open_tensors(folder)
    new = partial(T5Encoder, spec)
    load = merged_into("text_encoder_3", load, loras, new, [t5_conversions(spec)])
    vocabulary = t5_tokenizer(files.any_folder("tokenizer_3"), T5_TOKENS)
    entry = EncoderSpec("text_encoder_3", "tokenizer_3", T5_TOKENS, spec.width, 0)
    return _text_part(entry, vocabulary, load, new)


def _text_part(
    entry: EncoderSpec,
    vocabulary: dict[str, object],
    load: Callable[[], nn.Module],
    new: Callable[[], nn.Module],
) -> TextPart:
    return TextPart(entry, vocabulary, example_ids(vocabulary), load, count_parameters(new))


def _check_parts(spec: MMDiTSpec, channels: int, text: tuple[TextPart, ...], path: Path) -> None:
    """Check that the parts belong to one model. Raises CheckpointInvalid."""
    pooled = sum(part.spec.pooled_width for part in text)
    clip = sum(part.spec.context_width for part in text if part.spec.pooled_width)
    t5 = {part.spec.context_width for part in text if not part.spec.pooled_width}
    for what, expected, fits in (
        ("latent channels", f"{spec.latent_channels}, found a VAE of {channels}", channels == spec.latent_channels),
        ("pooled text", f"{spec.pooled_width} wide, found CLIPs of {pooled} together", pooled == spec.pooled_width),
        ("text", f"{spec.context_width} wide, found CLIPs of {clip} together", clip <= spec.context_width),
        ("text", f"{spec.context_width} wide, found T5 of {t5}", t5 <= {spec.context_width}),
    ):  # fmt: skip
        if not fits:
            raise CheckpointInvalid(f"{path}: expected {what} {expected}; use the parts of one model")


def _check_size(size_px: tuple[int, int], factor: int, sides: range, path: Path) -> None:
    """Check, before anything large is read, that the position table covers the image size. Raises BadInput."""
    sides_px = range(factor * sides.start, factor * sides[-1] + 1, factor * sides.step)
    if not all(side in sides_px for side in size_px):
        raise BadInput(
            f"expected an image of {sides_px[0]}..{sides_px[-1]} pixels a side in steps of {sides_px.step}, as the position "
            f"table of {path} allows, found {format_size(size_px)}; choose another --image-size"
        )


def _sample_size(path: Path) -> int:
    if path.is_file():
        return _SAMPLE_SIZE
    return read_config(path).count("sample_size", _SAMPLE_SIZE)


def _schedule(files: ModelFiles) -> tuple[str, float]:
    """The sampler and the time shift of its schedule. Raises CheckpointInvalid for a schedule with other settings."""
    name = "scheduler_config.json"
    folder = files.find("scheduler", name)
    if folder is None:
        return _SAMPLERS[_EULER], _SHIFT
    config = Config(folder / name, read_object(folder / name))
    kind = config.one_of("_class_name", tuple(_SAMPLERS), _EULER)
    for field in _UNSUPPORTED:
        config.one_of(field, (False, None))
    config.one_of("shift_terminal", (None,))
    shift = config.real("shift", _SHIFT)
    if not SHIFT_RANGE[0] <= shift <= SHIFT_RANGE[1]:
        raise config.invalid(f"a shift in {SHIFT_RANGE[0]:g}..{SHIFT_RANGE[1]:g}", shift)
    return _SAMPLERS[kind], shift
