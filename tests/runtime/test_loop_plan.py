"""Plans of sampling loops that a device runs, and which loops stay on the host."""

from dataclasses import replace

import numpy as np
import pytest

from tpx_runtime import loop_plan
from tpx_runtime.engine import LoopPlan
from tpx_runtime.loop_plan import plan_loop
from tpx_runtime.manifest import ModelSpec
from tpx_runtime.modulation import Conditions
from tpx_runtime.sampling import SAMPLERS_FOR
from tpx_runtime.settings import Settings

from .fakes import CLASSES, MODEL, FakeSession, conditions

rng = np.random.default_rng(4)
LATENTS = rng.standard_normal((2, *MODEL.latent_shape)).astype(np.float32)
CONDITIONING = {
    "context": rng.standard_normal((4, MODEL.context_tokens, MODEL.context_width)).astype(np.float32),
    "pooled": rng.standard_normal((2, MODEL.pooled_width)).astype(np.float32)[[0, 0, 1, 1]],
}
JOB = Settings(
    prompt="a red cube", negative_prompt="", seed=0, steps=4, guidance=3.0, sampler="euler", depth=2
)


def plan(job: Settings, model: ModelSpec = MODEL) -> tuple[LoopPlan | None, Conditions]:
    sampler = SAMPLERS_FOR[model.prediction][job.sampler]
    schedule = sampler.schedule(job.steps, 3.0)
    rows = slice(2, None) if job.guidance == 1 else slice(None)
    conditioning = {"class_id": np.array([7, 7, 1, 1])} if model.classes else CONDITIONING
    conditioning = {name: array[rows] for name, array in conditioning.items()}
    table = Conditions(
        lambda: FakeSession("conditions", conditions(model), []), model, conditioning, schedule.timesteps
    )
    return plan_loop(job, sampler, schedule, LATENTS, conditioning, table, model), table


def test_a_guided_loop_has_both_branches_and_the_conditions_of_each_call() -> None:
    found, table = plan(JOB)
    assert found is not None
    np.testing.assert_array_equal(found.latents, np.concatenate([LATENTS, LATENTS]))
    assert (found.num_images, found.ends, found.prediction) == (2, [1, 2, 3, 4], "velocity")
    assert set(found.context) == {"context"}
    assert found.table_shape == (5, 2, MODEL.conditions_width)
    rows = np.concatenate([conditions(MODEL)(inputs)["conditions"] for inputs in found.condition_calls])
    rows, index = rows.reshape(found.table_shape), found.tables["condition_index"]
    schedule = SAMPLERS_FOR["velocity"]["euler"].schedule(4, 3.0)
    for call, timestep in enumerate(schedule.timesteps):
        np.testing.assert_array_equal(rows[call][index], table.for_timestep(timestep))
    assert {name: value.shape for name, value in found.inputs.items()} == {
        "latents": found.latents.shape,
        "conditions": (4, MODEL.conditions_width),
        "context": CONDITIONING["context"].shape,
    }


def test_without_guidance_there_is_one_row_per_image() -> None:
    found, _ = plan(replace(JOB, guidance=1.0))
    assert found is not None
    np.testing.assert_array_equal(found.latents, LATENTS)
    np.testing.assert_array_equal(found.tables["mix"], np.eye(2))


@pytest.mark.parametrize(
    "settings", [{"guidance_interval": (0.0, 0.9)}, {"guidance_every": 2}, {"cache_interval": 2}]
)
def test_loops_whose_calls_have_different_branches_stay_on_the_host(settings: dict[str, object]) -> None:
    assert plan(replace(JOB, **settings))[0] is None  # type: ignore[arg-type]
    assert plan(replace(JOB, guidance_interval=(0.0, 1.0), guidance_every=1))[0] is not None


def test_samplers_that_add_noise_stay_on_the_host() -> None:
    assert plan(replace(JOB, sampler="ddpm"), CLASSES.model)[0] is None
    assert plan(replace(JOB, sampler="ddim"), CLASSES.model)[0] is not None


def test_loops_too_large_for_the_device_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five slots, each of four rows of latents and two rows of conditions, with four bytes per number."""
    size = 4 * 5 * (4 * LATENTS[0].size + 2 * MODEL.conditions_width)
    monkeypatch.setattr(loop_plan, "MAX_BYTES", size)
    assert plan(JOB)[0] is not None
    monkeypatch.setattr(loop_plan, "MAX_BYTES", size - 1)
    found, table = plan(JOB)
    assert found is None and not table._cached  # no conditions were computed for it
