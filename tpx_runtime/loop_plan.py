"""Plans a denoising loop in advance, for a device that its latents do not leave."""

import numpy as np

from .engine import Arrays, LoopPlan
from .guidance import is_guided, mixing, reused
from .manifest import ModelSpec
from .modulation import Conditions
from .sampling import Array, Sampler, Schedule
from .sampling.recurrence import recurrence
from .settings import Settings

MOST_BYTES = 1 << 30  # of what a device keeps for it


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

    It cannot with a stochastic sampler, with guidance that is not applied at every step, or if the device would have to hold
    more than MOST_BYTES.
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
    last = found.timesteps[-1]  # again: nobody reads the conditions after the last call
    table, row = conditions.table([*found.timesteps, last])
    tables: Arrays = {
        "places": np.arange(slots).reshape(-1, 1, 1, 1, 1),
        "weights": found.weights,
        "mix": mixing(job.guidance, len(latents)),
        "table": table,
        "told": row,
    }
    context = {name: conditioning[name] for name in model.transformer_inputs if name in conditioning}
    repeated = np.concatenate([latents] * (rows // len(latents)))
    return LoopPlan(len(latents), repeated, context, tables, found.ends, model.prediction)
