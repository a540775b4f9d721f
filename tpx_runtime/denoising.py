"""The denoising loop of one batch: from noise, or from a picture with noise, to latents that the decoder takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import cast

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .course import course_of
from .editing import Edit, Repainting, noised, tail
from .engine import Arrays, Course, Engine, Session
from .errors import BadInput, Cancelled, EngineFailed, shorten
from .graphs import Graphs
from .guidance import GuidedPrediction, is_guided, reused
from .manifest import Manifest
from .modulation import Conditions
from .noise import batch_noise
from .registry import SAMPLERS_FOR, walk
from .samplers import TRAIN_TIMESTEPS, Array, Schedule, Velocity
from .settings import Settings

Callback = Callable[[int, int, Array], bool | None]  # (step from 1, total steps, latents [B, C, H, W])
Routes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """What the loop made: `latents` [B, C, H, W], and for each model call `routes` [B, S, N], if any."""

    latents: Array
    routes: list[Routes]


# Of Settings.
LOOP = ("sampler", "steps", "guidance", "guidance_interval", "guidance_every", "depth", "strength")


def one_loop(jobs: Sequence[Settings], edit: Edit | None, manifest: Manifest) -> Settings:
    """The job that stands for all, of which there is one at least; they share what LOOP names.

    Raises BadInput where they do not, for jobs of another model, and for a strength without an `edit` and the reverse.
    """
    for job in jobs:
        job.check(manifest)
    for name in LOOP:
        first, *others = dict.fromkeys(getattr(job, name) for job in jobs)
        if others:
            raise BadInput(
                f"expected jobs of one {name}, found {shorten(first)} and {shorten(others[0])}; draw them in two calls"
            )
    if (jobs[0].strength is None) != (edit is None):
        found = "no strength" if jobs[0].strength is None else "no picture"
        raise BadInput(f"expected a picture to start from and a strength, or neither, found {found}")
    return jobs[0]


def require_finite(values: Array, what: str, bundle: Bundle, engine: Engine) -> None:
    """Raises EngineFailed."""
    if not np.isfinite(values).all():
        raise EngineFailed(
            f"expected finite numbers in the {what}, found NaN or infinity from engine {engine.name} at precision "
            f"{bundle.manifest.precision}; try an fp32 bundle, or check this one with tpx-verify"
        )


def require_wanted(callback: Callback, step: int, total: int, latents: Array) -> None:
    """Call it. Raises Cancelled where it returns False; nothing and other answers are no answer."""
    answer = callback(step, total, latents)
    if isinstance(answer, bool | np.bool_) and not answer:
        raise Cancelled(f"cancelled at step {step} of {total}")


def require_guided(job: Settings, schedule: Schedule) -> None:
    """Raises BadInput for guidance in an interval that holds no step: it, and a negative prompt, would do nothing."""
    if job.guidance == 1 or any(
        is_guided(at, job.guidance, job.guidance_interval) for at in schedule.timesteps
    ):
        return
    levels = ", ".join(f"{at / TRAIN_TIMESTEPS:.3g}" for at in schedule.timesteps[:6])
    more = ", ..." if len(schedule.timesteps) > 6 else ""
    raise BadInput(
        f"expected a guidance interval that holds one of the steps' noise levels ({levels}{more}), "
        f"found {shorten(job.guidance_interval)}; widen it"
    )


class Denoiser:
    """Runs the loop on a bundle's transformer."""

    def __init__(self, bundle: Bundle, graphs: Graphs) -> None:
        self._bundle, self._graphs = bundle, graphs
        self._last: Conditions | None = None

    def schedule(self, job: Settings) -> Schedule:
        """The steps that `job` takes. Raises BadInput for guidance that would act at none of them."""
        schedule = SAMPLERS_FOR[self._bundle.manifest.model.prediction][job.sampler].schedule(
            job.steps, self._shift
        )
        if job.strength is not None:
            schedule = tail(schedule, job.strength)
        require_guided(job, schedule)
        return schedule

    def __call__(
        self, job: Settings, seeds: list[int], told: Arrays, callback: Callback | None, edit: Edit | None
    ) -> Sample:
        """One picture's latents for each seed; `told` as GuidedPrediction wants it, the rest as `job` says.

        Raises Cancelled when the callback returns False, EngineFailed for latents that are not finite.
        """
        model = self._bundle.manifest.model
        sampler, schedule = SAMPLERS_FOR[model.prediction][job.sampler], self.schedule(job)
        latents = noise = batch_noise(seeds, model.latent_shape)
        if edit:
            latents = noised(edit.latents, noise, schedule.sigmas[0])
        conditions, course = self._conditions_of(told, schedule.timesteps), None
        conditions.at(schedule.timesteps[0])  # before the transformer is opened, so that either may be let go
        if self._graphs.engine.loops and self._bundle.step and not (edit and edit.repaint is not None):
            course = course_of(job, sampler, schedule, latents, told, conditions, model)
        guidance = job.guidance, job.guidance_interval
        left_out = reused(schedule.timesteps, *guidance, job.guidance_every)
        transformer = self._graphs.open(self._bundle.transformer(job.depth, self._graphs.engine.spelling))
        routes: list[Routes] = []
        path: Iterator[Array | None]
        if course:
            path = self._on_device(transformer, course, routes, every_step=callback is not None)
        else:
            predict = GuidedPrediction(transformer, model, told, conditions, *guidance, left_out)
            routes, prediction = predict.routes, cast(Velocity, predict)
            if edit and edit.repaint is not None:
                prediction = Repainting(predict, edit.latents, noise, edit.repaint)
            noise_at = partial(batch_noise, seeds, model.latent_shape)
            path = walk(sampler, prediction, latents, schedule, noise_at)
        total = len(schedule.timesteps)
        with np.errstate(over="ignore", invalid="ignore"):  # the next line says it better
            for step, found in enumerate(path, start=1):
                if found is None:
                    continue
                latents = found
                require_finite(latents, f"latents of step {step}", self._bundle, self._graphs.engine)
                if callback:
                    require_wanted(callback, step, total, latents)
        return Sample(latents, routes)

    def _on_device(
        self, transformer: Session, course: Course, routes: list[Routes], every_step: bool
    ) -> Iterator[Array | None]:
        """The latents after each step, or None where they are left there: but for the last, unless `every_step`."""
        assert self._bundle.step
        loop = self._graphs.engine.start_loop(transformer, self._graphs.open(self._bundle.step), course)
        for call in range(1, course.ends[-1] + 1):
            loop.advance()
            if (said := loop.routes()) is not None:
                routes.append(said[-course.pictures :])
            if call in course.ends:
                wanted = every_step or call == course.ends[-1]
                yield loop.latents()[-course.pictures :] if wanted else None

    @cached_property
    def _shift(self) -> float:
        """Of a flow's schedule; a diffusion's has none."""
        bundle = self._bundle
        return bundle.schedule_shift if bundle.manifest.model.prediction == "velocity" else 1.0

    def _conditions_of(self, told: Arrays, timesteps: Sequence[float]) -> Conditions:
        """Those of the loop before where they serve: other seeds of the same prompts, mostly."""
        if not self._last or not self._last.serve(told, timesteps):
            graph = partial(self._graphs.open, self._bundle.conditions)
            self._last = Conditions(graph, self._bundle.manifest.model, told, timesteps)
        return self._last
