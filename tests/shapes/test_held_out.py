"""The loss on held-out scenes: the training loss with the same noise for every model."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from samples.shapes import held_out, train_text
from samples.shapes.captions import Group, Prompt
from samples.shapes.train_flow import SIGMA_MEAN, SIGMA_STD, TrainingData, with_thinking, without_thinking
from tpx_export.model import MMDiT, MMDiTSpec, ThinkingSpec
from tpx_export.model.text_encoder import TextEncoder

SCENES = 5


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> TrainingData:
    monkeypatch.setattr(held_out, "BATCH_SIZE", 2)
    torch.manual_seed(0)
    prompts = [
        Prompt("colours", (Group("cube", colour),)) for colour in ("red", "blue", "green", "black", "cyan")
    ]
    return TrainingData(
        prompts, torch.randn(SCENES, 4, 4, 4).half(), TextEncoder(train_text.default_spec()).eval()
    )


@pytest.fixture
def base(data: TrainingData) -> MMDiT:
    text = data.text_encoder.spec
    spec = MMDiTSpec(
        latent_size=(4, 4),
        width=32,
        heads=2,
        blocks=2,
        context_tokens=text.tokens,
        context_width=text.width,
        pooled_width=text.width,
    )
    return MMDiT(spec)


def test_sigmas_are_evenly_spaced_quantiles_of_the_training_distribution() -> None:
    logit = torch.logit(held_out.sigmas(999))
    levels = sorted(map(NormalDist(SIGMA_MEAN, SIGMA_STD).cdf, logit.tolist()))
    assert levels == pytest.approx([(i + 0.5) / 999 for i in range(999)], abs=1e-4)
    assert torch.equal(held_out.sigmas(999), held_out.sigmas(999))


def test_the_loss_of_a_zero_output_is_the_mean_square_of_the_velocity(
    data: TrainingData, base: MMDiT
) -> None:
    found = held_out.losses(base, data, depth=1)
    noise = torch.randn(data.latents.shape, generator=held_out.step_generator(0, 1))
    expected = (noise - data.latents.float()).square().mean((1, 2, 3))
    assert found == pytest.approx(expected.double().numpy(), rel=1e-5)


def test_untrained_adapters_have_the_loss_of_their_base_and_changed_ones_do_not(
    data: TrainingData, base: MMDiT
) -> None:
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = with_thinking(base, ThinkingSpec(blocks=(1,), experts=2, rank=4, max_depth=1)).train()
    expected = held_out.losses(base, data, depth=1)
    assert held_out.losses(model, data, depth=1) == pytest.approx(expected, rel=1e-3)
    assert np.ptp(expected) > 0
    torch.nn.init.normal_(model.blocks[1].thinking.b)
    changed = held_out.losses(model.train(), data, depth=1)
    assert changed != pytest.approx(expected, rel=1e-3)
    # Routing is deterministic in evaluation.
    assert (held_out.losses(model.train(), data, depth=1) == changed).all()


def test_without_thinking_returns_the_base(base: MMDiT) -> None:
    restored = without_thinking(with_thinking(base, ThinkingSpec(blocks=(0,), experts=2, rank=4)))
    assert restored.spec == base.spec
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in base.state_dict().items())
