"""Image-to-image and inpainting: where the loop starts, what it keeps, and agreement with diffusers."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tpx_runtime import __version__
from tpx_runtime.bundle import Bundle
from tpx_runtime.editing import (
    DEFAULT_STRENGTH,
    Edit,
    InpaintingPrediction,
    add_noise,
    last_steps,
    resolve_strength,
    to_latent_mask,
    to_pixels,
)
from tpx_runtime.engine import Arrays
from tpx_runtime.errors import BadInput, EngineFailed
from tpx_runtime.generator import Generator
from tpx_runtime.noise import batch_noise
from tpx_runtime.sampling import Array, Schedule
from tpx_runtime.sampling.flow import FLOW_SAMPLERS

from .fakes import MODEL, FakeEngine, without_encoder

rng = np.random.default_rng(11)
LEFT_MASK = np.zeros((8, 12), np.uint8)  # white in the leftmost of three columns of latents
LEFT_MASK[:, :4] = 255


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def generator(fake_bundle: Path, engine: FakeEngine) -> Generator:
    return Generator(Bundle.open(fake_bundle), engine)


@pytest.fixture(scope="module")
def real(tiny_bundle: Path) -> Generator:
    return Generator.load(tiny_bundle, "onnxruntime")


def photo(size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Random blocks of 4 x 4 equal pixels, which the fake autoencoder reconstructs exactly."""
    blocks = rng.integers(20, 235, (size[1] // 4, size[0] // 4, 3), np.uint8)
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def transformer_calls(engine: FakeEngine) -> list[Arrays]:
    return [inputs for name, inputs in engine.calls if name.startswith("transformer/depth")]


# Strength


@settings(deadline=None)  # the first example imports diffusers
@given(st.integers(1, 1000), st.floats(0, 1, exclude_min=True))
def test_strength_selects_the_same_steps_as_diffusers(steps: int, strength: float) -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline

    schedule = Schedule([float(i) for i in range(steps, -1, -1)], [float(i) for i in range(steps)])
    scheduler = SimpleNamespace(timesteps=schedule.timesteps, order=1)
    get_timesteps = StableDiffusion3Img2ImgPipeline.get_timesteps
    theirs, _ = get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
    selected = last_steps(schedule, strength)
    # Where diffusers would take no step, we take one.
    assert selected.timesteps == (theirs or schedule.timesteps[-1:])
    assert len(selected.sigmas) == len(selected.timesteps) + 1
    assert selected.sigmas[-1] == 0


@pytest.mark.parametrize(
    ("steps", "strength", "taken"),
    [(10, 0.6, 6), (10, 0.55, 6), (10, 0.01, 1), (10, 1, 10), (1, 0.3, 1), (28, 0.6, 17), (3, 1e-9, 1)],
)
def test_strength_rounds_up_to_whole_steps(steps: int, strength: float, taken: int) -> None:
    schedule = FLOW_SAMPLERS["euler"].schedule(steps, 3.0)
    assert last_steps(schedule, strength).timesteps == schedule.timesteps[-taken:]


def test_strength_one_selects_every_step() -> None:
    for sampler in FLOW_SAMPLERS.values():
        assert last_steps(sampler.schedule(7, 3.0), 1.0) == sampler.schedule(7, 3.0)


def test_a_strength_or_mask_needs_an_image() -> None:
    assert resolve_strength(None, None, None) is None
    assert resolve_strength("image", None, None) == DEFAULT_STRENGTH
    assert resolve_strength("image", "mask", 0.2) == 0.2
    with pytest.raises(BadInput, match="expected an image with a mask, found none; give the image to start"):
        resolve_strength(None, "mask", 0.5)
    with pytest.raises(BadInput, match="expected an image with a strength, found none; give the image"):
        resolve_strength(None, None, 0.5)


def test_the_loop_starts_from_the_encoded_image_with_noise(generator: Generator, engine: FakeEngine) -> None:
    input_image = photo()
    generator("red cube", image=input_image, strength=0.5, steps=4, seed=9, guidance=1)
    (encoded,) = [inputs for name, inputs in engine.calls if name.startswith("vae_encoder")]
    np.testing.assert_array_equal(encoded["image"], to_pixels(input_image))
    assert encoded["image"].dtype == np.float32
    latents = (engine.functions["vae_encoder/model.onnx"](encoded)["latents"] - 0.25) * 2.0
    schedule = FLOW_SAMPLERS["euler"].schedule(4, 3.0)
    first, *rest = transformer_calls(engine)
    assert len(rest) == 1
    (table,) = [inputs for name, inputs in engine.calls if name == "transformer/conditions.onnx"]
    assert table["timestep"] == pytest.approx(schedule.timesteps[2:])
    sigma = schedule.sigmas[2]
    start = (1 - sigma) * latents + sigma * batch_noise([9], MODEL.latent_shape)
    np.testing.assert_allclose(first["latents"], start, rtol=1e-5, atol=1e-6)
    assert first["latents"].dtype == np.float32


def test_the_vae_encoder_is_opened_once(generator: Generator, engine: FakeEngine) -> None:
    for _ in range(2):
        generator("red cube", image=photo())
    assert engine.opened.count("vae_encoder/model.onnx") == 1


def test_every_image_of_a_batch_starts_from_its_own_noise(generator: Generator) -> None:
    input_image = photo()
    batch = generator("red cube", image=input_image, num_images=3, seed=4)
    single = [generator("red cube", image=input_image, seed=seed)[0] for seed in (4, 5, 6)]
    for one, other in zip(batch, single, strict=True):
        np.testing.assert_array_equal(levels(one), levels(other))
    assert (levels(batch[0]) != levels(batch[1])).any()


def test_a_low_strength_stays_near_the_image(generator: Generator) -> None:
    input_image = photo()

    def distance(strength: float) -> float:
        (image,) = generator("red cube", image=input_image, strength=strength, steps=100, guidance=1)
        return float(np.abs(levels(image) - levels(input_image)).mean())

    near, middle, far = (distance(strength) for strength in (0.01, 0.4, 1.0))
    assert near < 4 < middle < far


def test_strength_one_without_a_mask_ignores_the_image(generator: Generator) -> None:
    """For schedules that start from pure noise, as Euler's does."""
    (from_image,) = generator("red cube", image=photo(), strength=1.0, seed=3)
    (from_noise,) = generator("red cube", seed=3)
    np.testing.assert_array_equal(levels(from_image), levels(from_noise))


def test_the_callback_counts_the_steps_taken(generator: Generator) -> None:
    seen: list[tuple[int, int]] = []

    def callback(step: int, total: int, latents: Array) -> None:
        seen.append((step, total))

    generator(
        "red cube", image=photo(), strength=0.3, steps=10, num_images=3, batch_size=2, callback=callback
    )
    assert seen == [(step, 6) for step in range(1, 7)]


def test_metadata_contains_the_strength(generator: Generator) -> None:
    (image,) = generator("red cube", image=photo())
    assert json.loads(image.info["tpx"])["strength"] == DEFAULT_STRENGTH
    assert image.info["parameters"].endswith(f", Denoising strength: 0.6, Version: tpx {__version__}")
    assert "strength" not in json.loads(generator("red cube")[0].info["tpx"])


def test_metadata_contains_hashes_of_the_input_image_and_mask(generator: Generator) -> None:
    input_image, mask = photo(), Image.fromarray(LEFT_MASK)
    unmasked, masked, other_image = (
        json.loads(generator("red cube", image=source, mask=source_mask)[0].info["tpx"])
        for source, source_mask in ((input_image, None), (input_image, mask), (photo(), mask))
    )
    assert (
        unmasked["image_sha256"]
        == masked["image_sha256"]
        == hashlib.sha256(input_image.tobytes()).hexdigest()
    )
    assert other_image["image_sha256"] != masked["image_sha256"]
    assert (
        masked["mask_sha256"]
        == other_image["mask_sha256"]
        == hashlib.sha256(mask.convert("RGB").tobytes()).hexdigest()
    )
    assert "mask_sha256" not in unmasked
    assert "image_sha256" not in json.loads(generator("red cube")[0].info["tpx"])


def test_an_image_and_a_strength_need_each_other(generator: Generator) -> None:
    edit = generator.edit(photo())
    with pytest.raises(BadInput, match="an input image and a strength, or neither, found no image"):
        generator.generate(generator.plan("red cube", strength=0.5))
    with pytest.raises(BadInput, match="an input image and a strength, or neither, found no strengt"):
        generator.generate(generator.plan("red cube"), edit=edit)
    with pytest.raises(BadInput, match="expected an image with a mask, found none"):
        generator("red cube", mask=photo())


def test_a_bundle_without_vae_encoder_supports_only_text_to_image(
    fake_bundle: Path, engine: FakeEngine
) -> None:
    generator = Generator(without_encoder(fake_bundle), engine)
    message = "expected a bundle with a vae_encoder to start from an image, found fake without one; leave"
    for call in (
        lambda: generator("red cube", image=photo()),
        lambda: generator.plan("red cube", strength=0.5),
        lambda: generator.edit(photo()),
    ):
        with pytest.raises(BadInput, match=message):
            call()
    assert engine.opened == []
    assert len(generator("red cube")) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_latents_of_the_input_image_are_an_error(fake_bundle: Path, value: float) -> None:
    broken = {"vae_encoder/model.onnx": lambda inputs: {"latents": np.full((1, 4, 2, 3), value, np.float32)}}
    generator = Generator(Bundle.open(fake_bundle), FakeEngine(broken))
    with pytest.raises(
        EngineFailed, match="expected finite numbers in the latents of the input image, found NaN"
    ):
        generator("red cube", image=photo())


# Masks


def test_a_latent_is_repainted_if_any_of_its_pixels_is() -> None:
    mask = np.zeros((8, 12), np.uint8)
    mask[0, 0] = mask[7, 8] = 255
    repaint = to_latent_mask(Image.fromarray(mask), (2, 3))
    np.testing.assert_array_equal(repaint, [[[[True, False, False], [False, False, True]]]])


CORNERS = np.array([[[[True, False, False], [False, False, True]]]])


def far_velocity(x: Array, timestep: float) -> Array:
    """A velocity that depends on position and time and leads far away from the image."""
    return (3.0 * np.cos(x + timestep / 300) + 2.0).astype(np.float32)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("shift", [0.01, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("name", list(FLOW_SAMPLERS))
def test_kept_latents_follow_the_noised_image_after_every_step(
    name: str, steps: int, strength: float, shift: float
) -> None:
    """That is (1 - sigma) x0 + sigma noise, with each image's own noise."""
    x0, noise = (rng.standard_normal((2, 4, 2, 3)).astype(np.float32) for _ in range(2))
    schedule = last_steps(FLOW_SAMPLERS[name].schedule(steps, shift), strength)
    velocity = InpaintingPrediction(far_velocity, x0[:1], noise, CORNERS)
    start = add_noise(x0[:1], noise, schedule.sigmas[0])
    path = list(FLOW_SAMPLERS[name].sample(velocity, start, schedule))
    assert len(path) == len(schedule.timesteps)
    kept = np.broadcast_to(~CORNERS, start.shape)
    for x, sigma in zip(path, schedule.sigmas[1:], strict=True):
        expected = (1 - sigma) * x0[:1] + sigma * noise
        np.testing.assert_allclose(x[kept], expected[kept], rtol=0, atol=1e-4)
    if schedule.sigmas[0] > 0.1:
        assert np.abs(path[-1] - x0[:1])[~kept].min() > 0  # the others do change


@pytest.mark.parametrize("name", list(FLOW_SAMPLERS))
def test_an_all_white_mask_changes_nothing(name: str) -> None:
    x0, noise = (rng.standard_normal((2, 4, 2, 3)).astype(np.float32) for _ in range(2))
    schedule = last_steps(FLOW_SAMPLERS[name].schedule(6, 3.0), 0.8)
    velocity = InpaintingPrediction(far_velocity, x0, noise, np.ones((1, 1, 2, 3), bool))
    start = add_noise(x0, noise, schedule.sigmas[0])
    *_, masked = FLOW_SAMPLERS[name].sample(velocity, start, schedule)
    *_, unmasked = FLOW_SAMPLERS[name].sample(far_velocity, start, schedule)
    np.testing.assert_array_equal(masked, unmasked)


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_inpainting_with_euler_matches_diffusers(strength: float) -> None:
    """diffusers replaces the kept latents after every step by the image at the next sigma."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    x0, noise = (torch.randn(1, 4, 2, 3, generator=torch.manual_seed(seed)) for seed in (0, 1))
    mask = torch.from_numpy(CORNERS).float()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    schedule = last_steps(FLOW_SAMPLERS["euler"].schedule(12, 3.0), strength)
    first = 12 - len(schedule.timesteps)
    scheduler.set_begin_index(first)
    times = scheduler.timesteps[first:]
    latents = scheduler.scale_noise(x0, times[:1], noise)
    start = add_noise(x0.numpy(), noise.numpy(), schedule.sigmas[0])
    np.testing.assert_allclose(start, latents.numpy(), rtol=1e-5, atol=1e-6)
    for i, time in enumerate(times):
        velocity = torch.from_numpy(far_velocity(latents.numpy(), float(time)))
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
        kept = scheduler.scale_noise(x0, times[i + 1 : i + 2], noise) if i + 1 < len(times) else x0
        latents = (1 - mask) * kept + mask * latents
    ours = InpaintingPrediction(far_velocity, x0.numpy(), noise.numpy(), CORNERS)
    *_, found = FLOW_SAMPLERS["euler"].sample(ours, start, schedule)
    np.testing.assert_allclose(found, latents.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", list(FLOW_SAMPLERS))
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_pixels_outside_the_mask_are_unchanged(generator: Generator, sampler: str, strength: float) -> None:
    # The fake decoder cannot reproduce this image.
    input_image = Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8))
    images = generator(
        "red cube",
        image=input_image,
        mask=Image.fromarray(LEFT_MASK),
        strength=strength,
        sampler=sampler,
        num_images=2,
    )
    for image in images:
        np.testing.assert_array_equal(levels(image)[:, 4:], levels(input_image)[:, 4:])
        assert (levels(image)[:, :4] != levels(input_image)[:, :4]).mean() > 0.9
    assert (levels(images[0]) != levels(images[1])).any()


def test_kept_latents_end_at_those_of_the_image(generator: Generator) -> None:
    edit = generator.edit(photo(), Image.fromarray(LEFT_MASK))
    for sampler in FLOW_SAMPLERS:
        jobs = generator.plan("red cube", strength=1.0, num_images=2, sampler=sampler)
        latents = generator.generate_latents(jobs, edit=edit)
        expected = edit.latents[..., 1:].repeat(2, axis=0)
        np.testing.assert_allclose(latents[..., 1:], expected, rtol=1e-4, atol=1e-4)
        assert np.abs(latents[..., 0] - edit.latents[..., 0]).max() > 0.1


def test_rejects_an_edit_of_another_image_size(generator: Generator) -> None:
    edit = generator.edit(photo())
    jobs = generator.plan("red cube", strength=0.5)
    smaller = replace(edit, image=edit.image.resize((4, 4)))
    other_latents = replace(edit, latents=edit.latents[:, :, :1])
    for other in (smaller, other_latents):
        with pytest.raises(
            BadInput, match=r"expected an edit of 12x8 pixels, found one of .* call edit of this"
        ):
            generator.generate(jobs, edit=other)


def test_paste_without_a_mask_returns_the_generated_image() -> None:
    generated, input_image = photo(), photo()
    assert Edit(input_image, np.zeros(1, np.float32)).paste(generated) is generated


# On a real bundle


def test_a_low_strength_stays_near_the_image_on_a_real_bundle(real: Generator) -> None:
    (input_image,) = real("a red cube", seed=1)
    near, far = (
        real("two blue sphere", image=input_image, strength=strength, steps=10, seed=5)[0]
        for strength in (0.1, 1.0)
    )
    assert near.size == (64, 64)
    # The autoencoder is random, so distances are to its reconstruction of the input image.
    edit = real.edit(input_image)
    (reconstruction,) = real.decode(edit.latents)
    distances = [
        np.abs(to_pixels(image)[0] - reconstruction).mean()
        for image in (near, far, real("a red cube", seed=2)[0])
    ]
    assert distances[0] < distances[1] / 2
    assert distances[0] < distances[2] / 2


def test_pixels_outside_the_mask_are_unchanged_on_a_real_bundle(real: Generator) -> None:
    (input_image,) = real("a red cube", seed=1)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    (image,) = real("a blue sphere", image=input_image, mask=mask, strength=1.0, sampler="unipc")
    np.testing.assert_array_equal(levels(image)[:, 32:], levels(input_image)[:, 32:])
    assert (levels(image)[:, :32] != levels(input_image)[:, :32]).mean() > 0.5
