"""The main job: conditioning, denoising loop, decoder, picture."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from PIL import Image

from .bundle import Bundle
from .conditioning import ClassConditioner, TextConditioner
from .denoising import Callback, Denoiser, Sample, one_loop, require_finite, require_wanted
from .editing import Edit, sources_of, starting_strength, to_pixels, to_repaint
from .engine import AUTO, Arrays, Engine, output, resolve
from .errors import BadInput, shorten
from .graphs import Graphs
from .images import to_pil
from .manifest import EVERY_LEVEL
from .noise import MAX_SEED
from .pictures import fit, fit_mask, flat
from .sampling import Array
from .settings import Settings, check_int

MAX_IMAGES = 1000  # of one prompt in one call


class PictureFitted(UserWarning):
    """A picture to start from was cropped or scaled to the model's size: no error, but worth knowing."""


class Generator:
    """Makes pictures from a bundle with one engine. Graphs are loaded when first used, and kept.

    With `keep=False` each is let go once a batch has used it: less memory, for a process that draws one batch. Threads may
    share a generator, and take turns a batch at a time.
    """

    def __init__(self, bundle: Bundle, engine: Engine, t5: bool = True, keep: bool = True) -> None:
        self.bundle, self.engine = bundle, engine
        self.manifest = bundle.manifest
        if not t5 and all(encoder.pooled_width for encoder in self.manifest.text_encoders):
            raise BadInput(
                f"expected a bundle with T5 to leave out, found {self.manifest.name} without; leave it be"
            )
        classes = self.manifest.model.classes
        self.classes = ClassConditioner(classes) if classes else None
        self._graphs = Graphs(engine, keep)
        self.text = None if classes else TextConditioner(bundle, self._graphs, t5)
        self.denoiser = Denoiser(bundle, self._graphs)
        self._turn = RLock()  # a callback may decode what it is shown

    @classmethod
    def load(
        cls,
        path: str | Path,
        engine: str = AUTO,
        verify: bool = True,
        t5: bool = True,
        keep: bool = True,
    ) -> "Generator":
        """Open the bundle at `path` for the engine of that name; `verify` checks every file's SHA-256.

        `t5=False` leaves out the T5 encoder of a Stable Diffusion 3 bundle, as its authors allow.
        Raises BundleInvalid, EngineUnavailable or BadInput (no engine has that name, or there is no T5 to leave out).
        """
        return cls(Bundle.open(path, verify), resolve(engine), t5, keep)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_id: int | None = None,
        negative_prompt: str | None = None,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        strength: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_every: int = 1,
        sampler: str | None = None,
        seed: int = 0,
        depth: int | None = None,
        num_images: int = 1,
        batch_size: int = 8,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """Pictures of a prompt, or of each of several prompts in turn, or of a class; `num_images` of each.

        With `image` the loop starts from that picture and takes the last `strength` of its steps; with `mask` only what is
        white there is painted anew. The settings are those of `plan`, the rest is that of `draw`. Raises BadInput for
        arguments that do not fit, EngineFailed for a picture that is not finite, Cancelled when the callback returns False.
        """
        jobs = self.plan(
            prompt,
            class_id=class_id,
            negative_prompt=negative_prompt,
            strength=starting_strength(image, mask, strength),
            steps=steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            guidance_every=guidance_every,
            sampler=sampler,
            seed=seed,
            depth=depth,
            num_images=num_images,
        )
        return self.draw(jobs, batch_size, callback, self.edit(image, mask) if image is not None else None)

    def draw(
        self,
        jobs: Sequence[Settings],
        batch_size: int = 8,
        callback: Callback | None = None,
        edit: Edit | None = None,
    ) -> list[Image.Image]:
        """All pictures that `stream` gives one by one."""
        return list(self.stream(jobs, batch_size, callback, edit))

    def stream(
        self,
        jobs: Sequence[Settings],
        batch_size: int = 8,
        callback: Callback | None = None,
        edit: Edit | None = None,
    ) -> Iterator[Image.Image]:
        """The picture of each planned job as soon as its batch of `batch_size` is done.

        Jobs differ in nothing but prompts, classes and seed; `edit` is the picture that those with a strength start from.
        Raises BadInput for others.

        `callback(step, total, latents)` is called after each step, counted over all batches; if it returns
        False, Cancelled is raised. Each picture's `info` holds its settings, and `save_png` writes them into
        the file.
        """
        batch_size, jobs = check_int("batch_size", batch_size, 1), list(jobs)
        if jobs:
            one_loop(jobs, edit, self.manifest)
        batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
        left_out = self.text.left_out if self.text else ()
        sources = edit.sources if edit else None
        for number, batch in enumerate(batches):
            sample = self.generate_latents(batch, _counted(callback, number, len(batches)), edit)
            for job, pixels in zip(batch, self.decode(sample.latents), strict=True):
                image = edit.paste(to_pil(pixels)) if edit else to_pil(pixels)
                image.info.update(job.metadata(self.manifest, self.engine.name, left_out, sources))
                yield image

    def edit(self, image: Image.Image, mask: Image.Image | None = None) -> Edit:
        """A picture to start from, scaled and cropped to this bundle's size; `mask` is white where to paint anew.

        A mask is laid over the whole picture, whatever its own size. What is transparent is white in a picture and black in
        a mask. Raises BadInput for a bundle without an encoder of pictures, for what is no picture, and for a black mask;
        warns, with PictureFitted, of a picture of another size.
        """
        self._encoder_path()
        model, latent = self.manifest.model, self.manifest.latent
        upright, painted = flat(image, "white"), None if mask is None else flat(mask, "black")
        picture, fitted = fit(upright, model.image_size_px), None
        if upright.size != picture.size:
            warnings.warn(
                "the picture of {}x{} pixels is scaled and cropped to the model's {}x{}".format(
                    *upright.size, *picture.size
                ),
                PictureFitted,
                stacklevel=2,
            )
        if painted is not None:
            fitted = fit_mask(painted.resize(upright.size), model.image_size_px)
        with self._turn:
            outputs = self._graphs.open(self._encoder_path()).run({"image": to_pixels(picture)})
        latents: Array = output(outputs, "latents", (1, *model.latent_shape))
        self._require_finite(latents, "latents of the picture")
        latents = (latents - np.float32(latent.shift)) * np.float32(latent.scale)
        repaint = None if fitted is None else to_repaint(fitted, model.latent_size)
        return Edit(picture, latents, fitted, repaint, sources_of(upright, painted))

    def plan(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_id: int | None = None,
        negative_prompt: str | None = None,
        strength: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_every: int = 1,
        sampler: str | None = None,
        seed: int = 0,
        depth: int | None = None,
        num_images: int = 1,
    ) -> list[Settings]:
        """The checked settings of each picture of a call, what is None taken from the bundle's defaults.

        Image i of each prompt has seed `seed + i`, so that a batch equals separate runs. `guidance_interval`, of noise
        levels in 0..1, is where guidance acts: elsewhere a step costs half. So it does where guidance is taken from the step
        before: `guidance_every` N is to work it out at each Nth step only, after the first two fifths. Raises BadInput.
        """
        num_images = check_int("num_images", num_images, 1, MAX_IMAGES)
        seed = check_int("seed", seed, 0, MAX_SEED - num_images + 1)
        if prompt is None and (self.classes or class_id is not None):
            prompt = ""  # which the settings refuse, and say why, where it is a model of prompts
        if not isinstance(prompt, Iterable):
            found = "none; say what to draw" if prompt is None else shorten(prompt)
            raise BadInput(f"expected a prompt or a list of prompts, found {found}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise BadInput("expected at least one prompt, found none")
        given = {
            "steps": steps,
            "guidance": guidance,
            "guidance_interval": guidance_interval,
            "sampler": sampler,
            "depth": depth,
        }
        chosen: dict[str, Any] = asdict(self.manifest.defaults)
        chosen |= {name: value for name, value in given.items() if value is not None}
        jobs = [
            Settings(
                prompt=one,
                negative_prompt="" if negative_prompt is None else negative_prompt,
                seed=seed + i,
                guidance_every=guidance_every,
                class_id=class_id,
                strength=strength,
                **chosen,
            ).check(self.manifest)
            for one in prompts
            for i in range(num_images)
        ]
        limited = guidance_interval is not None and jobs[0].guidance_interval != EVERY_LEVEL
        if jobs[0].guidance == 1 and (limited or guidance_every != 1):
            what = "a guidance interval" if limited else "guidance at every few steps"
            raise BadInput(f"expected guidance other than 1 with {what}, found 1; leave out one of them")
        if strength is not None:
            self._encoder_path()
        self.denoiser.schedule(jobs[0])
        if self.text:
            for text in dict.fromkeys(prompts):
                self.text.check(text)
            if negative_prompt and negative_prompt not in prompts:
                self.text.check(negative_prompt, "negative prompt")
        return jobs

    def generate_latents(
        self, jobs: Sequence[Settings], callback: Callback | None = None, edit: Edit | None = None
    ) -> Sample:
        """Run the denoising loop over one batch, whose jobs differ in nothing but prompts, classes and seed.

        Raises Cancelled when the callback returns False, BadInput for a strength without an `edit` and the reverse.
        """
        job = one_loop(jobs, edit, self.manifest)
        with self._turn:
            conditioning = self._conditioning(jobs, guided=job.guidance != 1)
            return self.denoiser(job, [job.seed for job in jobs], conditioning, callback, edit)

    def forget(self) -> None:
        """Compute the next batch's conditions anew, even if they are those of the last: to measure what they cost."""
        self.denoiser.forget()

    def decode(self, latents: Array) -> Array:
        """Latents [B, C, H, W] of the denoising loop to pixels [B, 3, height, width] in -1..1."""
        spec = self.manifest.latent
        with self._turn:
            decoder = self._graphs.open(self.bundle.vae_decoder)
            outputs = decoder.run({"latents": latents / spec.scale + spec.shift})
        shape = (len(latents), 3, *self.manifest.model.image_size_px)
        image: Array = output(outputs, "image", shape)
        self._require_finite(image, "picture")
        return image

    def _conditioning(self, jobs: Sequence[Settings], guided: bool) -> Arrays:
        """Conditioning of both guidance branches, negative first, encoded together so that each encoder is loaded once."""
        if self.classes:
            nothing = [None] * len(jobs) if guided else []
            return self.classes([*nothing, *(job.class_id for job in jobs)])
        assert self.text is not None
        negatives = [job.negative_prompt or None for job in jobs] if guided else []
        return self.text([*negatives, *(job.prompt for job in jobs)])

    def _encoder_path(self) -> Path:
        """The encoder's graph. Raises BadInput for a bundle that cannot start from a picture."""
        path, name, prediction = self.bundle.vae_encoder, self.manifest.name, self.manifest.model.prediction
        if path is None:
            raise BadInput(
                f"expected a bundle with a vae_encoder to start from a picture, found {name} without one; "
                "leave out the image, or export the bundle again"
            )
        if prediction != "velocity":
            raise BadInput(
                f"expected a model of velocity to start from a picture, found that {name} predicts {prediction}; "
                "leave out the image"
            )
        return path

    def _require_finite(self, values: Array, what: str) -> None:
        require_finite(values, what, self.bundle, self.engine)


def _counted(callback: Callback | None, batch: int, batches: int) -> Callback | None:
    """`callback` with steps counted over all batches, as the Cancelled that a False of it raises counts them."""
    if callback is None:
        return None

    def counted(step: int, steps: int, latents: Array) -> None:
        require_wanted(callback, batch * steps + step, batches * steps, latents)

    return counted
