"""Plans a denoising loop in advance, for engines that keep the latents on the device."""

import math

import numpy as np

from .engine import Arrays, LoopPlan
from .guidance import guidance_matrix, is_guided, reused_timesteps
from .manifest import ModelSpec
from .modulation import Conditions
from .sampling import Array, Sampler, Schedule
from .sampling.recurrence import recurrence
from .settings import Settings
from .step_cache import cached_timesteps

MAX_BYTES = 1 << 30  # of device memory for the history and the conditions of a loop


def plan_loop(
    job: Settings,
    sampler: Sampler,
    schedule: Schedule,
    latents: Array,
    conditioning: Arrays,
    conditions: Conditions,
    model: ModelSpec,
) -> LoopPlan | None:
    """The plan of a loop from `latents` [B, C, H, W]; None if the loop cannot run on the device.

    It cannot with a stochastic sampler, with guidance that is not computed at every step, with cached steps, or if it would
    take more than MAX_BYTES of device memory.
    """
    guidance = job.guidance, job.guidance_interval
    uniform = job.guidance == 1 or all(is_guided(t, *guidance) for t in schedule.timesteps)
    cached = cached_timesteps(schedule.timesteps, job.cache_interval, *guidance)
    if not uniform or cached or reused_timesteps(schedule.timesteps, *guidance, job.guidance_every):
        return None
    found = recurrence(sampler, schedule)
    if found is None:
        return None
    slots, rows = len(found.weights), len(latents) * (1 if job.guidance == 1 else 2)
    table_shape = slots, conditions.num_distinct, model.conditions_width
    if 4 * (slots * rows * latents[0].size + math.prod(table_shape)) > MAX_BYTES:
        return None
    last = found.timesteps[-1]  # repeated to fill the last row, which is never read
    tables: Arrays = {
        "slot_indices": np.arange(slots, dtype=np.int64).reshape(-1, 1, 1, 1, 1),
        "weights": found.weights,
        "mix": guidance_matrix(job.guidance, len(latents)),
        "condition_index": conditions.index,
    }
    context = {name: conditioning[name] for name in model.transformer_inputs if name in conditioning}
    repeated = np.concatenate([latents] * (rows // len(latents)))
    return LoopPlan(
        num_images=len(latents),
        latents=repeated,
        condition_calls=list(conditions.calls([*found.timesteps, last])),
        table_shape=table_shape,
        context=context,
        tables=tables,
        ends=found.ends,
        prediction=model.prediction,
    )
