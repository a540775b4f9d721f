"""What a denoising loop is to do, all told ahead, for a device that its latents do not leave."""

import numpy as np

from .engine import Arrays, Course
from .guidance import is_guided, mixing, reused
from .manifest import ModelSpec
from .modulation import Conditions
from .sampling import Array, Sampler, Schedule
from .sampling.recurrence import recurrence
from .settings import Settings

MOST_BYTES = 1 << 30  # of what a device keeps for it


def course_of(
    job: Settings,
    sampler: Sampler,
    schedule: Schedule,
    latents: Array,
    told: Arrays,
    conditions: Conditions,
    model: ModelSpec,
) -> Course | None:
    """The course from `latents` [B, C, H, W]; None where the host has to have a hand in it.

    It has where a sampler adds noise, where calls differ in their branches (as an interval of guidance, or guidance at
    every few steps, makes them), and where a device would have to keep more than MOST_BYTES.
    """
    guidance = job.guidance, job.guidance_interval
    alike = job.guidance == 1 or all(is_guided(at, *guidance) for at in schedule.timesteps)
    if not alike or reused(schedule.timesteps, *guidance, job.guidance_every):
        return None
    found = recurrence(sampler, schedule)
    if found is None:
        return None
    slots, rows = len(found.weights), len(latents) * (1 if job.guidance == 1 else 2)
    if 4 * slots * (rows * latents[0].size + conditions.distinct * model.conditions_width) > MOST_BYTES:
        return None
    last = found.timesteps[-1]  # again, for nobody reads what is told after the last call
    table, row = conditions.table([*found.timesteps, last])
    tables: Arrays = {
        "places": np.arange(slots).reshape(-1, 1, 1, 1, 1),
        "weights": found.weights,
        "mix": mixing(job.guidance, len(latents)),
        "table": table,
        "told": row,
    }
    context = {name: told[name] for name in model.transformer_inputs if name in told}
    repeated = np.concatenate([latents] * (rows // len(latents)))
    return Course(len(latents), repeated, context, tables, found.ends, model.prediction)
