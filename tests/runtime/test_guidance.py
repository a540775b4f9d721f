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


def told(batch: int) -> Arrays:
    context = rng.standard_normal((batch, MODEL.context_tokens, MODEL.context_width))
    pooled = rng.standard_normal((batch, MODEL.pooled_width))
    return {"context": context.astype(np.float32), "pooled": pooled.astype(np.float32)}


PROMPT, NEGATIVE = told(2), told(2)
BOTH = {name: np.concatenate([NEGATIVE[name], PROMPT[name]]) for name in PROMPT}
LATENTS = rng.standard_normal((2, *MODEL.latent_shape)).astype(np.float32)


def guided_by(
    session: FakeSession,
    said: Arrays,
    guidance: float,
    model: ModelSpec = MODEL,
    interval: tuple[float, float] = (0.0, 1.0),
    left_out: frozenset[float] = frozenset(),
) -> GuidedPrediction:
    table = Conditions(lambda: FakeSession("conditions", conditions(model), []), model, said)
    return GuidedPrediction(session, model, said, table, guidance, interval, left_out)


def branch(said: Arrays, model: ModelSpec = MODEL, depth: int = 2) -> Array:
    made = conditions(model)({"timestep": np.full(2, 400, np.float32), **said})
    return transformer(depth, model)({"latents": LATENTS, **said, **made})[model.prediction]


def test_both_branches_go_through_one_call_negative_first() -> None:
    session = FakeSession("transformer", transformer(2), [])
    velocity = guided_by(session, BOTH, 3.0)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    assert set(inputs) == {"latents", "conditions", "context"}
    np.testing.assert_array_equal(inputs["latents"], np.concatenate([LATENTS, LATENTS]))
    np.testing.assert_array_equal(inputs["context"], BOTH["context"])
    times = {"timestep": np.full(4, 400, np.float32)}
    np.testing.assert_array_equal(inputs["conditions"], conditions()({**BOTH, **times})["conditions"])
    away, towards = branch(NEGATIVE), branch(PROMPT)
    np.testing.assert_allclose(velocity, away + 3.0 * (towards - away), rtol=1e-5, atol=1e-6)
    assert velocity.dtype == np.float32


def test_as_a_matrix_it_gives_each_row_its_image_s_guided_sum() -> None:
    rows = rng.standard_normal((4, *MODEL.latent_shape)).astype(np.float32)
    found = np.tensordot(guidance_matrix(3.5, 2), rows, 1)
    expected = apply_guidance(rows[:2], rows[2:], 3.5, MODEL.guided_channels)
    np.testing.assert_allclose(found, np.concatenate([expected, expected]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(guidance_matrix(1.0, 3), np.eye(3, dtype=np.float32))


def test_without_a_negative_branch_the_batch_is_single() -> None:
    session = FakeSession("transformer", transformer(2), [])
    velocity = guided_by(session, PROMPT, 1.0)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    assert len(inputs["latents"]) == len(inputs["context"]) == 2
    np.testing.assert_array_equal(velocity, branch(PROMPT))


def test_guidance_acts_on_the_first_channels_and_the_others_are_the_prompts() -> None:
    """As DiT's sampling does it: three of four channels of epsilon, and no channel of the variance."""
    model = CLASSES.model
    session = FakeSession("transformer", transformer(1, model), [])
    found = guided_by(session, {"class_id": np.array([13, 13, 3, 5])}, 4.0, model)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    assert set(inputs) == {"latents", "conditions"}
    away, towards = (branch({"class_id": np.array(one)}, model, 1) for one in ([13, 13], [3, 5]))
    assert found.shape == (2, 8, 2, 3)
    np.testing.assert_allclose(found[:, :3], (away + 4.0 * (towards - away))[:, :3], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[:, 3:], towards[:, 3:])
    assert np.abs(found[:, 3] - (away + 4.0 * (towards - away))[:, 3]).max() > 0.1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_guide_leaves_dtype_and_inputs_alone(channels: int) -> None:
    negative, prompt = LATENTS[:1].copy(), LATENTS[1:].copy()
    guided = apply_guidance(negative, prompt, 2.5, channels)
    assert guided.dtype == np.float32
    np.testing.assert_array_equal(guided[:, channels:], prompt[:, channels:])
    np.testing.assert_array_equal(negative, LATENTS[:1])
    np.testing.assert_array_equal(prompt, LATENTS[1:])


@pytest.mark.parametrize(
    ("timestep", "guided"), [(601, False), (600, True), (400, True), (200, True), (199, False)]
)
def test_outside_the_interval_the_prompt_is_asked_alone(timestep: float, guided: bool) -> None:
    session = FakeSession("transformer", transformer(2), [])
    found = guided_by(session, BOTH, 3.0, interval=(0.2, 0.6))(LATENTS, timestep)
    ((_, inputs),) = session.calls
    alone = FakeSession("transformer", transformer(2), [])
    said = BOTH if guided else PROMPT
    np.testing.assert_array_equal(found, guided_by(alone, said, 3.0 if guided else 1.0)(LATENTS, timestep))
    for name, array in alone.calls[0][1].items():
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
def test_after_two_fifths_of_the_steps_each_nth_has_both_branches(every: int, expected: set[float]) -> None:
    timesteps = [900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0]
    assert reused_timesteps(timesteps, 3.0, (0.0, 1.0), every) == expected


def test_the_two_fifths_are_of_the_guided_steps_and_one_at_least() -> None:
    timesteps = [900.0, 700.0, 500.0, 300.0]
    assert reused_timesteps(timesteps, 3.0, (0.0, 0.8), 2) == {300.0}
    assert reused_timesteps(timesteps, 3.0, (0.0, 0.6), 2) == {300.0}
    assert reused_timesteps(timesteps[:1], 3.0, (0.0, 1.0), 2) == frozenset()
    assert reused_timesteps(timesteps, 3.0, (0.2, 0.4), 2) == frozenset()
    assert reused_timesteps(timesteps, 1.0, (0.0, 1.0), 2) == frozenset()


def test_a_step_that_reuses_asks_for_the_prompt_and_adds_the_last_difference() -> None:
    def run(inputs: Arrays) -> Arrays:  # what the branches differ by depends on the latents
        return {"velocity": inputs["latents"] * inputs["context"][:, :1, :1, None]}

    session = FakeSession("transformer", run, [])
    prediction = guided_by(session, BOTH, 3.0, left_out=frozenset({300.0, 100.0}))
    walk = {400.0: LATENTS, 300.0: 0.7 * LATENTS, 200.0: 0.5 * LATENTS, 100.0: 0.2 * LATENTS}
    found = {at: prediction(x, at) for at, x in walk.items()}
    assert [len(inputs["latents"]) for _, inputs in session.calls] == [4, 2, 4, 2]
    towards, away = (said["context"][:, :1, :1, None] for said in (PROMPT, NEGATIVE))
    for at, source in ((400.0, 400.0), (300.0, 400.0), (200.0, 200.0), (100.0, 200.0)):
        expected = walk[at] * towards + 2.0 * walk[source] * (towards - away)
        np.testing.assert_allclose(found[at], expected, rtol=1e-5, atol=1e-5)


def test_a_reused_difference_leaves_channels_without_guidance_alone() -> None:
    model, said = CLASSES.model, {"class_id": np.array([13, 13, 3, 5])}
    session = FakeSession("transformer", transformer(1, model), [])
    prediction = guided_by(session, said, 4.0, model, left_out=frozenset({300.0}))
    prediction(LATENTS, 400.0)
    found = prediction(LATENTS, 300.0)
    alone = guided_by(
        FakeSession("transformer", transformer(1, model), []), {"class_id": np.array([3, 5])}, 1.0, model
    )
    np.testing.assert_array_equal(found[:, 3:], alone(LATENTS, 300.0)[:, 3:])
    assert np.abs(found[:, :3] - alone(LATENTS, 300.0)[:, :3]).max() > 0.1


def test_an_array_that_does_not_change_is_one_object() -> None:
    """An engine on a device need not compare, nor upload, what it was given before."""
    contexts = []

    def run(inputs: Arrays) -> Arrays:
        contexts.append(inputs["context"])
        return transformer(2)(inputs)

    prediction = guided_by(FakeSession("transformer", run, []), BOTH, 3.0, interval=(0.0, 0.5))
    for timestep in (900.0, 800.0, 400.0, 300.0):
        prediction(LATENTS, timestep)
    first, second, third, fourth = contexts
    assert first is second and third is fourth


@pytest.mark.parametrize(("said", "guidance"), [(PROMPT, 1.0), (BOTH, 3.0)])
def test_routes_are_those_of_the_prompt_for_every_call(said: Arrays, guidance: float) -> None:
    def run(inputs: Arrays) -> Arrays:
        routes = np.round(inputs["context"][:, :1, :1] * 1000).astype(np.int64)
        return {"velocity": inputs["latents"], "routes": routes}

    guided = guided_by(FakeSession("transformer", run, []), said, guidance)
    guided(LATENTS, 400.0)
    guided(LATENTS, 200.0)
    expected = np.round(PROMPT["context"][:, :1, :1] * 1000).astype(np.int64)
    assert len(guided.routes) == 2
    np.testing.assert_array_equal(guided.routes[1], expected)


def test_a_model_that_does_not_think_has_no_routes() -> None:
    session = FakeSession("transformer", lambda inputs: {"velocity": inputs["latents"]}, [])
    guided = guided_by(session, BOTH, 3.0)
    guided(LATENTS, 400.0)
    assert guided.routes == []


@pytest.mark.parametrize(
    "outputs", [{}, {"velocity": LATENTS[:1]}, {"velocity": LATENTS}, {"velocity": LATENTS[:, :, :1]}]
)
def test_a_velocity_of_another_shape_is_not_broadcast(outputs: Arrays) -> None:
    session = FakeSession("transformer", lambda inputs: outputs, [])
    with pytest.raises(EngineFailed, match=r"expected an output velocity of shape \(4, 4, 2, 3\), found "):
        guided_by(session, BOTH, 3.0)(LATENTS, 400.0)


def test_an_epsilon_without_its_variance_is_refused() -> None:
    session = FakeSession("transformer", lambda inputs: {"epsilon": inputs["latents"]}, [])
    with pytest.raises(EngineFailed, match=r"expected an output epsilon of shape \(2, 8, 2, 3\), found "):
        guided_by(session, {"class_id": np.array([3, 5])}, 1.0, CLASSES.model)(LATENTS, 400.0)
