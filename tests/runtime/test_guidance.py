"""Classifier-free guidance: both branches in one call, and the formula."""

import numpy as np
import pytest

from tpx_runtime.engine import Arrays
from tpx_runtime.errors import EngineFailed
from tpx_runtime.guidance import GuidedPrediction, apply_guidance, guidance_matrix, reused_timesteps
from tpx_runtime.manifest import ModelSpec
from tpx_runtime.modulation import Conditions
from tpx_runtime.sampling import Array

from .fakes import CLASSES, MODEL, FakeSession, conditions, transformer

rng = np.random.default_rng(3)


def random_conditioning(batch: int) -> Arrays:
    context = rng.standard_normal((batch, MODEL.context_tokens, MODEL.context_width))
    pooled = rng.standard_normal((batch, MODEL.pooled_width))
    return {"context": context.astype(np.float32), "pooled": pooled.astype(np.float32)}


PROMPT, NEGATIVE = random_conditioning(2), random_conditioning(2)
BOTH = {name: np.concatenate([NEGATIVE[name], PROMPT[name]]) for name in PROMPT}
LATENTS = rng.standard_normal((2, *MODEL.latent_shape)).astype(np.float32)


def guided_prediction(
    session: FakeSession,
    conditioning: Arrays,
    guidance: float,
    model: ModelSpec = MODEL,
    interval: tuple[float, float] = (0.0, 1.0),
    reused: frozenset[float] = frozenset(),
) -> GuidedPrediction:
    table = Conditions(lambda: FakeSession("conditions", conditions(model), []), model, conditioning)
    return GuidedPrediction(session, model, conditioning, table, guidance, interval, reused)


def branch_prediction(conditioning: Arrays, model: ModelSpec = MODEL, depth: int = 2) -> Array:
    rows = conditions(model)({"timestep": np.full(2, 400, np.float32), **conditioning})
    return transformer(depth, model)({"latents": LATENTS, **conditioning, **rows})[model.prediction]


def test_both_branches_run_in_one_call_with_the_negative_first() -> None:
    session = FakeSession("transformer", transformer(2), [])
    velocity = guided_prediction(session, BOTH, 3.0)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    assert set(inputs) == {"latents", "conditions", "context"}
    np.testing.assert_array_equal(inputs["latents"], np.concatenate([LATENTS, LATENTS]))
    np.testing.assert_array_equal(inputs["context"], BOTH["context"])
    times = {"timestep": np.full(4, 400, np.float32)}
    np.testing.assert_array_equal(inputs["conditions"], conditions()({**BOTH, **times})["conditions"])
    uncond, cond = branch_prediction(NEGATIVE), branch_prediction(PROMPT)
    np.testing.assert_allclose(velocity, uncond + 3.0 * (cond - uncond), rtol=1e-5, atol=1e-6)
    assert velocity.dtype == np.float32


def test_guidance_matrix_gives_each_row_the_guided_sum_of_its_image() -> None:
    rows = rng.standard_normal((4, *MODEL.latent_shape)).astype(np.float32)
    found = np.tensordot(guidance_matrix(3.5, 2), rows, 1)
    expected = apply_guidance(rows[:2], rows[2:], 3.5, MODEL.guided_channels)
    np.testing.assert_allclose(found, np.concatenate([expected, expected]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(guidance_matrix(1.0, 3), np.eye(3, dtype=np.float32))


def test_guidance_one_runs_only_the_prompt_branch() -> None:
    session = FakeSession("transformer", transformer(2), [])
    velocity = guided_prediction(session, PROMPT, 1.0)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    assert len(inputs["latents"]) == len(inputs["context"]) == 2
    np.testing.assert_array_equal(velocity, branch_prediction(PROMPT))


def test_guidance_applies_only_to_the_first_channels() -> None:
    """As in DiT's sampling: three of four channels of epsilon and no channel of the variance are guided."""
    model = CLASSES.model
    session = FakeSession("transformer", transformer(1, model), [])
    found = guided_prediction(session, {"class_id": np.array([13, 13, 3, 5])}, 4.0, model)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    assert set(inputs) == {"latents", "conditions"}
    uncond, cond = (
        branch_prediction({"class_id": np.array(classes)}, model, 1) for classes in ([13, 13], [3, 5])
    )
    assert found.shape == (2, 8, 2, 3)
    np.testing.assert_allclose(found[:, :3], (uncond + 4.0 * (cond - uncond))[:, :3], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[:, 3:], cond[:, 3:])
    assert np.abs(found[:, 3] - (uncond + 4.0 * (cond - uncond))[:, 3]).max() > 0.1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_apply_guidance_keeps_the_dtype_and_does_not_change_its_inputs(channels: int) -> None:
    negative, prompt = LATENTS[:1].copy(), LATENTS[1:].copy()
    guided = apply_guidance(negative, prompt, 2.5, channels)
    assert guided.dtype == np.float32
    np.testing.assert_array_equal(guided[:, channels:], prompt[:, channels:])
    np.testing.assert_array_equal(negative, LATENTS[:1])
    np.testing.assert_array_equal(prompt, LATENTS[1:])


@pytest.mark.parametrize(
    ("timestep", "guided"), [(601, False), (600, True), (400, True), (200, True), (199, False)]
)
def test_outside_the_interval_only_the_prompt_branch_runs(timestep: float, guided: bool) -> None:
    session = FakeSession("transformer", transformer(2), [])
    found = guided_prediction(session, BOTH, 3.0, interval=(0.2, 0.6))(LATENTS, timestep)
    ((_, inputs),) = session.calls
    reference = FakeSession("transformer", transformer(2), [])
    conditioning = BOTH if guided else PROMPT
    np.testing.assert_array_equal(
        found, guided_prediction(reference, conditioning, 3.0 if guided else 1.0)(LATENTS, timestep)
    )
    for name, array in reference.calls[0][1].items():
        np.testing.assert_array_equal(inputs[name], array)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, set()),
        (2, {500.0, 300.0, 100.0}),
        (3, {500.0, 400.0, 200.0, 100.0}),
        (4, {500.0, 400.0, 300.0, 100.0}),
        (99, {500.0, 400.0, 300.0, 200.0, 100.0}),
    ],
)
def test_after_two_fifths_of_the_steps_every_nth_runs_both_branches(every: int, expected: set[float]) -> None:
    timesteps = [900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0]
    assert reused_timesteps(timesteps, 3.0, (0.0, 1.0), every) == expected


def test_the_two_fifths_count_guided_steps_and_are_at_least_one() -> None:
    timesteps = [900.0, 700.0, 500.0, 300.0]
    assert reused_timesteps(timesteps, 3.0, (0.0, 0.8), 2) == {300.0}
    assert reused_timesteps(timesteps, 3.0, (0.0, 0.6), 2) == {300.0}
    assert reused_timesteps(timesteps[:1], 3.0, (0.0, 1.0), 2) == frozenset()
    assert reused_timesteps(timesteps, 3.0, (0.2, 0.4), 2) == frozenset()
    assert reused_timesteps(timesteps, 1.0, (0.0, 1.0), 2) == frozenset()


def test_a_reusing_step_runs_the_prompt_branch_and_adds_the_last_difference() -> None:
    def run(inputs: Arrays) -> Arrays:  # the difference of the branches depends on the latents
        return {"velocity": inputs["latents"] * inputs["context"][:, :1, :1, None]}

    session = FakeSession("transformer", run, [])
    prediction = guided_prediction(session, BOTH, 3.0, reused=frozenset({300.0, 100.0}))
    latents_at = {400.0: LATENTS, 300.0: 0.7 * LATENTS, 200.0: 0.5 * LATENTS, 100.0: 0.2 * LATENTS}
    found = {timestep: prediction(x, timestep) for timestep, x in latents_at.items()}
    assert [len(inputs["latents"]) for _, inputs in session.calls] == [4, 2, 4, 2]
    cond, uncond = (conditioning["context"][:, :1, :1, None] for conditioning in (PROMPT, NEGATIVE))
    for timestep, source in ((400.0, 400.0), (300.0, 400.0), (200.0, 200.0), (100.0, 200.0)):
        expected = latents_at[timestep] * cond + 2.0 * latents_at[source] * (cond - uncond)
        np.testing.assert_allclose(found[timestep], expected, rtol=1e-5, atol=1e-5)


def test_a_reused_difference_applies_only_to_guided_channels() -> None:
    model, conditioning = CLASSES.model, {"class_id": np.array([13, 13, 3, 5])}
    session = FakeSession("transformer", transformer(1, model), [])
    prediction = guided_prediction(session, conditioning, 4.0, model, reused=frozenset({300.0}))
    prediction(LATENTS, 400.0)
    found = prediction(LATENTS, 300.0)
    prompt_only = guided_prediction(
        FakeSession("transformer", transformer(1, model), []), {"class_id": np.array([3, 5])}, 1.0, model
    )
    np.testing.assert_array_equal(found[:, 3:], prompt_only(LATENTS, 300.0)[:, 3:])
    assert np.abs(found[:, :3] - prompt_only(LATENTS, 300.0)[:, :3]).max() > 0.1


def test_an_unchanged_input_is_the_same_array_object() -> None:
    """So that an engine on a device need neither compare it nor upload it again."""
    contexts = []

    def run(inputs: Arrays) -> Arrays:
        contexts.append(inputs["context"])
        return transformer(2)(inputs)

    prediction = guided_prediction(FakeSession("transformer", run, []), BOTH, 3.0, interval=(0.0, 0.5))
    for timestep in (900.0, 800.0, 400.0, 300.0):
        prediction(LATENTS, timestep)
    first, second, third, fourth = contexts
    assert first is second and third is fourth


@pytest.mark.parametrize(
    "outputs", [{}, {"velocity": LATENTS[:1]}, {"velocity": LATENTS}, {"velocity": LATENTS[:, :, :1]}]
)
def test_rejects_a_velocity_of_the_wrong_shape(outputs: Arrays) -> None:
    session = FakeSession("transformer", lambda inputs: outputs, [])
    with pytest.raises(EngineFailed, match=r"expected an output velocity of shape \(4, 4, 2, 3\), found "):
        guided_prediction(session, BOTH, 3.0)(LATENTS, 400.0)


def test_rejects_an_epsilon_without_its_variance() -> None:
    session = FakeSession("transformer", lambda inputs: {"epsilon": inputs["latents"]}, [])
    with pytest.raises(EngineFailed, match=r"expected an output epsilon of shape \(2, 8, 2, 3\), found "):
        guided_prediction(session, {"class_id": np.array([3, 5])}, 1.0, CLASSES.model)(LATENTS, 400.0)
