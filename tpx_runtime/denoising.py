"""The denoising loop of one batch: from noise, or from a noised image, to the decoder's latents."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from .bundle import Bundle
from .editing import Edit, InpaintingPrediction, add_noise, last_steps
from .engine import Arrays, GraphEngine, LoopPlan
from .errors import BadInput, Cancelled, EngineFailed, shorten
from .graphs import Graphs
from .guidance import GuidedPrediction, is_guided, reused_timesteps
from .image_size import format_size
from .loop_plan import plan_loop
from .manifest import Manifest
from .modulation import Conditions
from .noise import batch_noise
from .sampling import SAMPLERS_FOR, TRAIN_TIMESTEPS, Array, Prediction, Sampler, Schedule
from .settings import LOOP_SETTINGS, Settings
from .step_cache import CachedPrediction, cached_timesteps

Trajectory = Generator[Array | None, None, None]  # the latents after each step
Callback = Callable[[int, int, Array], bool | None]  # (step from 1, total steps, latents [B, C, H, W])


def shared_settings(jobs: Sequence[Settings], edit: Edit | None, manifest: Manifest) -> Settings:
    """The first job, after a check that all jobs have the same LOOP_SETTINGS.

    Raises BadInput for no jobs, if they differ, for jobs of another model, and for a strength without an `edit` or the
    reverse.
    """
    if not jobs:
        raise BadInput("expected at least one job, found none")
    for job in jobs:
        job.check(manifest)
    for name in LOOP_SETTINGS:
        first, *others = dict.fromkeys(getattr(job, name) for job in jobs)
        if others:
            raise BadInput(
                f"expected jobs with the same {name}, found {shorten(first)} and {shorten(others[0])}; use one call for each"
            )
    if edit is not None:
        _check_edit(edit, manifest)
    if (jobs[0].strength is None) != (edit is None):
        found = "no strength" if jobs[0].strength is None else "no image"
        raise BadInput(f"expected an input image and a strength, or neither, found {found}")
    return jobs[0]


def _check_edit(edit: Edit, manifest: Manifest) -> None:
    """Raise BadInput for anything but an edit, and for an edit of another image size."""
    if not isinstance(edit, Edit):
        raise BadInput(f"expected an edit that Generator.edit returned, found {shorten(edit)}")
    model, (width, height) = manifest.model, edit.image.size
    if edit.latents.shape != (1, *model.latent_shape) or (height, width) != model.image_size_px:
        raise BadInput(
            f"expected an edit of {format_size(model.image_size_px)} pixels, found one of {width}x{height} with latents "
            f"{list(edit.latents.shape)}; call edit of this generator"
        )


def require_finite(values: Array, what: str, bundle: Bundle, engine: GraphEngine) -> None:
    """Raise EngineFailed if `values` contain NaN or infinity; `what` names them in the message."""
    if not np.isfinite(values).all():
        raise EngineFailed(
            f"expected finite numbers in the {what}, found NaN or infinity from engine {engine.name} at precision "
            f"{bundle.manifest.precision}; try an fp32 bundle, or check this one with tpx-verify"
        )


def invoke_callback(callback: Callback, step: int, total: int, latents: Array) -> None:
    """Call `callback` with a read-only view of the latents. Raises Cancelled if it returns False."""
    read_only = latents.view()
    read_only.flags.writeable = False
    result = callback(step, total, read_only)
    if isinstance(result, bool | np.bool_) and not result:
        raise Cancelled(f"cancelled at step {step} of {total}")


def require_guided(job: Settings, schedule: Schedule) -> None:
    """Raise BadInput if no step is in the guidance interval: guidance and the negative prompt would have no effect."""
    if job.guidance == 1 or any(
        is_guided(at, job.guidance, job.guidance_interval) for at in schedule.timesteps
    ):
        return
    levels = ", ".join(f"{at / TRAIN_TIMESTEPS:.3g}" for at in schedule.timesteps[:6])
    more = ", ..." if len(schedule.timesteps) > 6 else ""
    raise BadInput(
        f"expected a guidance interval that contains one of the steps' noise levels ({levels}{more}), "
        f"found {shorten(job.guidance_interval)}; widen it"
    )


@dataclass(frozen=True)
class Batch:
    """Images that are denoised together: `job` holds their common settings, `noise` [B, C, H, W] belongs to `seeds`.

    `conditioning` is that of both guidance branches, as in GuidedPrediction.
    """

    job: Settings
    seeds: list[int]
    conditioning: Arrays
    schedule: Schedule
    noise: Array
    edit: Edit | None = None

    @property
    def start(self) -> Array:
        """The initial latents [B, C, H, W]."""
        return add_noise(self.edit.latents, self.noise, self.schedule.sigmas[0]) if self.edit else self.noise

    def denoise(self, predict: Prediction, sampler: Sampler) -> Iterator[Array]:
        """Yield the latents [B, C, H, W] after each step."""
        if self.edit and self.edit.latent_mask is not None:
            predict = InpaintingPrediction(predict, self.edit.latents, self.noise, self.edit.latent_mask)
        noise_at = partial(batch_noise, self.seeds, self.noise.shape[1:])
        return sampler.denoise(predict, self.start, self.schedule, noise_at)


class Denoiser:
    """Runs the denoising loop on a bundle's transformer."""

    def __init__(self, bundle: Bundle, graphs: Graphs) -> None:
        self.bundle, self._graphs = bundle, graphs
        self._model = bundle.manifest.model
        self._conditions: Conditions | None = None  # of the previous batch
        self._device_loop_running = False

    def clear_conditions(self) -> None:
        """Discard the cached conditions of the previous batch."""
        self._conditions = None

    def schedule(self, job: Settings) -> Schedule:
        """The schedule of `job`. Raises BadInput if guidance would act at none of its steps."""
        schedule = self.sampler(job).schedule(job.steps, self.bundle.schedule_shift)
        if job.strength is not None:
            schedule = last_steps(schedule, job.strength)
        require_guided(job, schedule)
        return schedule

    def sampler(self, job: Settings) -> Sampler:
        """The sampler that `job` names."""
        return SAMPLERS_FOR[self._model.prediction][job.sampler]

    def __call__(
        self,
        job: Settings,
        seeds: list[int],
        conditioning: Arrays,
        callback: Callback | None,
        edit: Edit | None,
    ) -> Array:
        """The latents [B, C, H, W] of one image per seed, with the settings of `job`; `conditioning` as in GuidedPrediction.

        Raises Cancelled if the callback returns False, EngineFailed if latents are not finite.
        """
        if self._device_loop_running:
            raise BadInput(
                "expected a callback that generates no images during a loop on the device, found one that does; "
                "set TPX_DEVICE_LOOP=0, or use another generator"
            )
        schedule, noise = self.schedule(job), batch_noise(seeds, self._model.latent_shape)
        total, latents = len(schedule.timesteps), noise
        try:
            batch = Batch(job, seeds, conditioning, schedule, noise, edit)
            with (
                closing(self.trajectory(batch, every_step=callback is not None)) as trajectory,
                np.errstate(over="ignore", invalid="ignore"),  # require_finite has the better message
            ):
                for step, current in enumerate(trajectory, start=1):
                    if current is None:
                        continue
                    latents = current
                    require_finite(latents, f"latents of step {step}", self.bundle, self._graphs.engine)
                    if callback:
                        invoke_callback(callback, step, total, latents)
        finally:
            self._device_loop_running = False
        return latents

    def trajectory(self, batch: Batch, every_step: bool) -> Trajectory:
        """Yield the latents [B, C, H, W] after each step.

        It yields None for latents that stay on a device: those of all steps but the last, unless `every_step`.
        """
        job, timesteps, engine = batch.job, batch.schedule.timesteps, self._graphs.engine
        guidance = job.guidance, job.guidance_interval
        cached = cached_timesteps(timesteps, job.cache_interval, *guidance)
        conditions = self._cached_conditions(batch.conditioning, [t for t in timesteps if t not in cached])
        plan = self._loop_plan(batch, conditions)
        if plan:
            self._device_loop_running = True
            yield from self._on_device(job.depth, plan, every_step)
            return
        # Computed before the transformer is opened, so that both graphs need not be in memory at once.
        conditions.for_timestep(timesteps[0])
        transformer = self._graphs.open(self.bundle.transformer(job.depth, engine.variant))
        reused = reused_timesteps(timesteps, *guidance, job.guidance_every)
        predict = GuidedPrediction(
            transformer, self._model, batch.conditioning, conditions, *guidance, reused
        )
        yield from batch.denoise(CachedPrediction(predict, cached), self.sampler(job))

    def _loop_plan(self, batch: Batch, conditions: Conditions) -> LoopPlan | None:
        """The plan of a loop on the device; None if the engine has no device loop or the loop needs the host."""
        masked = batch.edit is not None and batch.edit.latent_mask is not None
        if masked or not self.bundle.step or not self._graphs.engine.device_loops:
            return None
        job, sampler = batch.job, self.sampler(batch.job)
        return plan_loop(
            job, sampler, batch.schedule, batch.start, batch.conditioning, conditions, self._model
        )

    def _on_device(self, depth: int, plan: LoopPlan, every_step: bool) -> Iterator[Array | None]:
        engine, loops = self._graphs.engine, self._graphs.engine.device_loops
        assert loops and self.bundle.step
        # Before the transformer is opened, as on the host.
        step = self._graphs.open(self.bundle.step)
        table = loops.conditions_table(self._graphs.open(self.bundle.conditions), step, plan)
        transformer = self._graphs.open(self.bundle.transformer(depth, engine.variant))
        loop = loops.start_loop(transformer, step, plan, table)
        try:
            for call in range(1, plan.ends[-1] + 1):
                loop.advance()
                if call in plan.ends:
                    download = every_step or call == plan.ends[-1]
                    yield loop.latents()[-plan.num_images :] if download else None
        finally:
            loop.wait()  # also after an interrupt, so that nothing still writes to memory that is used again

    def _cached_conditions(self, conditioning: Arrays, timesteps: Sequence[float]) -> Conditions:
        """The conditions of the previous batch if they match, as for other seeds of the same prompts; else new ones."""
        if not self._conditions or not self._conditions.matches(conditioning, timesteps):
            graph = partial(self._graphs.open, self.bundle.conditions)
            self._conditions = Conditions(graph, self._model, conditioning, timesteps)
        return self._conditions
