"""Stable Diffusion 3 and 3.5 as a pipeline: a diffusers folder, or an original single file with its components."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from tpx_export.base.facts import Config, read_config
from tpx_export.base.foreign_json import read_object
from tpx_export.base.sd3 import PREFIX, latent_sizes, load_transformer
from tpx_export.base.sd3_spec import CLIP_TOKENS, T5_TOKENS, spec_of_config, spec_of_shapes
from tpx_export.base.sources import Sources, name_of, precision_of
from tpx_export.base.tensors import Tensors, open_tensors
from tpx_export.base.text_encoders import CLIP_G, CLIP_L, T5, clip_of, load_clip, load_t5, t5_of
from tpx_export.base.tokenizers import clip_tokenizer, t5_tokenizer
from tpx_export.base.vae import VAE, load_vae, vae_of
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.autoencoder_kl import AutoencoderKL
from tpx_export.model.clip import CLIPText
from tpx_export.model.mmdit import MMDiTSpec
from tpx_export.model.t5 import T5Encoder
from tpx_export.pipeline import Pipeline, TextPart, example_ids, model_spec
from tpx_runtime.errors import BadInput
from tpx_runtime.manifest import Defaults, EncoderSpec, LatentSpec

_SHIFT = 3.0
_SAMPLE_SIZE = 128  # latents a side that a single file, which does not say it, was trained for
_SCRATCH_PX = 1024
_UNUSED = (  # settings of diffusers' schedulers that would make another schedule
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
)


def open_pipeline(sources: Sources, image_size_px: int | None, t5: bool) -> Pipeline:
    """The parts of an SD3 model; T5 is left out unless `t5`. Raises CheckpointInvalid, BadInput."""
    single = sources.path.is_file()
    tensors = open_tensors(sources.path) if single else None
    if tensors is not None:
        _check_names(tensors)
    path = sources.path if single else sources.folder("transformer")
    spec, stored = _transformer(path)
    vae = _vae(sources, tensors)
    size = image_size_px or _sample_size(path) * vae(_SCRATCH_PX).spec.factor
    picture = vae(size).spec
    _check_size(size, picture.factor, latent_sizes(spec, stored), stored.where)
    text = (
        _clip(sources, tensors, "", CLIP_L),
        _clip(sources, tensors, "_2", CLIP_G),
        *([_t5(sources, tensors)] if t5 else []),
    )
    _check(spec, picture.latent_channels, text, path)
    latent = picture.latent_size
    return Pipeline(
        name=name_of(sources.path),
        license="the base model's own",
        model=model_spec(replace(spec, latent_size=latent), size),
        latent=LatentSpec(picture.scale, picture.shift),
        defaults=Defaults(sampler="euler", steps=28, guidance=7.0, depth=1),  # diffusers'
        shift=_schedule_shift(sources),
        text=text,
        blocks=spec.blocks,
        width=spec.width,
        transformer=lambda: load_transformer(path, latent),
        autoencoder=lambda: vae(size),
        precision=precision_of(stored.dtype),
    )


def _transformer(path: Path) -> tuple[MMDiTSpec, Tensors]:
    tensors = open_tensors(path)
    if path.is_dir():
        return spec_of_config(path, tensors), tensors
    tensors = tensors.under(PREFIX) or tensors
    return spec_of_shapes(tensors), tensors


def _check_names(tensors: Tensors) -> None:
    """Check that a file of several parts has no tensors that nothing reads. Raises CheckpointInvalid."""
    known = (PREFIX, VAE, CLIP_L, CLIP_G, T5)
    if not any(name.startswith(PREFIX) for name in tensors):
        return  # the transformer alone, under bare names: its import lists what it does not know
    scales = {f"{prefix.removesuffix('transformer.')}logit_scale" for prefix in (CLIP_L, CLIP_G, T5)}
    if unknown := sorted(name for name in tensors if not name.startswith(known) and name not in scales):
        raise CheckpointInvalid(
            f"{tensors.where}: expected tensors under {', '.join(known)} alone, found {len(unknown)} others: "
            f"{'; '.join(unknown)}"
        )


def _vae(sources: Sources, single: Tensors | None) -> Callable[[int], AutoencoderKL]:
    if single is not None and (own := single.under(VAE)):
        return lambda size: vae_of(own, size)
    folder = sources.folder("vae")
    return lambda size: load_vae(folder, size)


def _clip(sources: Sources, single: Tensors | None, number: str, prefix: str) -> TextPart:
    load: Callable[[], CLIPText]
    if single is not None and (own := single.under(prefix)):
        load = lambda: clip_of(own, "quick_gelu" if prefix == CLIP_L else "gelu")  # noqa: E731
    else:
        folder = sources.folder(f"text_encoder{number}")
        load = lambda: load_clip(folder)  # noqa: E731
    spec = load().spec
    vocabulary = clip_tokenizer(sources.any_folder(f"tokenizer{number}"), CLIP_TOKENS)
    entry = EncoderSpec(
        f"text_encoder{number}", f"tokenizer{number}", CLIP_TOKENS, spec.width, spec.projection
    )
    return _part(entry, vocabulary, load)


def _t5(sources: Sources, single: Tensors | None) -> TextPart:
    load: Callable[[], T5Encoder]
    if single is not None and (own := single.under(T5)):
        load = lambda: t5_of(own)  # noqa: E731
    else:
        folder = sources.folder("text_encoder_3", hint="or leave T5 out with --no-t5")
        load = lambda: load_t5(folder)  # noqa: E731
    vocabulary = t5_tokenizer(sources.any_folder("tokenizer_3"), T5_TOKENS)
    entry = EncoderSpec("text_encoder_3", "tokenizer_3", T5_TOKENS, load().spec.width, 0)
    return _part(entry, vocabulary, load)


def _part(entry: EncoderSpec, vocabulary: dict[str, object], load: Callable[[], nn.Module]) -> TextPart:
    return TextPart(entry, vocabulary, example_ids(vocabulary), load)


def _check(spec: MMDiTSpec, channels: int, text: tuple[TextPart, ...], path: Path) -> None:
    """Check that the parts belong to one model. Raises CheckpointInvalid."""
    pooled = sum(part.spec.pooled_width for part in text)
    clip = sum(part.spec.context_width for part in text if part.spec.pooled_width)
    others = {part.spec.context_width for part in text if not part.spec.pooled_width}
    for what, expected, fits in (
        ("latent channels", f"{spec.latent_channels}, found a VAE of {channels}", channels == spec.latent_channels),
        ("pooled text", f"{spec.pooled_width} wide, found CLIPs of {pooled} together", pooled == spec.pooled_width),
        ("text", f"{spec.context_width} wide, found CLIPs of {clip} together", clip <= spec.context_width),
        ("text", f"{spec.context_width} wide, found T5 of {others}", others <= {spec.context_width}),
    ):  # fmt: skip
        if not fits:
            raise CheckpointInvalid(f"{path}: expected {what} {expected}; take all parts from one model")


def _check_size(size_px: int, factor: int, latents: range, where: Path) -> None:
    """Check, before anything large is read, that there are positions for `size_px` / `factor` latents. Raises BadInput."""
    if size_px // factor not in latents:
        least, most, step = (factor * one for one in (latents[0], latents[-1], latents.step))
        raise BadInput(
            f"expected an image size of {least}..{most} pixels in steps of {step}, as the table of positions of {where} "
            f"allows, found {size_px}; name one of these with --image-size"
        )


def _sample_size(path: Path) -> int:
    if path.is_file():
        return _SAMPLE_SIZE
    return read_config(path).count("sample_size", _SAMPLE_SIZE)


def _schedule_shift(sources: Sources) -> float:
    """The shift of a flow's schedule that has no other settings. Raises CheckpointInvalid."""
    name = "scheduler_config.json"
    folder = sources.find("scheduler", name)
    if folder is None:
        return _SHIFT
    config = Config(folder / name, read_object(folder / name))
    kind = config.fields.get("_class_name", "FlowMatch")
    if not isinstance(kind, str) or not kind.startswith("FlowMatch"):
        raise config.unfit("a _class_name that starts with FlowMatch", kind)
    for field in _UNUSED:
        config.one_of(field, (False, None))
    config.one_of("shift_terminal", (None,))
    shift = config.real("shift", _SHIFT)
    if shift <= 0:
        raise config.unfit("a shift above 0", shift)
    return shift
