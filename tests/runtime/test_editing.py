"""Image-to-image and inpainting: where the loop starts, what it keeps, and what diffusers makes of the same."""

import hashlib
import json
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
LEFT = np.zeros((8, 12), np.uint8)  # white in the left of three columns of latents
LEFT[:, :4] = 255


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def generator(fake_bundle: Path, engine: FakeEngine) -> Generator:
    return Generator(Bundle.open(fake_bundle), engine)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def real(tiny_bundle: Path) -> Generator:
    return Generator.load(tiny_bundle, "onnxruntime")


def photo(size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Random pixels in blocks of 4 x 4, which the fake autoencoder gives back."""
    blocks = rng.integers(20, 235, (size[1] // 4, size[0] // 4, 3), np.uint8)
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def transformer_calls(engine: FakeEngine) -> list[Arrays]:
    return [inputs for name, inputs in engine.calls if name.startswith("transformer/depth")]


# Strength


@settings(deadline=None)  # the first example imports diffusers
@given(st.integers(1, 1000), st.floats(0, 1, exclude_min=True))
def test_steps_taken_are_those_of_diffusers(steps: int, strength: float) -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline

    schedule = Schedule([float(i) for i in range(steps, -1, -1)], [float(i) for i in range(steps)])
    scheduler = SimpleNamespace(timesteps=schedule.timesteps, order=1)
    get_timesteps = StableDiffusion3Img2ImgPipeline.get_timesteps
    theirs, _ = get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
    made = last_steps(schedule, strength)
    assert made.timesteps == (theirs or schedule.timesteps[-1:])  # where theirs would not start, one
    assert len(made.sigmas) == len(made.timesteps) + 1
    assert made.sigmas[-1] == 0


@pytest.mark.parametrize(
    ("steps", "strength", "taken"),
    [(10, 0.6, 6), (10, 0.55, 6), (10, 0.01, 1), (10, 1, 10), (1, 0.3, 1), (28, 0.6, 17), (3, 1e-9, 1)],
)
def test_strength_rounds_up_to_whole_steps(steps: int, strength: float, taken: int) -> None:
    schedule = FLOW_SAMPLERS["euler"].schedule(steps, 3.0)
    assert last_steps(schedule, strength).timesteps == schedule.timesteps[-taken:]


def test_strength_one_is_every_step() -> None:
    for sampler in FLOW_SAMPLERS.values():
        assert last_steps(sampler.schedule(7, 3.0), 1.0) == sampler.schedule(7, 3.0)


def test_a_strength_needs_an_image() -> None:
    assert resolve_strength(None, None, None) is None
    assert resolve_strength("image", None, None) == DEFAULT_STRENGTH
    assert resolve_strength("image", "mask", 0.2) == 0.2
    with pytest.raises(BadInput, match="expected an image with a mask, found none; give the image to start"):
        resolve_strength(None, "mask", 0.5)
    with pytest.raises(BadInput, match="expected an image with a strength, found none; give the image"):
        resolve_strength(None, None, 0.5)


def test_the_loop_starts_from_the_image_with_noise(generator: Generator, engine: FakeEngine) -> None:
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


def test_the_encoder_is_loaded_once(generator: Generator, engine: FakeEngine) -> None:
    for _ in range(2):
        generator("red cube", image=photo())
    assert engine.opened.count("vae_encoder/model.onnx") == 1


def test_every_image_of_a_batch_starts_from_its_own_noise(generator: Generator) -> None:
    input_image = photo()
    batch = generator("red cube", image=input_image, num_images=3, seed=4)
    alone = [generator("red cube", image=input_image, seed=seed)[0] for seed in (4, 5, 6)]
    for one, other in zip(batch, alone, strict=True):
        np.testing.assert_array_equal(levels(one), levels(other))
    assert (levels(batch[0]) != levels(batch[1])).any()


def test_a_small_strength_stays_near_the_image(generator: Generator) -> None:
    input_image = photo()

    def distance(strength: float) -> float:
        (image,) = generator("red cube", image=input_image, strength=strength, steps=100, guidance=1)
        return float(np.abs(levels(image) - levels(input_image)).mean())

    near, middle, far = (distance(strength) for strength in (0.01, 0.4, 1.0))
    assert near < 4 < middle < far


def test_strength_one_without_a_mask_forgets_the_image(generator: Generator) -> None:
    """Where the schedule begins with nothing but noise, as Euler's does."""
    (from_picture,) = generator("red cube", image=photo(), strength=1.0, seed=3)
    (from_nothing,) = generator("red cube", seed=3)
    np.testing.assert_array_equal(levels(from_picture), levels(from_nothing))


def test_the_callback_counts_the_steps_that_are_taken(generator: Generator) -> None:
    seen: list[tuple[int, int]] = []

    def callback(step: int, total: int, latents: Array) -> None:
        seen.append((step, total))

    generator(
        "red cube", image=photo(), strength=0.3, steps=10, num_images=3, batch_size=2, callback=callback
    )
    assert seen == [(step, 6) for step in range(1, 7)]


def test_the_file_says_the_strength(generator: Generator) -> None:
    (image,) = generator("red cube", image=photo())
    assert json.loads(image.info["tpx"])["strength"] == DEFAULT_STRENGTH
    assert image.info["parameters"].endswith(f", Denoising strength: 0.6, Version: tpx {__version__}")
    assert "strength" not in json.loads(generator("red cube")[0].info["tpx"])


def test_the_file_says_which_image_and_mask_it_was_made_of(generator: Generator) -> None:
    input_image, mask = photo(), Image.fromarray(LEFT)
    whole, part, other = (
        json.loads(generator("red cube", image=one, mask=over)[0].info["tpx"])
        for one, over in ((input_image, None), (input_image, mask), (photo(), mask))
    )
    assert whole["image_sha256"] == part["image_sha256"] == hashlib.sha256(input_image.tobytes()).hexdigest()
    assert other["image_sha256"] != part["image_sha256"]
    assert (
        part["mask_sha256"]
        == other["mask_sha256"]
        == hashlib.sha256(mask.convert("RGB").tobytes()).hexdigest()
    )
    assert "mask_sha256" not in whole
    assert "image_sha256" not in json.loads(generator("red cube")[0].info["tpx"])


def test_an_image_and_a_strength_go_together(generator: Generator) -> None:
    edit = generator.edit(photo())
    with pytest.raises(BadInput, match="an input image and a strength, or neither, found no image"):
        generator.generate(generator.plan("red cube", strength=0.5))
    with pytest.raises(BadInput, match="an input image and a strength, or neither, found no strengt"):
        generator.generate(generator.plan("red cube"), edit=edit)
    with pytest.raises(BadInput, match="expected an image with a mask, found none"):
        generator("red cube", mask=photo())


def test_a_bundle_without_encoder_draws_but_does_not_start_from_an_image(
    fake_bundle: Path, engine: FakeEngine
) -> None:
    generator = Generator(without_encoder(fake_bundle), engine)  # type: ignore[arg-type]
    message = "expected a bundle with a vae_encoder to start from an image, found fake without one; leave"
    for refused in (
        lambda: generator("red cube", image=photo()),
        lambda: generator.plan("red cube", strength=0.5),
        lambda: generator.edit(photo()),
    ):
        with pytest.raises(BadInput, match=message):
            refused()
    assert engine.opened == []
    assert len(generator("red cube")) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_no_numbers_are_an_error(fake_bundle: Path, value: float) -> None:
    broken = {"vae_encoder/model.onnx": lambda inputs: {"latents": np.full((1, 4, 2, 3), value, np.float32)}}
    generator = Generator(Bundle.open(fake_bundle), FakeEngine(broken))  # type: ignore[arg-type]
    with pytest.raises(
        EngineFailed, match="expected finite numbers in the latents of the input image, found NaN"
    ):
        generator("red cube", image=photo())


# What a mask keeps


def test_a_latent_is_painted_where_any_of_its_pixels_is() -> None:
    mask = np.zeros((8, 12), np.uint8)
    mask[0, 0] = mask[7, 8] = 255
    repaint = to_latent_mask(Image.fromarray(mask), (2, 3))
    np.testing.assert_array_equal(repaint, [[[[True, False, False], [False, False, True]]]])


CORNERS = np.array([[[[True, False, False], [False, False, True]]]])


def far_away(x: Array, timestep: float) -> Array:
    """A velocity that depends on place and time, and leads nowhere near the image."""
    return (3.0 * np.cos(x + timestep / 300) + 2.0).astype(np.float32)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("shift", [0.01, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("name", list(FLOW_SAMPLERS))
def test_what_is_kept_is_on_its_path_after_every_step(
    name: str, steps: int, strength: float, shift: float
) -> None:
    """(1 - sigma) x0 + sigma noise, of each image's own noise."""
    x0, noise = (rng.standard_normal((2, 4, 2, 3)).astype(np.float32) for _ in range(2))
    schedule = last_steps(FLOW_SAMPLERS[name].schedule(steps, shift), strength)
    velocity = InpaintingPrediction(far_away, x0[:1], noise, CORNERS)
    start = add_noise(x0[:1], noise, schedule.sigmas[0])
    path = list(FLOW_SAMPLERS[name].sample(velocity, start, schedule))
    assert len(path) == len(schedule.timesteps)
    kept = np.broadcast_to(~CORNERS, start.shape)
    for x, sigma in zip(path, schedule.sigmas[1:], strict=True):
        expected = (1 - sigma) * x0[:1] + sigma * noise
        np.testing.assert_allclose(x[kept], expected[kept], rtol=0, atol=1e-4)
    if schedule.sigmas[0] > 0.1:
        assert np.abs(path[-1] - x0[:1])[~kept].min() > 0  # the rest is not held


@pytest.mark.parametrize("name", list(FLOW_SAMPLERS))
def test_what_is_painted_is_painted_as_without_a_mask(name: str) -> None:
    """A mask of nothing but white changes no number."""
    x0, noise = (rng.standard_normal((2, 4, 2, 3)).astype(np.float32) for _ in range(2))
    schedule = last_steps(FLOW_SAMPLERS[name].schedule(6, 3.0), 0.8)
    velocity = InpaintingPrediction(far_away, x0, noise, np.ones((1, 1, 2, 3), bool))
    start = add_noise(x0, noise, schedule.sigmas[0])
    *_, masked = FLOW_SAMPLERS[name].sample(velocity, start, schedule)
    *_, free = FLOW_SAMPLERS[name].sample(far_away, start, schedule)
    np.testing.assert_array_equal(masked, free)


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_inpainting_with_euler_is_that_of_diffusers(strength: float) -> None:
    """Theirs replaces what is kept after every step with the image at the next sigma."""
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
        velocity = torch.from_numpy(far_away(latents.numpy(), float(time)))
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
        kept = scheduler.scale_noise(x0, times[i + 1 : i + 2], noise) if i + 1 < len(times) else x0
        latents = (1 - mask) * kept + mask * latents
    ours = InpaintingPrediction(far_away, x0.numpy(), noise.numpy(), CORNERS)
    *_, found = FLOW_SAMPLERS["euler"].sample(ours, start, schedule)
    np.testing.assert_allclose(found, latents.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", list(FLOW_SAMPLERS))
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_pixels_outside_the_mask_are_the_images(generator: Generator, sampler: str, strength: float) -> None:
    input_image = Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8))  # no decoder gives this back
    images = generator(
        "red cube",
        image=input_image,
        mask=Image.fromarray(LEFT),
        strength=strength,
        sampler=sampler,
        num_images=2,
    )
    for image in images:
        np.testing.assert_array_equal(levels(image)[:, 4:], levels(input_image)[:, 4:])
        assert (levels(image)[:, :4] != levels(input_image)[:, :4]).mean() > 0.9
    assert (levels(images[0]) != levels(images[1])).any()


def test_latents_under_the_mask_end_at_the_images(generator: Generator) -> None:
    edit = generator.edit(photo(), Image.fromarray(LEFT))
    for sampler in FLOW_SAMPLERS:
        jobs = generator.plan("red cube", strength=1.0, num_images=2, sampler=sampler)
        latents = generator.generate_latents(jobs, edit=edit).latents
        expected = edit.latents[..., 1:].repeat(2, axis=0)
        np.testing.assert_allclose(latents[..., 1:], expected, rtol=1e-4, atol=1e-4)
        assert np.abs(latents[..., 0] - edit.latents[..., 0]).max() > 0.1


def test_no_mask_pastes_nothing() -> None:
    drawn, input_image = photo(), photo()
    assert Edit(input_image, np.zeros(1, np.float32)).paste(drawn) is drawn


# On a real bundle


def test_a_real_bundle_starts_from_an_image(real: Generator) -> None:
    (input_image,) = real("a red cube", seed=1)
    near, far = (
        real("two blue sphere", image=input_image, strength=strength, steps=10, seed=5)[0]
        for strength in (0.1, 1.0)
    )
    assert near.size == (64, 64)
    # The autoencoder is random: it is what comes back from it that the near one is near to.
    edit = real.edit(input_image)
    (back,) = real.decode(edit.latents)
    distances = [
        np.abs(to_pixels(image)[0] - back).mean() for image in (near, far, real("a red cube", seed=2)[0])
    ]
    assert distances[0] < distances[1] / 2
    assert distances[0] < distances[2] / 2


def test_a_real_bundle_keeps_what_is_masked(real: Generator) -> None:
    (input_image,) = real("a red cube", seed=1)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    (image,) = real("a blue sphere", image=input_image, mask=mask, strength=1.0, sampler="unipc")
    np.testing.assert_array_equal(levels(image)[:, 32:], levels(input_image)[:, 32:])
    assert (levels(image)[:, :32] != levels(input_image)[:, :32]).mean() > 0.5
