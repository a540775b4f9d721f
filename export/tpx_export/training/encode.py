"""Encodes images with the autoencoder and captions with each text encoder, unless the cache has them already."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from tpx_export.pipeline import Pipeline, TextPart
from tpx_export.precision import in_float32
from tpx_export.training.cache import Cache, key
from tpx_export.training.images import Example
from tpx_runtime.bundle import hash_file
from tpx_runtime.editing import to_pixels
from tpx_runtime.errors import BadInput
from tpx_runtime.input_images import flatten_to_rgb, load_image, resize_and_crop
from tpx_runtime.progress import progress
from tpx_runtime.tokenizer import Encoding

_IMAGE_BATCH, _CAPTION_BATCH = 2, 8


def encode_images(
    examples: Sequence[Example],
    pipeline: Pipeline,
    base: str,
    cache: Cache,
    device: str,
    skip_broken: bool = False,
) -> dict[Example, str]:
    """The cache key of each image's `latents` [C, H, W]: the posterior's mean, shifted and scaled for the transformer.

    With `skip_broken` an image that cannot be read is reported on stderr and skipped. Raises BadInput for such an image
    otherwise, and if no image remains.
    """
    size, keys = pipeline.model.image_size_px, {}
    for example in examples:
        try:
            keys[example] = key("latents", base, size, hash_file(example.path))
        except OSError as error:
            _report_broken(f"expected an image in {example.path}, found: {error.strerror}", skip_broken)
    missing = list({name: example for example, name in keys.items() if name not in cache}.items())
    broken: set[str] = set()
    if missing:
        module = pipeline.autoencoder().to(device)
        with progress("images", len(missing)) as advance, in_float32(module):
            for start in range(0, len(missing), _IMAGE_BATCH):
                batch: list[tuple[str, Tensor]] = []
                for name, example in missing[start : start + _IMAGE_BATCH]:
                    try:
                        batch.append((name, _pixels(example.path, size)))
                    except BadInput as error:
                        _report_broken(str(error), skip_broken)
                        broken.add(name)
                _encode_image_batch(batch, module, pipeline, cache, device)
                advance(min(start + _IMAGE_BATCH, len(missing)), "")
        del module
        _empty_cuda_cache(device)
    found = {example: name for example, name in keys.items() if name not in broken}
    if not found:
        raise BadInput(
            f"expected an image that can be read, found none among {len(examples)}; check the files"
        )
    return found


def encode_captions(
    captions: Iterable[str], pipeline: Pipeline, base: str, cache: Cache, device: str
) -> dict[str, tuple[str, ...]]:
    """For each caption the cache key of every text encoder's output: `context` [tokens, width], perhaps `pooled` [width].

    "" means no caption. Reports on stderr how many captions are truncated. Raises BadInput for a caption that a tokenizer
    rejects.
    """
    texts = list(dict.fromkeys(captions))
    keys: dict[str, tuple[str, ...]] = dict.fromkeys(texts, ())
    for part in pipeline.text:
        encodings = _tokenize(part, texts)
        names = [key("text", base, part.spec, e.ids) for e in encodings]
        missing = [(n, e.ids) for n, e in dict(zip(names, encodings, strict=True)).items() if n not in cache]
        if missing:
            _encode_texts(part, missing, cache, device)
        for text, name in zip(texts, names, strict=True):
            keys[text] += (name,)
    return keys


def _tokenize(part: TextPart, texts: list[str]) -> list[Encoding]:
    tokenizer = part.tokenizer()
    encodings = [tokenizer.encode(text) if text else tokenizer.encode_empty() for text in texts]
    if truncated := sum(encoding.dropped > 0 for encoding in encodings):
        click.echo(
            f"{part.spec.folder} truncates {truncated} of {len(texts)} captions: they are longer than its "
            f"{part.spec.tokens} tokens",
            err=True,
        )
    return encodings


@torch.no_grad()
def _encode_texts(part: TextPart, missing: list[tuple[str, list[int]]], cache: Cache, device: str) -> None:
    module = part.load().to(device)
    label = part.spec.folder.replace("_", " ")
    # The encoders create masks and positions on torch's default device.
    with progress(label, len(missing)) as advance, in_float32(module), torch.device(device):
        for start in range(0, len(missing), _CAPTION_BATCH):
            batch = missing[start : start + _CAPTION_BATCH]
            values = module(torch.tensor([ids for _, ids in batch]))
            _require_finite(values, part.spec.folder)
            for row, (name, _) in enumerate(batch):
                cache.put(name, {n: value[row] for n, value in zip(part.spec.outputs, values, strict=True)})
            advance(start + len(batch), "")
    del module
    _empty_cuda_cache(device)


@torch.no_grad()
def _encode_image_batch(
    batch: list[tuple[str, Tensor]], module: nn.Module, pipeline: Pipeline, cache: Cache, device: str
) -> None:
    if not batch:
        return
    mean = module.encoder(torch.stack([pixels for _, pixels in batch]).to(device))[0]  # type: ignore[operator]
    latents = (mean - pipeline.latent.shift) * pipeline.latent.scale
    for (name, _), row in zip(batch, latents, strict=True):
        if not torch.isfinite(row).all():
            raise BadInput(
                "expected finite latents, found NaN or infinity from the base's VAE; use another VAE"
            )
        cache.put(name, {"latents": row})


def _pixels(path: Path, size_px: tuple[int, int]) -> Tensor:
    """The image as [3, height, width] in -1..1, rotated upright, scaled and center-cropped."""
    image = load_image(path)
    try:
        flat = flatten_to_rgb(image, "white")
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    return torch.from_numpy(to_pixels(resize_and_crop(flat, size_px))[0])


def _require_finite(values: Iterable[Tensor], part: str) -> None:
    if not all(torch.isfinite(value).all() for value in values):
        raise BadInput(
            f"expected finite outputs of the base's {part}, found NaN or infinity; use other weights"
        )


def _report_broken(message: str, skip: bool) -> None:
    """Report a broken image on stderr if `skip`, else raise BadInput."""
    if not skip:
        raise BadInput(f"{message}; repair it, or skip such images with --skip-broken")
    click.echo(f"skipped: {' '.join(message.split())}", err=True)


def _empty_cuda_cache(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
