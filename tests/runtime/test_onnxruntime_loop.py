"""Loops whose latents stay on the device, in CPU memory and with a fake driver."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fake_cuda import FakeDriver
from PIL import Image

from benchmarks import device_loop
from tpx_runtime.bundle import STEP, Bundle
from tpx_runtime.engine import ENGINES
from tpx_runtime.engine import onnxruntime as engine_module
from tpx_runtime.engine.cuda import Stream
from tpx_runtime.engine.onnxruntime_bound import MAX_BUFFER_SETS, BoundSession
from tpx_runtime.errors import BadInput, Cancelled, EngineFailed
from tpx_runtime.generator import Generator
from tpx_runtime.sampling import Array

from .fake_gpu import fake_gpu, open_bound

PROMPT = "a red cube"


@pytest.fixture(params=[True, False], ids=["graphs", "kernel by kernel"])
def graphs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeDriver:
    driver = fake_gpu(monkeypatch)
    graphs = "graphs" not in request.fixturenames or request.getfixturevalue("graphs")

    def opened(engine_name: str, path: Path) -> BoundSession:
        return open_bound(str(path), driver, path, graphs)

    monkeypatch.setattr(engine_module, "open_session", opened)
    return driver


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The plans of the loops started so far."""
    started: list[object] = []
    start = engine_module.start_loop

    def recording_start(transformer: Any, step: Any, plan: Any, table: Any) -> Any:
        started.append(plan)
        return start(transformer, step, plan, table)

    monkeypatch.setattr(engine_module, "start_loop", recording_start)
    monkeypatch.setenv("TPX_DEVICE_LOOP", "1")
    return started


def generator(bundle: Path, keep: bool = True) -> Generator:
    return Generator(Bundle.open(bundle), replace(ENGINES["onnxruntime"], has_device_loop=True), keep=keep)


def check_same(found: Generator, expected: Generator, prompt: str = PROMPT, **settings: Any) -> None:
    """Check that both give the same latents up to rounding."""
    jobs = found.plan(prompt, **settings)
    one, other = found.generate_latents(jobs), expected.generate_latents(jobs)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp2m", "unipc"])
def test_latents_equal_those_of_the_host_loop(
    tiny_bundle: Path, loops: list[object], sampler: str, graphs: bool
) -> None:
    on_device, host = generator(tiny_bundle), Generator.load(tiny_bundle, "onnxruntime")
    for number, settings in enumerate(
        ({"steps": 1}, {"steps": 4}, {"guidance": 1.0, "steps": 3}, {"num_images": 3, "depth": 1}), start=1
    ):
        check_same(on_device, host, sampler=sampler, **settings)
        assert len(loops) == number


def test_a_step_of_a_captured_loop_only_enqueues(
    tiny_bundle: Path, loops: list[object], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It uploads nothing, downloads nothing, and waits only for the step before it."""
    on_device = generator(tiny_bundle)
    jobs = on_device.plan(PROMPT, steps=5)
    for _ in range(3):
        on_device.generate_latents(jobs)
    transfers: list[list[int]] = []
    update, fetch = ort.OrtValue.update_inplace, ort.OrtValue.numpy

    def up(self: ort.OrtValue, array: np.ndarray) -> None:
        transfers.append(self.shape())
        update(self, array)

    def down(self: ort.OrtValue) -> np.ndarray:
        transfers.append(self.shape())
        fetched: np.ndarray = fetch(self)
        return fetched

    monkeypatch.setattr(ort.OrtValue, "update_inplace", up)
    monkeypatch.setattr(ort.OrtValue, "numpy", down)
    start, steps = engine_module.onnxruntime_loop.DeviceLoop.advance, []

    def advance(self: Any) -> None:
        transfers.clear()
        first = len(driver.order)
        start(self)
        calls = [name for name in driver.order[first:] if name not in ("cuCtxSetCurrent", "cuEventCreate")]
        steps.append((list(transfers), calls))

    monkeypatch.setattr(engine_module.onnxruntime_loop.DeviceLoop, "advance", advance)
    latents = [2, *on_device.generate_latents(jobs).shape[1:]]
    calls = ["cuGraphLaunch", "cuMemcpyDtoDAsync_v2", "cuGraphLaunch", "cuEventSynchronize", "cuEventRecord"]
    assert steps == [([], calls)] * 5
    assert transfers == [latents]  # at the end


def test_a_callback_gets_the_latents_of_each_step_and_can_stop(
    tiny_bundle: Path, loops: list[object]
) -> None:
    on_device, host = generator(tiny_bundle), Generator.load(tiny_bundle, "onnxruntime")
    seen: list[tuple[int, int, Array]] = []
    expected: list[tuple[int, int, Array]] = []
    for one_generator, calls in ((on_device, seen), (host, expected)):
        one_generator.generate_latents(
            one_generator.plan(PROMPT, sampler="heun", steps=3), lambda *args, calls=calls: calls.append(args)
        )
    assert len(loops) == 1 and [one[:2] for one in seen] == [(1, 3), (2, 3), (3, 3)]
    for one, other in zip(seen, expected, strict=True):
        np.testing.assert_allclose(one[2], other[2], rtol=1e-4, atol=1e-4)
    with pytest.raises(Cancelled, match="cancelled at step 2 of 3"):
        on_device.generate_latents(on_device.plan(PROMPT, steps=3), lambda step, total, latents: step < 2)
    check_same(on_device, host, steps=3)


def test_batch_sizes_and_numbers_of_steps_can_alternate(tiny_bundle: Path, loops: list[object]) -> None:
    """More sets of shapes than there are buffers, and the first ones again."""
    on_device, host = generator(tiny_bundle), Generator.load(tiny_bundle, "onnxruntime")
    for steps, images in [
        (2, 1),
        (3, 1),
        (2, 2),
        *((2, 3 + more) for more in range(MAX_BUFFER_SETS)),
        (2, 1),
    ]:
        check_same(on_device, host, steps=steps, num_images=images)
    check_same(on_device, host, steps=2, guidance_every=2)  # on the host, in the buffers of the loop
    check_same(on_device, host, steps=3, cache_interval=2)


def test_non_finite_latents_are_an_error_and_do_not_affect_the_next_call(
    tiny_bundle: Path, loops: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device, host = generator(tiny_bundle), Generator.load(tiny_bundle, "onnxruntime")
    check_same(on_device, host, steps=3)
    shape = on_device.manifest.model.latent_shape
    with monkeypatch.context() as patched:
        patched.setattr(
            "tpx_runtime.denoising.batch_noise", lambda seeds, _: np.full((1, *shape), np.nan, np.float32)
        )
        with pytest.raises(EngineFailed, match="expected finite numbers in the latents of step 3, found NaN"):
            on_device.generate_latents(on_device.plan(PROMPT, steps=3))
    check_same(on_device, host, steps=3)


def test_prompts_guidance_and_seeds_share_buffers(tiny_bundle: Path, loops: list[object]) -> None:
    on_device, host = generator(tiny_bundle), Generator.load(tiny_bundle, "onnxruntime")
    for prompt, settings in (
        (PROMPT, {}),
        ("a blue sphere", {}),
        ("a blue sphere", {"guidance": 5.0}),
        ("a blue sphere", {"seed": 4}),
        (PROMPT, {"sampler": "dpmpp2m"}),
        (PROMPT, {"depth": 1}),  # another transformer, with buffers of its own
        (PROMPT, {}),
    ):
        check_same(on_device, host, prompt, steps=3, **settings)
    assert len(loops) == 7


def test_graphs_are_released_without_keep(tiny_bundle: Path, loops: list[object]) -> None:
    check_same(generator(tiny_bundle, keep=False), Generator.load(tiny_bundle, "onnxruntime"), steps=2)
    assert len(loops) == 1


def test_a_mask_needs_the_host_loop_and_an_image_does_not(tiny_bundle: Path, loops: list[object]) -> None:
    on_device, host = generator(tiny_bundle), Generator.load(tiny_bundle, "onnxruntime")
    height, width = on_device.manifest.model.image_size_px
    image = Image.effect_noise((width, height), 60).convert("RGB")
    mask = Image.new("L", image.size, "black")
    mask.paste("white", (0, 0, width // 2, height))
    on_device(PROMPT, image=image, mask=mask, steps=4)
    assert loops == []
    jobs = on_device.plan(PROMPT, steps=4, strength=0.5)
    found = on_device.generate_latents(jobs, edit=on_device.edit(image))
    expected = host.generate_latents(jobs, edit=host.edit(image))
    assert len(loops) == 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_device_loop_can_be_turned_off_and_needs_the_step_graph(
    tiny_bundle: Path, loops: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("1", None):
        monkeypatch.setenv("TPX_DEVICE_LOOP", value) if value else monkeypatch.delenv("TPX_DEVICE_LOOP")
        assert ENGINES["onnxruntime-cuda"].device_loops and not ENGINES["onnxruntime"].device_loops
    without_step = generator(tiny_bundle)
    monkeypatch.setattr(type(without_step.bundle), "step", None)
    without_step(PROMPT, steps=2)
    monkeypatch.setenv("TPX_DEVICE_LOOP", "0")
    assert not ENGINES["onnxruntime-cuda"].device_loops
    generator(tiny_bundle)(PROMPT, steps=2)
    assert loops == []


def sessions_of(generator: Generator) -> list[Any]:
    """Its conditions graph, transformer at depth 3 and step graph."""
    bundle = generator.bundle
    assert bundle.step
    return [
        generator._graphs.open(path)
        for path in (bundle.conditions, bundle.transformer(3, "plain"), bundle.step)
    ]


def test_a_missing_output_is_an_error(tiny_bundle: Path, loops: list[Any]) -> None:
    on_device = generator(tiny_bundle)
    on_device.generate_latents(on_device.plan(PROMPT, steps=2))
    (plan,) = loops
    conditions, *others = sessions_of(on_device)
    step = others[1]
    table = engine_module.conditions_table(conditions, step, plan)
    with pytest.raises(
        EngineFailed, match=r"expected an output speed of shape \(2, .*\), found none; export"
    ):
        engine_module.start_loop(*others, replace(plan, prediction="speed"), table)
    wide = replace(plan, table_shape=(*plan.table_shape[:2], plan.table_shape[2] + 1))
    with pytest.raises(EngineFailed, match=r"expected an output conditions of shape \(\d+, \d+\), found \("):
        engine_module.conditions_table(conditions, step, wide)


def test_a_call_after_a_loop_uploads_its_inputs_again(tiny_bundle: Path, loops: list[Any]) -> None:
    """They are the arrays of the last call before the loop, which has overwritten their buffers since."""
    on_device = generator(tiny_bundle)
    on_device.generate_latents(on_device.plan(PROMPT, steps=2))
    (plan,) = loops
    conditions, transformer, step = sessions_of(on_device)
    inputs = plan.inputs
    before = transformer.run(inputs)
    loop = engine_module.start_loop(
        transformer, step, plan, engine_module.conditions_table(conditions, step, plan)
    )
    loop.advance()
    loop.advance()
    loop.wait()
    after = transformer.run(inputs)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_an_interrupted_loop_is_waited_for(
    tiny_bundle: Path, loops: list[Any], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nothing still writes to its memory when it is used again."""
    on_device, host = generator(tiny_bundle), Generator.load(tiny_bundle, "onnxruntime")
    check_same(on_device, host, steps=4)

    def interrupt(stream: Stream) -> None:
        raise KeyboardInterrupt

    jobs = on_device.plan(PROMPT, steps=4)
    with monkeypatch.context() as patched:
        patched.setattr(Stream, "mark", interrupt)
        with pytest.raises(KeyboardInterrupt):
            on_device.generate_latents(jobs)
    assert len(loops) == 2 and not any(driver.streams.values())
    check_same(on_device, host, steps=4)


def test_a_large_table_of_conditions_is_computed_in_parts(
    tiny_bundle: Path, loops: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device, host = generator(tiny_bundle), Generator.load(tiny_bundle, "onnxruntime")
    width = on_device.manifest.model.conditions_width
    monkeypatch.setattr("tpx_runtime.modulation.MAX_CALL_BYTES", 2 * 2 * 4 * width)
    check_same(on_device, host, steps=4)
    assert [len(inputs["timestep"]) for inputs in loops[0].condition_calls] == [4, 4, 2]


def test_the_step_graph_has_no_dynamic_shapes_computed_on_the_host(tiny_bundle: Path) -> None:
    """Everything that its nodes read is on the device, except constant shapes."""
    graph = onnx.load(tiny_bundle / STEP).graph
    assert {node.op_type for node in graph.node} == {
        "GreaterOrEqual",
        "Where",
        "Reshape",
        "Gather",
        "MatMul",
    }
    constants = {tensor.name for tensor in graph.initializer}
    assert all(node.input[1] in constants for node in graph.node if node.op_type == "Reshape")


def test_the_benchmark_compares_both_loops(tiny_bundle: Path, loops: list[object]) -> None:
    row = device_loop.measure(generator(tiny_bundle), PROMPT, batch=2, steps=3, rounds=2)
    assert len(loops) == 5 and row.batch == 2
    assert 0 < row.difference < 1e-4 and row.host_ms > 0 and row.device_ms > 0
    assert device_loop.table([row]).splitlines()[2].startswith("| 2 | ")


def test_rejects_a_callback_that_generates_and_the_next_call_works(
    tiny_bundle: Path, loops: list[object]
) -> None:
    on_device = generator(tiny_bundle)

    def generate(step: int, total: int, latents: Array) -> None:
        on_device(PROMPT, steps=1)

    with pytest.raises(
        BadInput, match="expected a callback that generates no images during a loop on the device"
    ):
        on_device(PROMPT, steps=3, callback=generate)
    check_same(on_device, Generator.load(tiny_bundle, "onnxruntime"), steps=3)
