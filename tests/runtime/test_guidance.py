"""Classifier-free guidance: both branches in one call, and the formula."""

import numpy as np
import pytest

from tpx_runtime.engine import Arrays
from tpx_runtime.errors import EngineFailed
from tpx_runtime.guidance import Conditioning, GuidedVelocity

from .fakes import MODEL, FakeSession, transformer

rng = np.random.default_rng(3)


def conditioning(batch: int) -> Conditioning:
    context = rng.standard_normal((batch, MODEL.text_tokens, MODEL.context_width)).astype(np.float32)
    return Conditioning(context, rng.standard_normal((batch, MODEL.pooled_width)).astype(np.float32))


PROMPT, NEGATIVE = conditioning(2), conditioning(2)
LATENTS = rng.standard_normal((2, *MODEL.latent_shape)).astype(np.float32)


def branch(said: Conditioning, timestep: float) -> Arrays:
    times = np.full(2, timestep, np.float32)
    return transformer(2)(
        {"latents": LATENTS, "timestep": times, "context": said.context, "pooled": said.pooled}
    )


def test_both_branches_go_through_one_call_negative_first() -> None:
    session = FakeSession("transformer", transformer(2), [])
    velocity = GuidedVelocity(session, PROMPT, NEGATIVE, 3.0)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    np.testing.assert_array_equal(inputs["latents"], np.concatenate([LATENTS, LATENTS]))
    np.testing.assert_array_equal(inputs["timestep"], np.full(4, 400, np.float32))
    assert inputs["timestep"].dtype == np.float32
    np.testing.assert_array_equal(inputs["context"], np.concatenate([NEGATIVE.context, PROMPT.context]))
    np.testing.assert_array_equal(inputs["pooled"], np.concatenate([NEGATIVE.pooled, PROMPT.pooled]))
    away, towards = branch(NEGATIVE, 400)["velocity"], branch(PROMPT, 400)["velocity"]
    np.testing.assert_allclose(velocity, away + 3.0 * (towards - away), rtol=1e-5, atol=1e-6)
    assert velocity.dtype == np.float32


def test_without_a_negative_branch_the_batch_is_single() -> None:
    session = FakeSession("transformer", transformer(2), [])
    velocity = GuidedVelocity(session, PROMPT, None, 1.0)(LATENTS, 400.0)
    ((_, inputs),) = session.calls
    assert len(inputs["latents"]) == len(inputs["context"]) == 2
    np.testing.assert_array_equal(velocity, branch(PROMPT, 400)["velocity"])


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_routes_are_those_of_the_prompt_for_every_call(negative: Conditioning | None) -> None:
    def run(inputs: Arrays) -> Arrays:
        told = np.round(inputs["context"][:, :1, :1] * 1000).astype(np.int64)
        return {"velocity": inputs["latents"], "routes": told}

    guided = GuidedVelocity(FakeSession("transformer", run, []), PROMPT, negative, 3.0)
    guided(LATENTS, 400.0)
    guided(LATENTS, 200.0)
    expected = np.round(PROMPT.context[:, :1, :1] * 1000).astype(np.int64)
    assert len(guided.routes) == 2
    np.testing.assert_array_equal(guided.routes[1], expected)


def test_a_model_that_does_not_think_has_no_routes() -> None:
    session = FakeSession("transformer", lambda inputs: {"velocity": inputs["latents"]}, [])
    guided = GuidedVelocity(session, PROMPT, NEGATIVE, 3.0)
    guided(LATENTS, 400.0)
    assert guided.routes == []


@pytest.mark.parametrize(
    "outputs", [{}, {"velocity": LATENTS[:1]}, {"velocity": LATENTS}, {"velocity": LATENTS[:, :, :1]}]
)
def test_a_velocity_of_another_shape_is_not_broadcast(outputs: Arrays) -> None:
    session = FakeSession("transformer", lambda inputs: outputs, [])
    with pytest.raises(EngineFailed, match=r"expected an output velocity of shape \(4, 4, 2, 3\), found "):
        GuidedVelocity(session, PROMPT, NEGATIVE, 3.0)(LATENTS, 400.0)
