"""Encode pictures with the autoencoder, and captions with each text encoder in turn, unless the cache has them already."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from tpx_export.pipeline import Pipeline, TextPart
from tpx_export.precision import in_float32
from tpx_export.training.cache import Cache, key
from tpx_export.training.fingerprint import of_file
from tpx_export.training.images import Example
from tpx_runtime.editing import to_pixels
from tpx_runtime.errors import BadInput
from tpx_runtime.input_images import flatten_to_rgb, load_image, resize_and_crop
from tpx_runtime.progress import progress
from tpx_runtime.tokenizer import Encoding, make_tokenizer, reject_unknown

_PICTURES, _CAPTIONS = 2, 8  # of one batch


def encode_pictures(
    examples: Sequence[Example],
    pipeline: Pipeline,
    base: str,
    cache: Cache,
    device: str,
    skip_broken: bool = False,
) -> dict[Example, str]:
    """The cache's key of each picture's `latents` [C, S, S], as the transformer sees them: the posterior's mean.

    If `skip_broken`, a picture that cannot be read is named on stderr and left out; else it raises BadInput. So does having
    no picture left.
    """
    size, keys = pipeline.model.image_size_px, {}
    for example in examples:
        try:
            keys[example] = key("latents", base, size, of_file(example.path))
        except OSError as error:
            _broken(f"expected a picture in {example.path}, found: {error.strerror}", skip_broken)
    missing = list({name: example for example, name in keys.items() if name not in cache}.items())
    broken: set[str] = set()
    if missing:
        module = pipeline.autoencoder().to(device)
        with progress("pictures", len(missing)) as advance, in_float32(module):
            for start in range(0, len(missing), _PICTURES):
                group: list[tuple[str, Tensor]] = []
                for name, example in missing[start : start + _PICTURES]:
                    try:
                        group.append((name, _pixels(example.path, size)))
                    except BadInput as error:
                        _broken(str(error), skip_broken)
                        broken.add(name)
                _encode_group(group, module, pipeline, cache, device)
                advance(min(start + _PICTURES, len(missing)), "")
        del module
        _release(device)
    found = {example: name for example, name in keys.items() if name not in broken}
    if not found:
        raise BadInput(
            f"expected a picture that can be read, found none among {len(examples)}; check the files"
        )
    return found


def encode_captions(
    captions: Iterable[str], pipeline: Pipeline, base: str, cache: Cache, device: str
) -> dict[str, tuple[str, ...]]:
    """For each caption the cache's key of every encoder's `context` [tokens, width] and, where it pools, `pooled` [width].

    "" is no caption. Says on stderr how many captions are cut short. Raises BadInput for one that a tokenizer refuses.
    """
    texts = list(dict.fromkeys(captions))
    keys: dict[str, tuple[str, ...]] = dict.fromkeys(texts, ())
    for part in pipeline.text:
        encodings = _tokens(part, texts)
        names = [key("text", base, part.spec, e.ids) for e in encodings]
        missing = [(n, e.ids) for n, e in dict(zip(names, encodings, strict=True)).items() if n not in cache]
        if missing:
            _encode_texts(part, missing, cache, device)
        for text, name in zip(texts, names, strict=True):
            keys[text] += (name,)
    return keys


def _tokens(part: TextPart, texts: list[str]) -> list[Encoding]:
    tokenizer = make_tokenizer(part.vocabulary, Path(part.spec.tokenizer))
    encodings = [tokenizer.encode(text) if text else tokenizer.encode_empty() for text in texts]
    for encoding in encodings:
        reject_unknown(encoding, tokenizer)
    if cut := sum(encoding.dropped > 0 for encoding in encodings):
        click.echo(
            f"{part.spec.folder} leaves out the end of {cut} of {len(texts)} captions: they have more than its "
            f"{part.spec.tokens} tokens",
            err=True,
        )
    return encodings


@torch.no_grad()
def _encode_texts(part: TextPart, missing: list[tuple[str, list[int]]], cache: Cache, device: str) -> None:
    module = part.load().to(device)
    names = ("context", "pooled") if part.spec.pooled_width else ("context",)
    label = part.spec.folder.replace("_", " ")
    # The encoders make their masks and positions where torch makes tensors by default.
    with progress(label, len(missing)) as advance, in_float32(module), torch.device(device):
        for start in range(0, len(missing), _CAPTIONS):
            group = missing[start : start + _CAPTIONS]
            said = module(torch.tensor([ids for _, ids in group]))
            values = said if isinstance(said, tuple) else (said,)
            _require_finite(values, part.spec.folder)
            for row, (name, _) in enumerate(group):
                cache.put(name, {n: value[row] for n, value in zip(names, values, strict=True)})
            advance(start + len(group), "")
    del module
    _release(device)


@torch.no_grad()
def _encode_group(
    group: list[tuple[str, Tensor]], module: nn.Module, pipeline: Pipeline, cache: Cache, device: str
) -> None:
    if not group:
        return
    mean, _ = module.encoder(torch.stack([pixels for _, pixels in group]).to(device))  # type: ignore[operator]
    latents = (mean - pipeline.latent.shift) * pipeline.latent.scale
    for (name, _), each in zip(group, latents, strict=True):
        if not torch.isfinite(each).all():
            raise BadInput(
                "expected finite latents, found NaN or infinity from the base's VAE; use another VAE"
            )
        cache.put(name, {"latents": each})


def _pixels(path: Path, size_px: tuple[int, int]) -> Tensor:
    """[3, height, width] in -1..1, upright, scaled and cropped about the middle."""
    return torch.from_numpy(to_pixels(resize_and_crop(flatten_to_rgb(load_image(path), "white"), size_px))[0])


def _require_finite(values: Iterable[Tensor], part: str) -> None:
    if not all(torch.isfinite(value).all() for value in values):
        raise BadInput(
            f"expected finite numbers of the base's {part}, found NaN or infinity; use other weights"
        )


def _broken(said: str, skip: bool) -> None:
    if not skip:
        raise BadInput(f"{said}; mend it, or leave such pictures out with --skip-broken")
    click.echo(f"skipped: {' '.join(said.split())}", err=True)


def _release(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
