"""Conditions computed ahead of the loop: the graph's outputs for all timesteps in few calls, with any sampler."""

import numpy as np
import pytest

from tpx_runtime import modulation
from tpx_runtime.engine import Arrays
from tpx_runtime.errors import EngineFailed
from tpx_runtime.manifest import ModelSpec
from tpx_runtime.modulation import Conditions
from tpx_runtime.sampling import SAMPLERS_FOR, Array
from tpx_runtime.sampling.diffusion import DIFFUSION_SAMPLERS
from tpx_runtime.sampling.flow import FLOW_SAMPLERS

from .fakes import CLASSES, MODEL, FakeSession, conditions

rng = np.random.default_rng(5)
POOLED = rng.standard_normal((4, MODEL.pooled_width)).astype(np.float32)
TIMES = [1000.0, 700.5, 400.0, 100.0]


def session(model: ModelSpec = MODEL) -> FakeSession:
    return FakeSession("conditions", conditions(model), [])


def expected(conditioning: Arrays, timestep: float, model: ModelSpec = MODEL) -> Array:
    times = np.full(len(next(iter(conditioning.values()))), timestep, np.float32)
    return conditions(model)({"timestep": times, **conditioning})["conditions"]


def test_all_steps_and_rows_are_computed_in_one_call_on_first_use() -> None:
    graph = session()
    table = Conditions(lambda: graph, MODEL, {"pooled": POOLED}, TIMES)
    assert graph.calls == []
    for timestep in TIMES:
        np.testing.assert_array_equal(table.for_timestep(timestep), expected({"pooled": POOLED}, timestep))
    ((_, inputs),) = graph.calls
    assert {name: (value.dtype, value.shape) for name, value in inputs.items()} == {
        "timestep": (np.float32, (16,)),
        "pooled": (np.float32, (16, 7)),
    }


def test_equal_rows_are_computed_once_and_returned_in_their_places() -> None:
    graph = session()
    conditioning = {"pooled": POOLED[[2, 2, 0, 1, 0]]}
    table = Conditions(lambda: graph, MODEL, conditioning, TIMES)
    for timestep in reversed(TIMES):
        np.testing.assert_array_equal(table.for_timestep(timestep), expected(conditioning, timestep))
    assert sum(len(inputs["timestep"]) for _, inputs in graph.calls) == 3 * (4 + 3 + 2 + 1)


def test_a_table_matches_only_the_same_batch_and_steps() -> None:
    conditioning = {"pooled": POOLED[[2, 0, 2]]}
    table = Conditions(session, MODEL, conditioning, TIMES)
    assert table.matches({"pooled": conditioning["pooled"].copy()}, TIMES)
    for rows in ([2, 0, 1], [0, 2, 2], [2, 0], [2, 0, 2, 2]):
        assert not table.matches({"pooled": POOLED[rows]}, TIMES)
    for times in (TIMES[1:], TIMES[::-1], [*TIMES, 50.0]):
        assert not table.matches(conditioning, times)


def test_classes_are_passed_as_integers() -> None:
    graph, conditioning = session(CLASSES.model), {"class_id": np.array([13, 13, 7, 2])}
    table = Conditions(lambda: graph, CLASSES.model, conditioning, TIMES)
    np.testing.assert_array_equal(table.for_timestep(400.0), expected(conditioning, 400.0, CLASSES.model))
    assert graph.calls[0][1]["class_id"].dtype == np.int64
    assert len(graph.calls[0][1]["class_id"]) == 6


@pytest.mark.parametrize(
    ("steps_at_once", "calls"), [(0, [4] * 4), (1, [4] * 4), (2, [8, 8]), (3, [12, 4]), (4, [16]), (9, [16])]
)
def test_a_table_over_the_size_limit_is_computed_a_few_steps_at_a_time(
    monkeypatch: pytest.MonkeyPatch, steps_at_once: int, calls: list[int]
) -> None:
    row = 4 * MODEL.conditions_width * len(POOLED)
    monkeypatch.setattr(modulation, "MAX_TABLE_BYTES", steps_at_once * row + row // 2)
    graph = session()
    table = Conditions(lambda: graph, MODEL, {"pooled": POOLED}, TIMES)
    for timestep in TIMES:
        for _ in range(2):
            np.testing.assert_array_equal(
                table.for_timestep(timestep), expected({"pooled": POOLED}, timestep)
            )
        assert sum(array.nbytes for array in table._cached.values()) <= max(1, steps_at_once) * row
    assert [len(inputs["timestep"]) for _, inputs in graph.calls] == calls


def test_a_table_of_several_calls_opens_the_graph_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the transformer need not be in memory together with it."""
    monkeypatch.setattr(modulation, "MAX_CALL_BYTES", 3 * 4 * MODEL.conditions_width * len(POOLED))
    opened: list[FakeSession] = []

    def open_graph() -> FakeSession:
        opened.append(session())
        return opened[-1]

    table = Conditions(open_graph, MODEL, {"pooled": POOLED}, TIMES)
    for timestep in TIMES:
        np.testing.assert_array_equal(table.for_timestep(timestep), expected({"pooled": POOLED}, timestep))
    [graph] = opened
    assert [len(inputs["timestep"]) for _, inputs in graph.calls] == [12, 4]


def test_an_unplanned_timestep_is_exact_and_does_not_change_the_table() -> None:
    graph = session()
    table = Conditions(lambda: graph, MODEL, {"pooled": POOLED}, TIMES)
    for timestep in (1000.0, 850.25, 700.5, 850.25, 400.0):
        np.testing.assert_array_equal(table.for_timestep(timestep), expected({"pooled": POOLED}, timestep))
    assert [len(inputs["timestep"]) for _, inputs in graph.calls] == [16, 4, 4]


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("name", [*FLOW_SAMPLERS, *DIFFUSION_SAMPLERS])
def test_no_sampler_requests_a_timestep_outside_its_schedule(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each timestep is computed once, even if the table holds only one step."""
    monkeypatch.setattr(modulation, "MAX_TABLE_BYTES", 0)
    graph, conditioning = session(), {"pooled": POOLED[:1]}
    sampler = {**SAMPLERS_FOR["velocity"], **SAMPLERS_FOR["epsilon"]}[name]
    schedule = sampler.schedule(steps, 3.0)
    table = Conditions(lambda: graph, MODEL, conditioning, schedule.timesteps)

    def prediction(x: Array, timestep: float) -> Array:
        np.testing.assert_array_equal(table.for_timestep(timestep), expected(conditioning, timestep))
        return np.zeros_like(x)

    noise = np.ones((1, *MODEL.latent_shape), np.float32)
    assert len(list(sampler.denoise(prediction, noise, schedule, lambda step: noise))) == steps
    computed = [float(inputs["timestep"][0]) for _, inputs in graph.calls]
    assert computed == [float(np.float32(timestep)) for timestep in dict.fromkeys(schedule.timesteps)]


@pytest.mark.parametrize("shape", [(16, 10), (15, 11), (16,)])
def test_rejects_conditions_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    graph = FakeSession("conditions", lambda inputs: {"conditions": np.zeros(shape, np.float32)}, [])
    table = Conditions(lambda: graph, MODEL, {"pooled": POOLED}, TIMES)
    with pytest.raises(EngineFailed, match=r"expected an output conditions of shape \(16, 11\), found \(1"):
        table.for_timestep(TIMES[0])
