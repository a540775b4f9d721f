"""The main job: text encoder, denoising loop, decoder, picture."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from .bundle import Bundle
from .engine import AUTO, Engine, Session, output, resolve
from .errors import BadInput, BundleInvalid, Cancelled, EngineFailed, shorten
from .guidance import Conditioning, GuidedVelocity
from .images import to_pil
from .noise import MAX_SEED, batch_noise
from .samplers import SAMPLERS, Array
from .settings import Settings, check_int
from .tokenizer import WordTokenizer, refuse_unknown

Callback = Callable[[int, int, Array], bool | None]  # (step from 1, total steps, latents [B, C, H, W])
MAX_IMAGES = 1000  # of one prompt in one call


@dataclass(frozen=True)
class Sample:
    """What the loop made: `latents` [B, C, H, W], and for each model call `routes` [B, S, N], if any."""

    latents: Array
    routes: list[npt.NDArray[np.int64]]


class Generator:
    """Makes pictures from a bundle with one engine. Graphs are loaded when first used, and kept."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self.engine = bundle, engine
        self.manifest = bundle.manifest
        self.tokenizer = WordTokenizer.from_file(bundle.vocabulary)
        if self.tokenizer.text_tokens != self.manifest.model.text_tokens:
            raise BundleInvalid(
                f"{bundle.vocabulary}: expected text_tokens {self.manifest.model.text_tokens} as in the "
                f"manifest, found {self.tokenizer.text_tokens}; export the bundle again"
            )
        self._shift = bundle.schedule_shift
        self._transformers: dict[int, Session] = {}

    @classmethod
    def load(cls, path: str | Path, engine: str = AUTO, verify: bool = True) -> "Generator":
        """Open the bundle at `path` for the engine of that name; `verify` checks every file's SHA-256.

        Raises BundleInvalid, EngineUnavailable or BadInput (no engine has that name).
        """
        return cls(Bundle.open(path, verify), resolve(engine))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        depth: int | None = None,
        num_images: int = 1,
        batch_size: int = 8,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """Pictures of a prompt, or of each of several prompts in turn, `num_images` of each.

        The settings are those of `plan`, the rest is that of `draw`. Raises BadInput for arguments that do
        not fit, EngineFailed for a picture that is not finite, Cancelled when the callback returns False.
        """
        jobs = self.plan(
            prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            seed=seed,
            depth=depth,
            num_images=num_images,
        )
        return self.draw(jobs, batch_size, callback)

    def draw(
        self, jobs: Sequence[Settings], batch_size: int = 8, callback: Callback | None = None
    ) -> list[Image.Image]:
        """The pictures of planned jobs, `batch_size` at a time, which changes no picture.

        `callback(step, total, latents)` is called after each step, counted over all batches; if it returns
        False, Cancelled is raised. Each picture's `info` holds its settings, and `save_png` writes them into
        the file.
        """
        check_int("batch_size", batch_size, 1)
        batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
        images = []
        for number, batch in enumerate(batches):
            sample = self.generate_latents(batch, _counted(callback, number, len(batches)))
            for job, pixels in zip(batch, self.decode(sample.latents), strict=True):
                image = to_pil(pixels)
                image.info.update(job.metadata(self.manifest, self.engine.name))
                images.append(image)
        return images

    def plan(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        depth: int | None = None,
        num_images: int = 1,
    ) -> list[Settings]:
        """The checked settings of each picture of a call, what is None taken from the bundle's defaults.

        Image i of each prompt has seed `seed + i`, so that a batch equals separate runs. Raises BadInput.
        """
        defaults = self.manifest.defaults
        check_int("num_images", num_images, 1, MAX_IMAGES)
        check_int("seed", seed, 0, MAX_SEED - num_images + 1)
        if not isinstance(prompt, Iterable):
            raise BadInput(f"expected a prompt or a list of prompts, found {shorten(prompt)}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise BadInput("expected at least one prompt, found none")
        jobs = [
            Settings(
                prompt=one,
                negative_prompt=negative_prompt or "",
                seed=seed + i,
                steps=defaults.steps if steps is None else steps,
                guidance=defaults.guidance if guidance is None else guidance,
                sampler=defaults.sampler if sampler is None else sampler,
                depth=defaults.depth if depth is None else depth,
            ).check(self.manifest)
            for one in prompts
            for i in range(num_images)
        ]
        for one in prompts:
            self._ids(one)
        self._negative_ids(negative_prompt or "")
        return jobs

    def generate_latents(self, jobs: Sequence[Settings], callback: Callback | None = None) -> Sample:
        """Run the denoising loop over one batch, whose jobs differ in nothing but prompts and seed.

        Raises Cancelled when the callback returns False.
        """
        loops = {(job.sampler, job.steps, job.guidance, job.depth) for job in jobs}
        if len(loops) != 1:
            raise BadInput(
                f"expected jobs of one sampler, steps, guidance and depth, found {len(loops)} kinds"
            )
        (sampler_name, steps, guidance, depth) = loops.pop()
        prompt, negative = self._encode([self._ids(job.prompt) for job in jobs]), None
        if guidance != 1:
            negative = self._encode([self._negative_ids(job.negative_prompt) for job in jobs])
        velocity = GuidedVelocity(self._transformer(depth), prompt, negative, guidance)
        latents = batch_noise([job.seed for job in jobs], self.manifest.model.latent_shape)
        sampler = SAMPLERS[sampler_name]
        path = sampler.sample(velocity, latents, sampler.schedule(steps, self._shift))
        with np.errstate(over="ignore", invalid="ignore"):  # the next line says it better
            for step, latents in enumerate(path, start=1):
                self._require_finite(latents, f"latents of step {step}")
                answer = callback(step, steps, latents) if callback else None
                if isinstance(answer, bool | np.bool_) and not answer:
                    raise Cancelled(f"cancelled at step {step} of {steps}, nothing was written")
        return Sample(latents, velocity.routes)

    def decode(self, latents: Array) -> Array:
        """Latents [B, C, H, W] of the denoising loop to pixels [B, 3, height, width] in -1..1."""
        spec = self.manifest.latent
        outputs = self._decoder.run({"latents": latents / spec.scale + spec.shift})
        shape = (len(latents), 3, *self.manifest.model.image_size_px)
        image: Array = output(outputs, "image", shape)
        self._require_finite(image, "picture")
        return image

    def _ids(self, prompt: str) -> list[int]:
        encoding = self.tokenizer.encode(prompt)
        refuse_unknown(encoding, self.tokenizer)
        return encoding.ids

    def _negative_ids(self, prompt: str) -> list[int]:
        return self._ids(prompt) if prompt else self.tokenizer.encode_empty().ids

    def _encode(self, ids: list[list[int]]) -> Conditioning:
        # The pictures of one prompt share its row, so a large text encoder runs once for all of them.
        unique, rows = np.unique(np.array(ids, np.int64), axis=0, return_inverse=True)
        outputs, model = self._text_encoder.run({"ids": unique}), self.manifest.model
        context = output(outputs, "context", (*unique.shape, model.context_width))
        pooled = output(outputs, "pooled", (len(unique), model.pooled_width))
        return Conditioning(context[rows.ravel()], pooled[rows.ravel()])

    def _require_finite(self, values: Array, what: str) -> None:
        if not np.isfinite(values).all():
            raise EngineFailed(
                f"expected finite numbers in the {what}, found NaN or infinity from engine "
                f"{self.engine.name} at precision {self.manifest.precision}; try an fp32 bundle, or "
                "check this one with tpx-verify"
            )

    @cached_property
    def _text_encoder(self) -> Session:
        return self.engine.open(self.bundle.text_encoder)

    @cached_property
    def _decoder(self) -> Session:
        return self.engine.open(self.bundle.vae_decoder)

    def _transformer(self, depth: int) -> Session:
        if depth not in self._transformers:
            self._transformers[depth] = self.engine.open(self.bundle.transformer(depth, self.engine.plain))
        return self._transformers[depth]


def _counted(callback: Callback | None, batch: int, batches: int) -> Callback | None:
    """`callback` with steps counted over all batches."""
    if callback is None:
        return None
    return lambda step, steps, latents: callback(batch * steps + step, batches * steps, latents)
