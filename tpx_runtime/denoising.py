"""The denoising loop of one batch: from noise, or from a picture with noise, to latents that the decoder takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .editing import Edit, InpaintingPrediction, add_noise, last_steps
from .engine import Arrays, Engine, LoopPlan, Session
from .errors import BadInput, Cancelled, EngineFailed, shorten
from .graphs import Graphs
from .guidance import GuidedPrediction, is_guided, reused
from .loop_plan import plan_loop
from .manifest import Manifest
from .modulation import Conditions
from .noise import batch_noise
from .sampling import SAMPLERS_FOR, TRAIN_TIMESTEPS, Array, Prediction, Sampler, Schedule
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
    """Call `callback` with a view that it cannot change. Raises Cancelled if it returns False; other values continue."""
    shown = latents.view()
    shown.flags.writeable = False
    answer = callback(step, total, shown)
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


@dataclass(frozen=True)
class Batch:
    """Pictures of one loop: `job` stands for all, `conditioning` is that of both branches, as GuidedPrediction takes it.

    `noise` [B, C, H, W] is that of `seeds`.
    """

    job: Settings
    seeds: list[int]
    conditioning: Arrays
    schedule: Schedule
    noise: Array
    edit: Edit | None = None

    @property
    def start(self) -> Array:
        """The latents [B, C, H, W] that the loop starts from."""
        return add_noise(self.edit.latents, self.noise, self.schedule.sigmas[0]) if self.edit else self.noise

    def walk(self, predict: Prediction, sampler: Sampler) -> Iterator[Array]:
        """The latents after each step."""
        if self.edit and self.edit.repaint is not None:
            predict = InpaintingPrediction(predict, self.edit.latents, self.noise, self.edit.repaint)
        noise_at = partial(batch_noise, self.seeds, self.noise.shape[1:])
        return sampler.walk(predict, self.start, self.schedule, noise_at)


class Denoiser:
    """Runs the loop on a bundle's transformer."""

    def __init__(self, bundle: Bundle, graphs: Graphs) -> None:
        self.bundle, self._graphs = bundle, graphs
        self._model = bundle.manifest.model
        self._last: Conditions | None = None
        self._looping = False  # on a device, now

    def forget(self) -> None:
        """Compute the conditions of the next call anew, even if they are those of the last."""
        self._last = None

    def schedule(self, job: Settings) -> Schedule:
        """The steps that `job` takes. Raises BadInput for guidance that would act at none of them."""
        schedule = self.sampler(job).schedule(job.steps, self.bundle.schedule_shift)
        if job.strength is not None:
            schedule = last_steps(schedule, job.strength)
        require_guided(job, schedule)
        return schedule

    def sampler(self, job: Settings) -> Sampler:
        return SAMPLERS_FOR[self._model.prediction][job.sampler]

    def __call__(
        self,
        job: Settings,
        seeds: list[int],
        conditioning: Arrays,
        callback: Callback | None,
        edit: Edit | None,
    ) -> Sample:
        """One picture's latents for each seed; `conditioning` as GuidedPrediction takes it, the rest as `job` says.

        Raises Cancelled when the callback returns False, EngineFailed for latents that are not finite.
        """
        if self._looping:
            raise BadInput(
                "expected a callback that draws nothing while a loop's latents are on the device, found one that does; "
                "unset TPX_DEVICE_LOOP, or take another generator"
            )
        schedule, noise = self.schedule(job), batch_noise(seeds, self._model.latent_shape)
        total, latents = len(schedule.timesteps), noise
        try:
            path, routes = self.path(
                Batch(job, seeds, conditioning, schedule, noise, edit), callback is not None
            )
            with np.errstate(over="ignore", invalid="ignore"):  # require_finite says it better
                for step, found in enumerate(path, start=1):
                    if found is None:
                        continue
                    latents = found
                    require_finite(latents, f"latents of step {step}", self.bundle, self._graphs.engine)
                    if callback:
                        require_wanted(callback, step, total, latents)
        finally:
            self._looping = False
        return Sample(latents, routes)

    def path(self, batch: Batch, every_step: bool) -> tuple[Iterator[Array | None], list[Routes]]:
        """The latents after each step, and a list that the routes of each call are added to.

        None stands for latents that are left on a device: those of any step but the last, unless `every_step`.
        """
        job, schedule, engine = batch.job, batch.schedule, self._graphs.engine
        conditions = self._conditions_of(batch.conditioning, schedule.timesteps)
        conditions.at(schedule.timesteps[0])  # before the transformer is opened, so that either may be let go
        plan = self._loop_plan(batch, conditions)
        transformer = self._graphs.open(self.bundle.transformer(job.depth, engine.variant))
        if plan:
            routes: list[Routes] = []
            self._looping = True
            return self._on_device(transformer, plan, routes, every_step), routes
        guidance = job.guidance, job.guidance_interval
        left_out = reused(schedule.timesteps, *guidance, job.guidance_every)
        predict = GuidedPrediction(
            transformer, self._model, batch.conditioning, conditions, *guidance, left_out
        )
        return batch.walk(predict, self.sampler(job)), predict.routes

    def _loop_plan(self, batch: Batch, conditions: Conditions) -> LoopPlan | None:
        """What a device is to do by itself; None where the engine has none, or the loop needs the host."""
        masked = batch.edit is not None and batch.edit.repaint is not None
        if masked or not self.bundle.step or not self._graphs.engine.uses_device_loop:
            return None
        job, sampler = batch.job, self.sampler(batch.job)
        return plan_loop(
            job, sampler, batch.schedule, batch.start, batch.conditioning, conditions, self._model
        )

    def _on_device(
        self, transformer: Session, plan: LoopPlan, routes: list[Routes], every_step: bool
    ) -> Iterator[Array | None]:
        assert self.bundle.step
        loop = self._graphs.engine.start_loop(transformer, self._graphs.open(self.bundle.step), plan)
        for call in range(1, plan.ends[-1] + 1):
            loop.advance()
            if (found := loop.routes()) is not None:
                routes.append(found[-plan.num_images :])
            if call in plan.ends:
                wanted = every_step or call == plan.ends[-1]
                yield loop.latents()[-plan.num_images :] if wanted else None

    def _conditions_of(self, conditioning: Arrays, timesteps: Sequence[float]) -> Conditions:
        """Those of the loop before where they serve: other seeds of the same prompts, mostly."""
        if not self._last or not self._last.serve(conditioning, timesteps):
            graph = partial(self._graphs.open, self.bundle.conditions)
            self._last = Conditions(graph, self._model, conditioning, timesteps)
        return self._last
