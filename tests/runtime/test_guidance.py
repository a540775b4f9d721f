"""Classifier-free guidance: both branches in one call, and the formula."""

import numpy as np
import pytest

from tpx_runtime.engine import Arrays
from tpx_runtime.errors import EngineFailed
from tpx_runtime.guidance import GuidedPrediction, guide

from .fakes import CLASSES, MODEL, FakeSession, transformer

rng = np.random.default_rng(3)


def told(batch: int) -> Arrays:
    context = rng.standard_normal((batch, MODEL.context_tokens, MODEL.context_width))
    pooled = rng.standard_normal((batch, MODEL.pooled_width))
    return {"context": context.astype(np.float32), "pooled": pooled.astype(np.float32)}


PROMPT, NEGATIVE = told(2), told(2)
LATENTS = rng.standard_normal((2, *MODEL.latent_shape)).astype(np.float32)


def branch(said: Arrays, timestep: float) -> Arrays:
    return transformer(2)({"latents": LATENTS, "timestep": np.full(2, timestep, np.float32), **said})


def test_both_branches_go_through_one_call_negative_first() -> None:
    session = FakeSession("transformer", transformer(2), [])
    velocity = GuidedPrediction(session, MODEL, PROMPT, NEGATIVE, 3.0)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    np.testing.assert_array_equal(inputs["latents"], np.concatenate([LATENTS, LATENTS]))
    np.testing.assert_array_equal(inputs["timestep"], np.full(4, 400, np.float32))
    assert inputs["timestep"].dtype == np.float32
    for name in ("context", "pooled"):
        np.testing.assert_array_equal(inputs[name], np.concatenate([NEGATIVE[name], PROMPT[name]]))
    away, towards = branch(NEGATIVE, 400)["velocity"], branch(PROMPT, 400)["velocity"]
    np.testing.assert_allclose(velocity, away + 3.0 * (towards - away), rtol=1e-5, atol=1e-6)
    assert velocity.dtype == np.float32


def test_without_a_negative_branch_the_batch_is_single() -> None:
    session = FakeSession("transformer", transformer(2), [])
    velocity = GuidedPrediction(session, MODEL, PROMPT, None, 1.0)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    assert len(inputs["latents"]) == len(inputs["context"]) == 2
    np.testing.assert_array_equal(velocity, branch(PROMPT, 400)["velocity"])


def test_guidance_acts_on_the_first_channels_and_the_others_are_the_prompts() -> None:
    """As DiT's sampling does it: three of four channels of epsilon, and no channel of the variance."""
    model = CLASSES.model
    session = FakeSession("transformer", transformer(1, model), [])
    classes, nothing = {"class_id": np.array([3, 5])}, {"class_id": np.array([13, 13])}
    found = GuidedPrediction(session, model, classes, nothing, 4.0)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    np.testing.assert_array_equal(inputs["class_id"], [13, 13, 3, 5])
    away, towards = (
        transformer(1, model)({"latents": LATENTS, "timestep": np.full(2, 400, np.float32), **said})[
            "epsilon"
        ]
        for said in (nothing, classes)
    )
    assert found.shape == (2, 8, 2, 3)
    np.testing.assert_allclose(found[:, :3], (away + 4.0 * (towards - away))[:, :3], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[:, 3:], towards[:, 3:])
    assert np.abs(found[:, 3] - (away + 4.0 * (towards - away))[:, 3]).max() > 0.1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_guide_leaves_dtype_and_inputs_alone(channels: int) -> None:
    negative, prompt = LATENTS[:1].copy(), LATENTS[1:].copy()
    guided = guide(negative, prompt, 2.5, channels)
    assert guided.dtype == np.float32
    np.testing.assert_array_equal(guided[:, channels:], prompt[:, channels:])
    np.testing.assert_array_equal(negative, LATENTS[:1])
    np.testing.assert_array_equal(prompt, LATENTS[1:])


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_routes_are_those_of_the_prompt_for_every_call(negative: Arrays | None) -> None:
    def run(inputs: Arrays) -> Arrays:
        said = np.round(inputs["context"][:, :1, :1] * 1000).astype(np.int64)
        return {"velocity": inputs["latents"], "routes": said}

    guided = GuidedPrediction(FakeSession("transformer", run, []), MODEL, PROMPT, negative, 3.0)
    guided(LATENTS, 400.0)
    guided(LATENTS, 200.0)
    expected = np.round(PROMPT["context"][:, :1, :1] * 1000).astype(np.int64)
    assert len(guided.routes) == 2
    np.testing.assert_array_equal(guided.routes[1], expected)


def test_a_model_that_does_not_think_has_no_routes() -> None:
    session = FakeSession("transformer", lambda inputs: {"velocity": inputs["latents"]}, [])
    guided = GuidedPrediction(session, MODEL, PROMPT, NEGATIVE, 3.0)
    guided(LATENTS, 400.0)
    assert guided.routes == []


@pytest.mark.parametrize(
    "outputs", [{}, {"velocity": LATENTS[:1]}, {"velocity": LATENTS}, {"velocity": LATENTS[:, :, :1]}]
)
def test_a_velocity_of_another_shape_is_not_broadcast(outputs: Arrays) -> None:
    session = FakeSession("transformer", lambda inputs: outputs, [])
    with pytest.raises(EngineFailed, match=r"expected an output velocity of shape \(4, 4, 2, 3\), found "):
        GuidedPrediction(session, MODEL, PROMPT, NEGATIVE, 3.0)(LATENTS, 400.0)


def test_an_epsilon_without_its_variance_is_refused() -> None:
    session = FakeSession("transformer", lambda inputs: {"epsilon": inputs["latents"]}, [])
    classes = {"class_id": np.array([3, 5])}
    with pytest.raises(EngineFailed, match=r"expected an output epsilon of shape \(2, 8, 2, 3\), found "):
        GuidedPrediction(session, CLASSES.model, classes, None, 1.0)(LATENTS, 400.0)
