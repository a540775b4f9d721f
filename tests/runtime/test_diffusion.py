"""Diffusion samplers against DiT's sampling reimplemented in torch, diffusers where it is equivalent, and closed forms.

`original_timesteps` and `original_sample` are the reference: respacing, posterior and learned variance in the terms of DiT's
sampling (Nichol and Dhariwal, 2102.09672), with float32 coefficients as there.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tpx_runtime.guidance import apply_guidance
from tpx_runtime.noise import MAX_SEED, batch_noise, gaussian_noise
from tpx_runtime.sampling import Array
from tpx_runtime.sampling.diffusion import (
    DIFFUSION_SAMPLERS,
    ddim,
    ddpm,
    respaced,
    respaced_schedule,
    schedule_at,
)

from .test_noise import philox_block

Model = Callable[[Array, float], Array]
BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)


def noise_of(seeds: list[int], shape: tuple[int, ...]) -> Callable[[int], Array]:
    return lambda step: batch_noise(seeds, shape, step)


# The reference.


def original_timesteps(steps: int) -> list[int]:
    position, timesteps = 0.0, set()
    for _ in range(steps):
        timesteps.add(round(position))
        position += 999 / (steps - 1) if steps > 1 else 1
    return sorted(timesteps)


def original_sample(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: int,
    noise_at: Callable[[int], Tensor],
    learned: bool = True,
) -> Iterator[Tensor]:
    timesteps = original_timesteps(steps)
    previous_abar, betas = 1.0, []
    for t in timesteps:
        betas.append(1 - ABAR[t] / previous_abar)
        previous_abar = ABAR[t]
    beta = np.array(betas)
    abar = np.cumprod(1 - beta)
    abar_prev = np.append(1.0, abar[:-1])
    variance = beta * (1 - abar_prev) / (1 - abar)
    log_min_variance = np.log(np.append(variance[1], variance[1:]))
    log_max_variance = np.log(beta)
    for count, i in enumerate(reversed(range(steps)), start=1):
        out = model(x, torch.full((len(x),), timesteps[i]))
        eps = out[:, : x.shape[1]]
        x0 = float(np.float32(np.sqrt(1 / abar[i]))) * x - float(np.float32(np.sqrt(1 / abar[i] - 1))) * eps
        c0 = np.float32(beta[i] * np.sqrt(abar_prev[i]) / (1 - abar[i]))
        cx = np.float32((1 - abar_prev[i]) * np.sqrt(1 - beta[i]) / (1 - abar[i]))
        mean = float(c0) * x0 + float(cx) * x
        if learned:
            fraction = (out[:, x.shape[1] :] + 1) / 2
            log_variance = fraction * float(np.float32(log_max_variance[i])) + (1 - fraction) * float(
                np.float32(log_min_variance[i])
            )
        else:  # "fixed large"
            log_variance = torch.full_like(x, np.log(np.append(variance[1], beta[1:]))[i])
        noise = noise_at(count) if i else torch.zeros_like(x)
        x = mean + torch.exp(0.5 * log_variance) * noise
        yield x


def wavy(x: Tensor, t: Tensor) -> Tensor:
    """An arbitrary epsilon and variance, nonlinear in x and time; epsilon is close to x at high noise, as a model's is."""
    time = t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000
    eps = time * x + (1 - time) * torch.sin(2 * x + 3 * time)
    return torch.cat([eps, torch.cos(3 * x + time)], dim=1)


def in_numpy(model: Callable[[Tensor, Tensor], Tensor]) -> Model:
    return lambda x, t: model(torch.from_numpy(x), torch.full((len(x),), t)).numpy()


# Schedules.


def test_respacing_matches_the_original_for_every_number_of_steps() -> None:
    for steps in range(2, 1001):
        timesteps = respaced(steps)
        assert timesteps == original_timesteps(steps)
        assert len(timesteps) == steps
        assert (timesteps[0], timesteps[-1]) == (0, 999)


def test_respacing_sums_the_stride_as_the_original_does() -> None:
    """At 43 steps the 21st timestep is 499.5, but the original's running sum is slightly less; a product is exact."""
    assert respaced(43)[21] == 499
    assert round(21 * 999 / 42) == 500


def test_respacing_of_250_and_of_every_timestep() -> None:
    assert respaced(250) == [round(i * 999 / 249) for i in range(250)]
    assert respaced(1000) == list(range(1000))
    assert respaced(2) == [0, 999]


def test_a_single_step_starts_at_the_noisiest_timestep() -> None:
    """The original's rule would give timestep 0, which leaves noise as it is."""
    assert respaced(1) == [999]
    noise = gaussian_noise(0, (1, 2, 3, 3))
    for sampler in DIFFUSION_SAMPLERS.values():
        [x] = sampler.denoise(lambda x, t: x, noise, sampler.schedule(1, 1.0), noise_of([0], (2, 3, 3)))
        assert np.isfinite(x).all()
        assert np.abs(x - noise).max() > 0.1


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 43, 250, 999, 1000])
def test_schedule_sigmas_come_from_the_cumulative_products_of_the_betas(steps: int) -> None:
    schedule = respaced_schedule(steps)
    assert schedule == respaced_schedule(steps, 3.0)  # the shift applies only to flow models
    assert schedule.timesteps == [float(t) for t in reversed(respaced(steps))]
    assert len(schedule.sigmas) == steps + 1
    assert schedule.sigmas[-1] == 0
    assert all(a > b for a, b in pairwise(schedule.sigmas))
    abar = 1 - np.square(schedule.sigmas[:-1])
    np.testing.assert_allclose(
        abar, [np.prod(1 - BETAS[: int(t) + 1]) for t in schedule.timesteps], rtol=1e-9
    )


@pytest.mark.parametrize("name", list(DIFFUSION_SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_calls_the_model_once_at_each_timestep(name: str, steps: int) -> None:
    timesteps: list[float] = []
    noise_steps: list[int] = []
    noise = gaussian_noise(3, (2, 1, 2, 2))
    before = noise.copy()

    def prediction(x: Array, timestep: float) -> Array:
        timesteps.append(timestep)
        return np.concatenate([x, 0 * x], axis=1)

    def noise_at(step: int) -> Array:
        noise_steps.append(step)
        return batch_noise([3, 4], (1, 2, 2), step)

    sampler = DIFFUSION_SAMPLERS[name]
    path = list(sampler.denoise(prediction, noise, sampler.schedule(steps, 1.0), noise_at))
    assert timesteps == [float(t) for t in reversed(respaced(steps))]
    assert noise_steps == (list(range(1, steps)) if name == "ddpm" else [])  # none at the last step
    assert len(path) == steps
    assert all(x.dtype == np.float32 and x.shape == noise.shape for x in path)
    assert (noise == before).all()


# DDPM.


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("steps", [2, 10, 43, 250])
def test_ddpm_matches_the_original_sampling(steps: int, learned: bool) -> None:
    shape, seeds = (3, 4, 4), [1, 2]
    start, noise_at = batch_noise(seeds, shape), noise_of(seeds, shape)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return wavy(x, t) if learned else wavy(x, t)[:, :3]

    found = list(ddpm(in_numpy(model), start, respaced_schedule(steps), noise_at))
    expected = list(
        original_sample(
            model,
            torch.from_numpy(start).double(),
            steps,
            lambda step: torch.from_numpy(noise_at(step)).double(),
            learned,
        )
    )
    for x, reference in zip(found, expected, strict=True):
        assert np.abs(x - reference.numpy()).max() <= 1e-4 * np.abs(reference.numpy()).max()


def test_ddpm_with_guidance_on_three_channels_matches_the_original() -> None:
    """DiT's forward_with_cfg guides epsilon in channels 0..2; channel 3 and the variances are the conditional branch's."""
    shape, seeds = (4, 3, 3), [5, 6]
    start, noise_at = batch_noise(seeds, shape), noise_of(seeds, shape)

    def branch(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
        return wavy(x, t) + (0.1 * torch.sin(x.repeat(1, 2, 1, 1)) if conditional else 0.0)

    def original(x: Tensor, t: Tensor) -> Tensor:
        half = x[: len(x) // 2]  # both branches start from the first half
        cond, uncond = branch(half, t[: len(half)], True), branch(half, t[: len(half)], False)
        eps = uncond[:, :3] + 4.0 * (cond[:, :3] - uncond[:, :3])
        return torch.cat([torch.cat([eps, cond[:, 3:]], 1), torch.cat([eps, uncond[:, 3:]], 1)])

    def prediction(x: Array, t: float) -> Array:
        cond, uncond = (in_numpy(lambda x, t, c=c: branch(x, t, c))(x, t) for c in (True, False))
        return apply_guidance(uncond, cond, 4.0, 3)

    *_, found = ddpm(prediction, start, respaced_schedule(250), noise_at)
    doubled = torch.from_numpy(np.concatenate([start, start])).double()
    *_, expected = original_sample(
        original, doubled, 250, lambda step: torch.from_numpy(noise_at(step)).double().repeat(2, 1, 1, 1)
    )
    reference = expected[:2].numpy()
    assert np.abs(found - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_ddpm_agrees_with_diffusers(steps: int) -> None:
    """DDPMScheduler steps between the timesteps that it visits. With spacing "linspace" these are the original ones,
    except where halves are rounded, which does not occur for these numbers of steps."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        beta_schedule="linear", variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(steps)
    schedule = respaced_schedule(steps)
    assert scheduler.timesteps.tolist() == schedule.timesteps
    generator, same_generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    start = torch.from_numpy(gaussian_noise(1, (2, 3, 4, 4)))
    path = ddpm(
        in_numpy(wavy),
        start.numpy(),
        schedule,
        lambda step: torch.randn(start.shape, generator=same_generator).numpy(),
    )
    x = start
    for timestep, found in zip(scheduler.timesteps, path, strict=True):
        x = scheduler.step(wavy(x, timestep.expand(2)), timestep, x, generator=generator).prev_sample
        assert np.abs(found - x.numpy()).max() <= 2e-4 * x.abs().max()


# The mean and standard deviation of data in which all pixels are normally distributed.
MEAN, DEVIATION = 0.4, 0.6


def exact_model(x: Array, timestep: float, schedule_steps: int) -> Array:
    """The exact epsilon of normal data, and the output that gives a respaced step the variance of the true reverse step."""
    t = int(timestep)
    timesteps = respaced(schedule_steps)
    index = timesteps.index(t)
    abar, next_abar = ABAR[t], ABAR[timesteps[index - 1]] if index else 1.0
    variance = abar * DEVIATION**2 + 1 - abar
    eps = math.sqrt(1 - abar) * (x - math.sqrt(abar) * MEAN) / variance
    beta = 1 - abar / next_abar
    posterior = beta * (1 - next_abar) / (1 - abar)
    variance_of_x0 = DEVIATION**2 * (1 - abar) / variance
    true_variance = posterior + (beta * math.sqrt(next_abar) / (1 - abar)) ** 2 * variance_of_x0
    fraction = math.log(true_variance / posterior) / math.log(beta / posterior) if index else 0.5
    assert 0 <= fraction <= 1
    return np.concatenate([eps, np.full_like(x, 2 * fraction - 1)], axis=1)


@pytest.mark.parametrize("steps", [5, 250])
def test_samples_of_an_exact_model_have_the_statistics_of_the_data(steps: int) -> None:
    """With the exact epsilon and variance, steps of any size are exact: the marginals are N(alpha m, alpha^2 s^2 + sigma^2).
    Tolerance: five standard errors of 16,384 values, plus 0.003 for the approximate start (N(0, 1) instead of q) and for
    the last step without noise (abar_0 = 0.9999)."""
    shape, seeds = (1, 64, 64), [10, 11, 12, 13]
    schedule = respaced_schedule(steps)
    path = ddpm(
        lambda x, t: exact_model(x, t, steps).astype(np.float32),
        batch_noise(seeds, shape),
        schedule,
        noise_of(seeds, shape),
    )
    count = len(seeds) * math.prod(shape)
    for x, sigma in zip(path, schedule.sigmas[1:], strict=True):
        alpha = math.sqrt(1 - sigma**2)
        deviation = math.hypot(alpha * DEVIATION, sigma)
        assert abs(x.mean() - alpha * MEAN) < 5 * deviation / math.sqrt(count) + 0.003
        assert abs(x.std() - deviation) < 5 * deviation / math.sqrt(2 * count) + 0.003
    standard = (x - x.mean()) / x.std()
    assert abs((standard**3).mean()) < 5 * math.sqrt(6 / count)
    assert abs((standard**4).mean() - 3) < 5 * math.sqrt(24 / count)
    neighbours = np.corrcoef(standard[..., 1:].ravel(), standard[..., :-1].ravel())[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(count)


@pytest.mark.parametrize("output", [-1.0, 1.0])
def test_learned_variance_ranges_from_the_posterior_variance_to_beta(output: float) -> None:
    timesteps = [700, 400, 0]
    a, b = ABAR[700], ABAR[400]
    beta = 1 - a / b
    variance = beta if output == 1 else beta * (1 - b) / (1 - a)
    x = np.zeros((1, 1, 1, 1))
    model = lambda x, t: np.concatenate([0 * x, 0 * x + output], axis=1)  # noqa: E731
    first = next(ddpm(model, x, schedule_at(timesteps), lambda step: np.ones((1, 1, 1, 1))))
    assert first.item() == pytest.approx(math.sqrt(variance), rel=1e-9)


# DDIM.


@pytest.mark.parametrize(("steps", "spacing"), [(1000, "leading"), (50, "trailing"), (4, "trailing")])
def test_ddim_agrees_with_diffusers(steps: int, spacing: str) -> None:
    """DDIMScheduler always steps by 1000 // N. With spacing "leading" and N = 1000 it visits our timesteps; its "trailing"
    timesteps end at 1000 / N - 1, followed by the data, and schedule_at follows those too."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    schedule = respaced_schedule(steps)
    if spacing == "trailing":
        schedule = schedule_at(scheduler.timesteps.tolist())
    assert scheduler.timesteps.tolist() == schedule.timesteps
    start = torch.from_numpy(gaussian_noise(1, (2, 3, 4, 4)))
    x = start
    for timestep, found in zip(
        scheduler.timesteps, ddim(in_numpy(wavy), start.numpy(), schedule), strict=True
    ):
        x = scheduler.step(wavy(x, timestep.expand(2))[:, :3], timestep, x).prev_sample
        assert np.abs(found - x.numpy()).max() <= 2e-4 * x.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_ddim_is_exact_for_data_of_a_single_point(steps: int) -> None:
    """With x0 known, x = alpha x0 + sigma noise with the same noise at every step."""
    x0, noise = np.array([0.7, -2.0]).reshape(1, 2, 1, 1), np.array([1.5, 0.1]).reshape(1, 2, 1, 1)
    schedule = respaced_schedule(steps)

    def line(sigma: float) -> Array:
        return math.sqrt(1 - sigma**2) * x0 + sigma * noise

    def epsilon(x: Array, timestep: float) -> Array:
        abar = ABAR[int(timestep)]
        return (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)

    path = ddim(epsilon, line(schedule.sigmas[0]), schedule)
    for x, sigma in zip(path, schedule.sigmas[1:], strict=True):
        np.testing.assert_allclose(x, line(sigma), atol=1e-9)


def test_ddim_converges_to_the_flow_of_normal_data() -> None:
    """The deterministic flow keeps the distance from the mean in standard deviations: x_T -> m + s z. Twice as many steps
    halve the error."""
    z = np.linspace(-2, 2, 9).reshape(1, 1, 3, 3)
    abar = ABAR[999]
    start = math.sqrt(abar) * MEAN + math.hypot(math.sqrt(abar) * DEVIATION, math.sqrt(1 - abar)) * z

    def error(steps: int) -> float:
        *_, x = ddim(lambda x, t: exact_model(x, t, steps), start, respaced_schedule(steps))
        return float(np.abs(x - (MEAN + DEVIATION * z)).max())

    assert error(1000) < 0.004
    assert error(125) / error(250) == pytest.approx(2, abs=0.2)
    assert error(250) / error(500) == pytest.approx(2, abs=0.2)


# The noise of each step.


def test_stream_zero_is_the_default_noise() -> None:
    np.testing.assert_array_equal(gaussian_noise(42, (7,), 0), gaussian_noise(42, (7,)))
    np.testing.assert_allclose(
        gaussian_noise(42, (5,)), [0.69011146, 1.7191701, -1.585883, 1.2368302, -0.87805885], rtol=3e-7
    )


@pytest.mark.parametrize("stream", [1, 249, MAX_SEED])
def test_each_stream_is_philox_from_its_own_counter(stream: int) -> None:
    words = philox_block((stream << 192) + 1, 7)  # numpy increments the counter before it draws
    expected = []
    for first, second in (words[:2], words[2:]):
        radius = math.sqrt(-2 * math.log(1 - (first >> 11) * 2.0**-53))
        angle = 2 * math.pi * (second >> 11) * 2.0**-53
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    np.testing.assert_allclose(gaussian_noise(7, (4,), stream), expected, rtol=2e-7)


def test_noise_of_different_steps_and_seeds_is_uncorrelated() -> None:
    rows = [gaussian_noise(seed, (20_000,), step) for seed in (0, 1) for step in range(4)]
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 5 / math.sqrt(20_000)
    assert all(abs(row.std() - 1) < 0.03 for row in rows)


@pytest.mark.parametrize("name", list(DIFFUSION_SAMPLERS))
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    shape, sampler = (2, 3, 3), DIFFUSION_SAMPLERS[name]

    def sample(seeds: list[int]) -> Array:
        *_, x = sampler.denoise(
            lambda x, t: np.concatenate([np.sin(x), np.cos(x)], axis=1),
            batch_noise(seeds, shape),
            sampler.schedule(20, 1.0),
            noise_of(seeds, shape),
        )
        return x

    together = sample([8, 9, MAX_SEED])
    for row, seed in zip(together, [8, 9, MAX_SEED], strict=True):
        np.testing.assert_array_equal(row, sample([seed])[0])
    assert np.abs(together[0] - together[1]).max() > 0.1
