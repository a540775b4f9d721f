"""The text-to-image pipeline: conditioning, denoising loop, decoder."""

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import NoReturn, Self

import numpy as np
from PIL import Image

from .bundle import Bundle
from .caller_warning import warn_caller
from .conditioning import ClassConditioner, TextConditioner
from .denoising import Callback, Denoiser, invoke_callback, require_finite, shared_settings
from .editing import Edit, resolve_strength, source_hashes, to_latent_mask, to_pixels
from .engine import AUTO, Arrays, GraphEngine, checked_output, resolve
from .environment import check_environment
from .errors import BadInput, shorten
from .graphs import Graphs
from .image_size import format_size
from .images import to_pil
from .input_images import flatten_to_rgb, resize_and_crop, resize_and_crop_mask
from .planning import job_list, plan_settings
from .sampling import Array
from .settings import Settings, check_int
from .verified import verify_once


class ImageResized(UserWarning):
    """Warning: an input image was resized and cropped to the model's size."""


class Generator:
    """Generates images from a bundle with one engine. Graphs are loaded on first use and then kept.

    With `keep=False`, each graph is released once a batch has used it, which saves memory in a process that generates a
    single batch. Threads may share a generator; they take turns, a batch at a time.
    """

    def __init__(self, bundle: Bundle, engine: GraphEngine, t5: bool = True, keep: bool = True) -> None:
        self.bundle, self.engine = bundle, engine
        self.manifest = bundle.manifest
        if not t5 and not bundle.has_t5:
            raise BadInput(
                f"expected a bundle with T5 to leave out, found {self.manifest.name} without it; remove --no-t5 or t5=False"
            )
        classes = self.manifest.model.classes
        self.classes = ClassConditioner(classes) if classes else None
        self._graphs = Graphs(engine, keep)
        self.text = None if classes else TextConditioner(bundle, self._graphs, t5)
        self.denoiser = Denoiser(bundle, self._graphs)
        self._lock = RLock()  # reentrant, because a callback may decode latents
        self._process = os.getpid()

    @classmethod
    def load(
        cls,
        path: str | Path,
        engine: str = AUTO,
        verify: bool = True,
        t5: bool = True,
        keep: bool = True,
    ) -> "Generator":
        """Open the bundle at `path` with the engine of that name.

        `verify` checks the SHA-256 of every file, unless none has changed since that was done (verified.py).
        `t5=False` leaves out the T5 encoder of a Stable Diffusion 3 bundle, as its authors allow. Raises BundleInvalid,
        EngineUnavailable or BadInput (unknown engine, no T5 to leave out, TPX_ENGINES inside the bundle, or an environment
        variable with an invalid value).
        """
        check_environment()
        bundle = Bundle.open(path, verify=False)
        # Before the hashes, which take long for a large bundle.
        chosen = resolve(engine, bundle.manifest.precision)
        if verify:
            verify_once(bundle)
        return cls(bundle, chosen, t5, keep)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_id: int | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        strength: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_every: int = 1,
        cache_interval: int = 1,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        depth: int | None = None,
        num_images: int = 1,
        batch_size: int = 8,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """Generate `num_images` images of a prompt, of each of several prompts in order, or of a class.

        With `image`, the loop starts from that image and runs the last `strength` (a fraction) of its steps; with `mask`,
        only the white area is repainted. For the other arguments see `plan` and `stream`. Raises BadInput for invalid
        arguments, EngineFailed if an image is not finite, Cancelled if the callback returns False.
        """
        jobs = self.plan(
            prompt,
            class_id=class_id,
            negative_prompt=negative_prompt,
            strength=resolve_strength(image, mask, strength),
            steps=steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            guidance_every=guidance_every,
            cache_interval=cache_interval,
            sampler=sampler,
            seed=seed,
            depth=depth,
            num_images=num_images,
        )
        return self.generate(
            jobs, batch_size, callback, self.edit(image, mask) if image is not None else None
        )

    def generate(
        self,
        jobs: Sequence[Settings],
        batch_size: int = 8,
        callback: Callback | None = None,
        edit: Edit | None = None,
    ) -> list[Image.Image]:
        """All images that `stream` yields, as a list."""
        return list(self.stream(jobs, batch_size, callback, edit))

    def stream(
        self,
        jobs: Sequence[Settings],
        batch_size: int = 8,
        callback: Callback | None = None,
        edit: Edit | None = None,
    ) -> Iterator[Image.Image]:
        """Yield the image of each planned job as soon as its batch of `batch_size` is finished.

        Jobs may differ only in prompts, classes and seed; `edit` is the input image of jobs with a strength. Raises BadInput
        for other jobs.

        `callback(step, total, latents)` is called after each step, counted over all batches; if it returns False, Cancelled
        is raised. The `info` of each image holds its settings, which `save_image` writes into the file.
        """
        batch_size, jobs = check_int("batch_size", batch_size, 1), job_list(jobs)
        _require_callable(callback)
        if jobs:
            shared_settings(jobs, edit, self.manifest)
        batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
        return self._generate(batches, callback, edit)

    def _generate(
        self, batches: Sequence[list[Settings]], callback: Callback | None, edit: Edit | None
    ) -> Iterator[Image.Image]:
        left_out = self.text.left_out if self.text else ()
        sources = edit.sources if edit else None
        for number, batch in enumerate(batches):
            latents = self.generate_latents(batch, _counted(callback, number, len(batches)), edit)
            for job, pixels in zip(batch, self.decode(latents), strict=True):
                image = edit.paste(to_pil(pixels)) if edit else to_pil(pixels)
                image.info.update(job.metadata(self.manifest, self.engine.name, left_out, sources))
                yield image

    def edit(self, image: Image.Image, mask: Image.Image | None = None) -> Edit:
        """Prepare an input image, resized and cropped to the model's size; `mask` is white where to repaint.

        The mask is stretched to the size of the image. Transparent areas become white in an image and black in a mask.
        Raises BadInput if the bundle has no image encoder, if its model predicts epsilon, if an argument is not an image, or
        if the mask is all black; EngineFailed if the encoder fails or its latents are not finite. Warns with ImageResized if
        the image has another size than the model's.
        """
        self._encoder_path()
        model, latent = self.manifest.model, self.manifest.latent
        original = flatten_to_rgb(image, "white")
        original_mask = None if mask is None else flatten_to_rgb(mask, "black")
        resized, resized_mask = resize_and_crop(original, model.image_size_px), None
        if original.size != resized.size:
            warn_caller(
                "the input image of {}x{} pixels is resized and cropped to the model's {}x{}".format(
                    *original.size, *resized.size
                ),
                ImageResized,
            )
        if original_mask is not None:
            resized_mask = resize_and_crop_mask(original_mask.resize(original.size), model.image_size_px)
        with self._turn():
            outputs = self._graphs.open(self._encoder_path()).run({"image": to_pixels(resized)})
        latents: Array = checked_output(outputs, "latents", (1, *model.latent_shape))
        self._require_finite(latents, "latents of the input image")
        latents = (latents - np.float32(latent.shift)) * np.float32(latent.scale)
        latent_mask = None if resized_mask is None else to_latent_mask(resized_mask, model.latent_size)
        return Edit(resized, latents, resized_mask, latent_mask, source_hashes(original, original_mask))

    def plan(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_id: int | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        strength: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_every: int = 1,
        cache_interval: int = 1,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        depth: int | None = None,
        num_images: int = 1,
    ) -> list[Settings]:
        """The validated settings of each image of a call.

        `steps`, `guidance`, `guidance_interval`, `sampler` and `depth` are the bundle's if None. A list of negative prompts
        has one for each prompt. Image i of each prompt has seed `seed + i`, so that a batch equals separate runs; a list has
        the seed of each image. Guidance acts only at noise levels in `guidance_interval` (0..1), and after the first two
        fifths of those steps is computed only at every `guidance_every`-th one and reused in between; steps without it cost
        half. After the first two fifths of all steps the model is called only at every `cache_interval`-th one, and the
        others reuse its prediction. Both count all steps that run, so with both settings one is best a multiple of the
        other. Raises BadInput.
        """
        jobs = plan_settings(
            self.manifest,
            prompt,
            negative_prompt,
            seed,
            num_images,
            class_id=class_id,
            strength=strength,
            steps=steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            guidance_every=guidance_every,
            cache_interval=cache_interval,
            sampler=sampler,
            depth=depth,
        )
        if strength is not None:
            self._encoder_path()
        self.denoiser.schedule(jobs[0])
        if self.text:
            prompts = dict.fromkeys(job.prompt for job in jobs)
            for text in prompts:
                self.text.check(text)
            for negative in dict.fromkeys(job.negative_prompt for job in jobs):
                if negative and negative not in prompts:
                    self.text.check(negative, "negative prompt")
        return jobs

    def count_steps(self, jobs: Sequence[Settings], batch_size: int = 8) -> int:
        """The number of steps that `stream` runs for these jobs, as its callback counts them. Raises BadInput."""
        batch_size, jobs = check_int("batch_size", batch_size, 1), job_list(jobs)
        for job in jobs:
            job.check(self.manifest)
        return len(self.denoiser.schedule(jobs[0]).timesteps) * -(-len(jobs) // batch_size) if jobs else 0

    def generate_latents(
        self, jobs: Sequence[Settings], callback: Callback | None = None, edit: Edit | None = None
    ) -> Array:
        """The latents [B, C, H, W] of one batch of jobs that differ only in prompts, classes and seed, for `decode`.

        Raises Cancelled if the callback returns False, EngineFailed if a graph fails or latents are not finite, BadInput for
        a strength without an `edit` or the reverse.
        """
        jobs = job_list(jobs)
        job = shared_settings(jobs, edit, self.manifest)
        _require_callable(callback)
        with self._turn():
            conditioning = self._conditioning(jobs, guided=job.guidance != 1)
            return self.denoiser(job, [job.seed for job in jobs], conditioning, callback, edit)

    def close(self) -> None:
        """Release every loaded graph and cached conditions; a graph is loaded again on its next use.

        At the end of a `with` block it is called automatically.
        """
        with self._turn():
            self._graphs.release()
            self.clear_conditions()

    def __repr__(self) -> str:
        facts = self.manifest
        size = format_size(facts.model.image_size_px)
        return f"<Generator of {facts.name} ({facts.precision}) with {self.engine.name}: {size} pixels>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "expected a generator of each process's own, found one to pickle; load it in the process"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def clear_conditions(self) -> None:
        """Discard the cached conditions, so that a benchmark of the next batch includes their cost."""
        with self._turn():
            self.denoiser.clear_conditions()

    def decode(self, latents: Array) -> Array:
        """Decode latents [B, C, H, W] of the denoising loop to pixels [B, 3, height, width] in -1..1.

        Raises BadInput for another shape or type, EngineFailed if pixels are not finite.
        """
        spec, shape = self.manifest.latent, self.manifest.model.latent_shape
        try:
            latents = np.asarray(latents, np.float32)
        except (TypeError, ValueError):
            raise BadInput(f"expected an array of latents, found {shorten(latents)}") from None
        if latents.ndim != 4 or latents.shape[1:] != shape or not len(latents):
            raise BadInput(
                f"expected latents of shape [B, {', '.join(map(str, shape))}], found {list(latents.shape)}"
            )
        with self._turn():
            decoder = self._graphs.open(self.bundle.vae_decoder)
            outputs = decoder.run({"latents": latents / spec.scale + spec.shift})
        image_shape = (len(latents), 3, *self.manifest.model.image_size_px)
        image: Array = checked_output(outputs, "image", image_shape)
        self._require_finite(image, "image")
        return image

    def _conditioning(self, jobs: Sequence[Settings], guided: bool) -> Arrays:
        """Conditioning of both guidance branches, negative first; encoded together so that each encoder is loaded once."""
        if self.classes:
            no_class = [None] * len(jobs) if guided else []
            return self.classes([*no_class, *(job.class_id for job in jobs)])
        assert self.text is not None
        negatives = [job.negative_prompt or None for job in jobs] if guided else []
        return self.text([*negatives, *(job.prompt for job in jobs)])

    def _encoder_path(self) -> Path:
        """The graph of the image encoder. Raises BadInput if the bundle does not support image-to-image."""
        path, name, prediction = self.bundle.vae_encoder, self.manifest.name, self.manifest.model.prediction
        if path is None:
            raise BadInput(
                f"expected a bundle with a vae_encoder to start from an image, found {name} without one; "
                "leave out the image, or export the bundle again"
            )
        if prediction != "velocity":
            raise BadInput(
                f"expected a model that predicts velocity to start from an image, found that {name} predicts {prediction}; "
                "leave out the image"
            )
        return path

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for this thread's turn. Raises BadInput in a forked process, where a copy of the lock may stay locked."""
        if os.getpid() != self._process:
            raise BadInput(
                "expected a generator that was loaded in this process, found one from before a fork; load it after the fork"
            )
        with self._lock:
            yield

    def _require_finite(self, values: Array, what: str) -> None:
        require_finite(values, what, self.bundle, self.engine)


def _require_callable(callback: object) -> None:
    if callback is not None and not callable(callback):
        raise BadInput(f"expected a callback that can be called, found {shorten(callback)}")
    if inspect.iscoroutinefunction(callback):
        raise BadInput("expected a callback that is a plain function, found a coroutine function")


def _counted(callback: Callback | None, batch: int, batches: int) -> Callback | None:
    """`callback` with steps counted over all batches. Raises Cancelled, with the same count, if it returns False."""
    if callback is None:
        return None

    def counted(step: int, steps: int, latents: Array) -> None:
        invoke_callback(callback, batch * steps + step, batches * steps, latents)

    return counted
