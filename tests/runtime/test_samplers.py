"""Flow samplers: schedules as in diffusers, the order of convergence of each method, and steps computed by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest

from tpx_runtime.sampling import TRAIN_TIMESTEPS, Array, Schedule
from tpx_runtime.sampling.flow import FLOW_SAMPLERS, dpmpp2m, unipc

# (sigma, timestep) at some steps, from diffusers 0.42.1's schedulers at shift 3; heun's are euler's, with
# every one but the first used twice.
DIFFUSERS = {
    ("euler", 1): {0: (1, 1000)},
    ("dpmpp2m", 1): {0: (0.999666452, 999)},
    ("unipc", 1): {0: (0.999998987, 999)},
    ("euler", 4): {
        0: (1, 1000),
        1: (0.857692301, 857.692322),
        2: (0.602150559, 602.150574),
        3: (0.00892857183, 8.9285717),
    },
    ("dpmpp2m", 4): {
        0: (0.999666452, 999),
        1: (0.899639785, 899),
        2: (0.749624789, 749),
        3: (0.499666542, 499),
    },
    ("unipc", 4): {0: (0.999998987, 999), 1: (0.90011996, 900), 2: (0.750374794, 750), 3: (0.500998974, 500)},
    ("euler", 10): {
        1: (0.960129321, 960.129333),
        4: (0.790368259, 790.368286),
        9: (0.00892857183, 8.9285717),
    },
    ("dpmpp2m", 10): {1: (0.963941097, 963), 4: (0.817809701, 817), 9: (0.249791637, 249)},
    ("unipc", 10): {1: (0.964323997, 964), 4: (0.818429649, 818), 9: (0.251872182, 251)},
    ("euler", 28): {
        1: (0.987380624, 987.380615),
        14: (0.737055838, 737.055847),
        26: (0.110905729, 110.905731),
        27: (0.00892857183, 8.9285717),
    },
    ("dpmpp2m", 28): {1: (0.987467349, 987), 14: (0.749624789, 749), 27: (0.0999066606, 99)},
    ("unipc", 28): {1: (0.987817347, 987), 14: (0.750374794, 750), 27: (0.102515474, 102)},
    ("euler", 50): {
        1: (0.993124366, 993.12439),
        12: (0.902787924, 902.787903),
        25: (0.743435621, 743.435608),
        49: (0.00892857183, 8.9285717),
    },
    ("dpmpp2m", 50): {
        1: (0.992907465, 992),
        12: (0.904402673, 904),
        25: (0.749624789, 749),
        49: (0.057636831, 57),
    },
    ("unipc", 50): {
        1: (0.993250072, 993),
        12: (0.904875278, 904),
        25: (0.750374794, 750),
        49: (0.0604053885, 60),
    },
}
ORDERS = {"euler": 1, "heun": 2, "dpmpp2m": 2, "unipc": 3}  # UniPC-2's corrector adds one
NAMES = list(FLOW_SAMPLERS)


@pytest.mark.parametrize(("name", "steps"), list(DIFFUSERS), ids=lambda value: str(value))
def test_schedule_matches_diffusers(name: str, steps: int) -> None:
    schedule = FLOW_SAMPLERS[name].schedule(steps, 3.0)
    assert len(schedule.sigmas) == steps + 1
    assert len(schedule.timesteps) == steps
    assert schedule.sigmas[-1] == 0
    for step, (sigma, timestep) in DIFFUSERS[name, steps].items():
        assert schedule.sigmas[step] == pytest.approx(sigma, rel=2e-8, abs=6e-8)
        assert schedule.timesteps[step] == pytest.approx(timestep, abs=1e-4)


def test_first_alpha_of_unipc_keeps_its_float32_rounding() -> None:
    """diffusers' 1 - float32(1 - 1e-6): the second step's log-SNR depends on it."""
    assert 1 - FLOW_SAMPLERS["unipc"].schedule(10, 3.0).sigmas[0] == pytest.approx(
        1.0132789611816406e-06, rel=1e-9
    )


def test_heun_uses_the_schedule_of_euler() -> None:
    assert FLOW_SAMPLERS["heun"].schedule(10, 3.0) == FLOW_SAMPLERS["euler"].schedule(10, 3.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [0.01, 0.3, 1.0, 3.0, 12.0, 100.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 50, TRAIN_TIMESTEPS])
def test_every_allowed_schedule_decreases_and_gives_finite_samples(
    name: str, shift: float, steps: int
) -> None:
    schedule = FLOW_SAMPLERS[name].schedule(steps, shift)
    assert all(a > b for a, b in pairwise(schedule.sigmas))
    assert 0 <= min(schedule.timesteps) <= max(schedule.timesteps) <= 1000
    *_, x = FLOW_SAMPLERS[name].sample(lambda x, t: x * 0.1, np.ones((1, 1), np.float32), schedule)
    assert np.isfinite(x).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_calls_the_model_at_each_timestep_of_the_schedule(name: str, steps: int) -> None:
    timesteps: list[float] = []
    noise = np.linspace(-1, 1, 6, dtype=np.float32).reshape(1, 2, 3)
    before = noise.copy()

    def velocity(x: Array, timestep: float) -> Array:
        timesteps.append(timestep)
        return 0.2 * x

    schedule = FLOW_SAMPLERS[name].schedule(steps, 3.0)
    path = list(FLOW_SAMPLERS[name].sample(velocity, noise, schedule))
    calls = 2 if name == "heun" else 1
    assert timesteps == [t for i, t in enumerate(schedule.timesteps) for _ in range(calls if i else 1)]
    assert len(path) == steps
    assert all(x.dtype == np.float32 and x.shape == noise.shape for x in path)
    assert (noise == before).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_is_exact_for_data_of_a_single_point(name: str, steps: int) -> None:
    """With x0 known, the path is the straight line to it, and every method stays on that line."""
    x0, noise = np.array([0.7, -2.0]), np.array([1.5, 0.1])
    schedule = FLOW_SAMPLERS[name].schedule(steps, 3.0)
    schedule = Schedule(schedule.sigmas, [1000 * sigma for sigma in schedule.sigmas[:-1]])

    def line(sigma: float) -> Array:
        return (1 - sigma) * x0 + sigma * noise

    def velocity(x: Array, timestep: float) -> Array:
        return (x - x0) / (timestep / 1000)

    path = FLOW_SAMPLERS[name].sample(velocity, line(schedule.sigmas[0]), schedule)
    for x, sigma in zip(path, schedule.sigmas[1:], strict=True):
        np.testing.assert_allclose(x, line(sigma), atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_convergence(name: str) -> None:
    """Twice as many steps divide the error by 2^order, for the flow of normal data, which has a closed form."""
    mean, deviation = 0.3, 0.5
    z = np.array([-1.3, 0.2, 2.1])

    def std(sigma: float) -> float:
        return math.hypot((1 - sigma) * deviation, sigma)

    def solution(sigma: float) -> Array:
        return (1 - sigma) * mean + std(sigma) * z

    def velocity(x: Array, timestep: float) -> Array:
        sigma = timestep / 1000
        slope = (sigma - (1 - sigma) * deviation**2) / std(sigma) ** 2
        return -mean + slope * (x - (1 - sigma) * mean)

    def error(steps: int) -> float:
        log_snr = np.linspace(math.log(0.05 / 0.95), math.log(0.95 / 0.05), steps + 1)
        sigmas = (1 / (1 + np.exp(log_snr))).tolist()
        schedule = Schedule(sigmas, [1000 * sigma for sigma in sigmas[:-1]])
        *_, x = FLOW_SAMPLERS[name].sample(velocity, solution(sigmas[0]), schedule)
        return float(np.abs(x - solution(sigmas[-1])).max())

    assert math.log2(error(64) / error(128)) == pytest.approx(ORDERS[name], abs=0.1)


def field(x: float, timestep: float) -> float:
    """An arbitrary velocity, nonlinear in x and time."""
    return math.sin(2 * x) + x * timestep / 500 - 0.4


def sample_path(name: str, sigmas: list[float], start: float) -> list[float]:
    schedule = Schedule(sigmas, [1000 * sigma for sigma in sigmas[:-1]])
    path = FLOW_SAMPLERS[name].sample(
        lambda x, t: np.array([field(float(x[0]), t)]), np.array([start]), schedule
    )
    return [float(x[0]) for x in path]


def test_euler_and_heun_steps_by_hand() -> None:
    a, b, end = sigmas = [0.8, 0.5, 0.0]
    x = 0.6
    slope = field(x, 1000 * a)
    euler_1 = x + (b - a) * slope
    heun_1 = x + (b - a) * (slope + field(euler_1, 1000 * b)) / 2
    assert sample_path("euler", sigmas, x) == pytest.approx([euler_1, euler_1 - b * field(euler_1, 1000 * b)])
    assert sample_path("heun", sigmas, x) == pytest.approx(
        [heun_1, heun_1 + (end - b) * field(heun_1, 1000 * b)]
    )


def test_dpmpp2m_steps_by_hand() -> None:
    """Algorithm 2 of arXiv:2211.01095, as printed there."""
    s0, s1, s2, _ = sigmas = [0.85, 0.6, 0.2, 0.0]  # steps of different sizes in log-SNR
    lambdas = [math.log((1 - sigma) / sigma) for sigma in (s0, s1, s2)]
    h1, h2 = lambdas[1] - lambdas[0], lambdas[2] - lambdas[1]
    x = 0.6
    m0 = x - s0 * field(x, 1000 * s0)
    x1 = s1 / s0 * x - (1 - s1) * (math.exp(-h1) - 1) * m0
    m1 = x1 - s1 * field(x1, 1000 * s1)
    r = h1 / h2
    d = (1 + 1 / (2 * r)) * m1 - 1 / (2 * r) * m0
    x2 = s2 / s1 * x1 - (1 - s2) * (math.exp(-h2) - 1) * d
    x3 = x2 - s2 * field(x2, 1000 * s2)  # to sigma = 0 the step is x0 itself
    assert sample_path("dpmpp2m", sigmas, x) == pytest.approx([x1, x2, x3], rel=1e-12)


def test_unipc_steps_by_hand() -> None:
    """UniPC-2 with B2(h) and its corrector in diffusers' terms, the 2 x 2 system solved by Cramer's rule."""
    s0, s1, s2, _ = sigmas = [0.85, 0.6, 0.2, 0.0]  # steps of different sizes in log-SNR
    lambdas = [math.log((1 - sigma) / sigma) for sigma in (s0, s1, s2)]
    h1, h2 = lambdas[1] - lambdas[0], lambdas[2] - lambdas[1]
    b1, b2 = math.expm1(-h1), math.expm1(-h2)
    x = 0.6
    m0 = x - s0 * field(x, 1000 * s0)
    predicted_1 = s1 / s0 * x - (1 - s1) * b1 * m0
    m1 = predicted_1 - s1 * field(predicted_1, 1000 * s1)
    corrected_1 = predicted_1 - (1 - s1) * b1 * 0.5 * (m1 - m0)
    r = -h1 / h2  # (lambda_0 - lambda_1) / h2
    d1 = (m0 - m1) / r
    base = s2 / s1 * corrected_1 - (1 - s2) * b2 * m1
    predicted_2 = base - (1 - s2) * b2 * 0.5 * d1
    m2 = predicted_2 - s2 * field(predicted_2, 1000 * s2)
    phi_2 = b2 / -h2 - 1
    phi_3 = phi_2 / -h2 - 0.5
    right_1, right_2 = phi_2 / b2, 2 * phi_3 / b2
    rho_1 = (right_1 - right_2) / (1 - r)  # rho_1 + rho_2 = right_1; r rho_1 + rho_2 = right_2
    rho_2 = (right_2 - r * right_1) / (1 - r)
    corrected_2 = base - (1 - s2) * b2 * (rho_1 * d1 + rho_2 * (m2 - m1))
    # The last step goes from the corrected state, but with the x0 of the predicted one.
    assert sample_path("unipc", sigmas, x) == pytest.approx([predicted_1, predicted_2, m2], rel=1e-12)
    assert sample_path("unipc", [*sigmas[:3], 0.1, 0.0], x)[2] == pytest.approx(
        third_step(corrected_2, m1, m2, h2, s2, 0.1), rel=1e-12
    )


def third_step(x: float, m1: float, m2: float, h2: float, sigma: float, next_sigma: float) -> float:
    """UniPC's predictor from the corrected state of the step before."""
    h3 = math.log((1 - next_sigma) / next_sigma) - math.log((1 - sigma) / sigma)
    growth = math.expm1(-h3)
    difference = (m1 - m2) / (-h2 / h3)
    return next_sigma / sigma * x - (1 - next_sigma) * growth * (m2 + 0.5 * difference)


def test_rows_of_a_batch_are_independent() -> None:
    rows = np.random.default_rng(1).standard_normal((3, 2)).astype(np.float32)
    for sampler in (dpmpp2m, unipc):
        schedule = FLOW_SAMPLERS[sampler.__name__].schedule(6, 3.0)
        *_, together = sampler(lambda x, t: np.sin(x), rows, schedule)
        for row in range(3):
            *_, single = sampler(lambda x, t: np.sin(x), rows[row : row + 1], schedule)
            np.testing.assert_array_equal(together[row : row + 1], single)
