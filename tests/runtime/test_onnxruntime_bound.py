"""ONNX Runtime with bound buffers and CUDA graphs, in CPU memory and with a fake driver; and tests on a GPU."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from fake_cuda import FakeDriver
from onnx import parser

from tpx_export.quantise.quantiser import QuantisationOptions
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import ENGINES
from tpx_runtime.engine import onnxruntime as engine_module
from tpx_runtime.engine.onnxruntime_bound import (
    MAX_BUFFER_SETS,
    MAX_CAPTURES,
    WARM_UP_CALLS,
    BoundSession,
    CudaGraphUnavailable,
)
from tpx_runtime.errors import EngineFailed
from tpx_runtime.generator import Generator
from tpx_runtime.verify import verify_bundle

from .fake_gpu import fake_gpu, open_bound

NO_GPU = ENGINES["onnxruntime-cuda"].problem()

ADD = parser.parse_model(
    '<ir_version: 8, opset_import: ["": 17]> g (float[n, 2] x, float[2] y) => (float[n, 2] sum) { sum = Add(x, y) }'
)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return fake_gpu(monkeypatch)


@pytest.fixture
def bound(driver: FakeDriver) -> BoundSession:
    return open_bound(ADD.SerializeToString(), driver)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the arrays uploaded to buffers."""
    seen: list[tuple[int, ...]] = []
    update = ort.OrtValue.update_inplace

    def recording_update(self: ort.OrtValue, array: np.ndarray) -> None:
        seen.append(array.shape)
        update(self, array)

    monkeypatch.setattr(ort.OrtValue, "update_inplace", recording_update)
    return seen


def test_outputs_are_not_shared_with_the_session(bound: BoundSession) -> None:
    x, y = np.ones((3, 2), np.float32), np.ones(2, np.float32)
    first = bound.run({"x": x, "y": y})["sum"]
    second = bound.run({"x": 2 * x, "y": y})["sum"]
    assert (first == 2).all() and (second == 3).all()


def test_only_changed_inputs_are_uploaded_again(bound: BoundSession, uploads: list[tuple[int, ...]]) -> None:
    x, y = np.ones((3, 2), np.float32), np.ones(2, np.float32)
    bound.run({"x": x, "y": y})
    assert uploads == [(3, 2), (2,)]
    uploads.clear()
    bound.run({"x": x, "y": y})
    assert uploads == []
    assert (bound.run({"x": x + 1, "y": y})["sum"] == 3).all()
    assert uploads == [(3, 2)]
    y[:] = 5  # the same array with other values
    assert (bound.run({"x": x, "y": y})["sum"] == 6).all()
    assert uploads == [(3, 2), (3, 2), (2,)]


def test_what_is_uploaded_for_one_loop_is_not_kept(bound: BoundSession) -> None:
    x, y = np.ones((3, 2), np.float32), np.ones(2, np.float32)
    buffers = bound.buffers({"x": x, "y": y})
    buffers.upload({"x": x, "y": y})
    buffers.launch()
    released = weakref.ref(x)
    del x
    assert released() is None
    y += 1  # the buffers cannot tell, so this is uploaded again
    buffers.upload_changed({"y": y})
    buffers.launch()
    assert (buffers.outputs["sum"].numpy() == 3).all()


def test_an_input_is_uploaded_again_after_another_upload(bound: BoundSession) -> None:
    x, y = np.ones((3, 2), np.float32), np.ones(2, np.float32)
    buffers = bound.buffers({"x": x, "y": y})
    buffers.upload_changed({"x": x, "y": y})
    buffers.upload({"y": y + 4})
    buffers.upload_changed({"x": x, "y": y})
    buffers.launch()
    assert (buffers.outputs["sum"].numpy() == 2).all()


def test_arrays_need_not_be_contiguous(bound: BoundSession) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    assert np.array_equal(bound.run({"x": x, "y": np.zeros(2, np.float32)})["sum"], x)


def test_each_set_of_shapes_keeps_buffers_up_to_a_limit(
    bound: BoundSession, uploads: list[tuple[int, ...]]
) -> None:
    y = np.zeros(2, np.float32)

    def run(rows: int) -> None:
        x = np.full((rows, 2), rows, np.float32)
        assert np.array_equal(bound.run({"x": x, "y": y})["sum"], x)

    def uploaded(rows: int) -> set[tuple[int, ...]]:
        uploads.clear()
        run(rows)
        return set(uploads)

    for rows in range(1, MAX_BUFFER_SETS + 1):
        assert uploaded(rows) == {(rows, 2), (2,)}
    assert uploaded(1) == {(1, 2)}
    # It evicts 2 rows, the least recently used.
    assert uploaded(MAX_BUFFER_SETS + 1) == {(MAX_BUFFER_SETS + 1, 2), (2,)}
    assert uploaded(2) == {(2, 2), (2,)}
    assert uploaded(1) == {(1, 2)}


@pytest.mark.parametrize(
    "inputs",
    [{}, {"x": np.ones((1, 2), np.float32)}, {"x": np.ones((1, 2)), "y": np.ones(2, np.float32)}],
)
def test_wrong_inputs_give_a_one_line_error_and_the_next_call_works(
    bound: BoundSession, inputs: dict[str, np.ndarray]
) -> None:
    good = {"x": np.ones((1, 2), np.float32), "y": np.ones(2, np.float32)}
    bound.run(good)
    with pytest.raises(EngineFailed, match=r"^add\.onnx: onnxruntime could not run it: ") as caught:
        bound.run(inputs)
    assert str(caught.value).isprintable()
    assert (bound.run(good)["sum"] == 2).all()


@pytest.mark.parametrize("graphs", [True, False])
def test_each_set_of_shapes_is_captured_once_in_its_third_call(driver: FakeDriver, graphs: bool) -> None:
    y = np.ones(2, np.float32)
    bound = open_bound(ADD.SerializeToString(), driver, graphs=graphs)
    session = bound._session
    runs = []
    for rows in (1, 1, 1, 1, 2, 2, 2, 1):
        out = bound.run({"x": np.full((rows, 2), rows, np.float32), "y": y})["sum"]
        assert np.array_equal(out, np.full((rows, 2), rows + 1, np.float32))
        runs.append((session.runs, session.captured))
    assert runs == (
        [(1, 0), (2, 0), (2, 1), (2, 1), (3, 1), (4, 1), (4, 2), (4, 2)]
        if graphs
        else [(n, 0) for n in range(1, 9)]
    )
    assert len(driver.launchable) == (2 if graphs else 0)
    for rows in range(3, 2 + MAX_BUFFER_SETS):
        bound.run({"x": np.ones((rows, 2), np.float32), "y": y})
    assert len(driver.launchable) == (1 if graphs else 0)  # that of 2 rows was evicted
    with pytest.raises(EngineFailed):
        bound.run({"x": np.ones((1, 2), np.float32)})
    assert not driver.launchable and not driver.graphs


def test_an_error_of_the_engine_is_not_replaced_by_one_of_releasing_its_graphs(
    driver: FakeDriver, bound: BoundSession
) -> None:
    y = np.ones(2, np.float32)
    for rows in (1, 2) * 3:
        bound.run({"x": np.ones((rows, 2), np.float32), "y": y})
    driver.fail["cuGraphExecDestroy"] = 700
    with pytest.raises(EngineFailed, match="could not run it"):
        bound.run({"x": np.ones((1, 2), np.float32)})
    assert bound._bound == {} and not driver.fail


def test_a_failed_launch_is_one_line_and_the_next_call_works(driver: FakeDriver, bound: BoundSession) -> None:
    inputs = {"x": np.ones((1, 2), np.float32), "y": np.ones(2, np.float32)}
    for _ in range(3):
        bound.run(inputs)
    driver.fail["cuGraphLaunch"] = 2
    with pytest.raises(
        EngineFailed, match=r"^expected CUDA's cuGraphLaunch to succeed, found .*OUT_OF_MEMORY"
    ):
        bound.run(inputs)
    assert (bound.run(inputs)["sum"] == 2).all()


def test_calls_make_the_context_current_in_their_thread(driver: FakeDriver, bound: BoundSession) -> None:
    inputs = {"x": np.ones((1, 2), np.float32), "y": np.ones(2, np.float32)}
    for _ in range(4):
        driver.current = 0  # as in a new thread
        bound.run(inputs)
        assert driver.current


def test_an_error_waits_for_what_was_enqueued(driver: FakeDriver, bound: BoundSession) -> None:
    """So nothing uses the memory that is released then."""
    inputs = {"x": np.ones((1, 2), np.float32), "y": np.ones(2, np.float32)}
    for _ in range(3):
        bound.run(inputs)

    def fail() -> None:
        with bound.running():
            bound.buffers(inputs).enqueue(bound.stream)
            assert driver.streams[bound.stream.handle]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not driver.streams[bound.stream.handle] and not bound._bound


def test_shared_memory_is_kept_for_a_few_shapes(bound: BoundSession) -> None:
    first = bound.memory("table", (1, 2))
    assert bound.memory("table", (1, 2)) is first
    for rows in range(2, 2 + MAX_BUFFER_SETS):
        assert bound.memory("table", (rows, 2)).shape() == [rows, 2]
    assert len(bound._memory) == MAX_BUFFER_SETS
    assert bound.memory("table", (1, 2)) is not first


def test_garbage_collection_frees_graphs(driver: FakeDriver) -> None:
    bound = open_bound(ADD.SerializeToString(), driver)
    for _ in range(3):
        bound.run({"x": np.ones((1, 2), np.float32), "y": np.ones(2, np.float32)})
    assert len(driver.launchable) == 1
    driver.order.clear()
    del bound
    gc.collect()
    assert driver.order == ["cuCtxSetCurrent", "cuGraphExecDestroy"] and not driver.launchable


def test_a_capture_that_needs_memory_is_repeated_later(
    driver: FakeDriver, bound: BoundSession, recwarn: pytest.WarningsRecorder
) -> None:
    bound._session.allocations = MAX_CAPTURES - 1
    inputs = {"x": np.ones((1, 2), np.float32), "y": np.ones(2, np.float32)}
    for call in range(9):
        assert (bound.run({**inputs, "x": np.full((1, 2), call, np.float32)})["sum"] == call + 1).all()
        assert not driver.capturing
    # Two calls before each attempt, which then runs as usual; the third attempt succeeds.
    assert (bound._session.runs, bound._session.captured) == (6, MAX_CAPTURES)
    assert len(driver.launchable) == 1 and not recwarn.list


@pytest.mark.parametrize("required", [False, True])
def test_a_capture_is_given_up_with_a_notice_or_an_error(
    driver: FakeDriver, bound: BoundSession, required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPX_CUDA_GRAPHS", "1" if required else "")
    bound._session.allocations = MAX_CAPTURES
    inputs = {"x": np.ones((1, 2), np.float32), "y": np.ones(2, np.float32)}
    for _ in range(WARM_UP_CALLS * MAX_CAPTURES):
        bound.run(inputs)
    if required:
        with pytest.raises(
            EngineFailed, match=r"^add\.onnx: onnxruntime could not run it: Failed to allocate"
        ):
            bound.run(inputs)
    else:
        with pytest.warns(CudaGraphUnavailable, match=r"^add\.onnx runs without a CUDA graph, .*: Failed to"):
            assert (bound.run(inputs)["sum"] == 2).all()
    for _ in range(4):
        assert (bound.run(inputs)["sum"] == 2).all()
    assert not driver.launchable or required  # after an error all starts anew


def test_graphs_run_in_the_order_of_the_stream_on_which_they_are_enqueued(driver: FakeDriver) -> None:
    """Two sessions, the second of which reads the output of the first, on the stream of the first."""
    first, second = (open_bound(ADD.SerializeToString(), driver) for _ in range(2))
    x, y = np.ones((1, 2), np.float32), np.ones(2, np.float32)
    one = first.buffers({"x": x, "y": y})
    one.upload({"x": x, "y": y})
    one.enqueue(first.stream)
    two = second.buffers({"x": x, "y": y}, {"x": one.outputs["sum"]})
    two.upload({"y": y})
    for number in range(2, 7):
        one.upload({"y": number * y})
        for buffers in (one, two):
            buffers.enqueue(first.stream)
        first.stream.wait()
        assert (two.outputs["sum"].numpy() == 2 + number).all()
    assert driver.streams[second.stream.handle] == []


@pytest.fixture
def requested_providers(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> list[Any]:
    """The providers passed to a fake InferenceSession, which cannot capture large.onnx."""
    providers_seen: list[Any] = []
    fake_session = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"])

    def load(model: str, options: object, providers: list[Any]) -> Any:
        providers_seen.extend(providers)
        if "enable_cuda_graph" in providers[0][1] and "large" in model:
            raise RuntimeError("This session cannot use the graph capture feature")
        return fake_session

    monkeypatch.setattr(ort, "InferenceSession", load)
    monkeypatch.setattr(engine_module, "_idle_streams", [])
    return providers_seen


@pytest.mark.parametrize(("value", "graphs"), [("1", True), ("0", False), (None, True), ("", True)])
def test_the_gpu_engine_binds_and_captures_graphs_by_default(
    value: str | None, graphs: bool, requested_providers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TPX_CUDA_GRAPHS", raising=False)
    if value is not None:
        monkeypatch.setenv("TPX_CUDA_GRAPHS", value)
    opened = engine_module.open_session("onnxruntime-cuda", Path("small.onnx"))
    assert isinstance(opened, BoundSession)
    expected = {"use_tf32": "0", "user_compute_stream": str(opened.stream.handle)}
    if graphs:
        expected["enable_cuda_graph"] = "1"
    assert requested_providers == [("CUDAExecutionProvider", expected)]
    assert (opened._device, opened._graphs) == ("cuda", graphs)


def test_only_autoencoders_in_float16_may_use_tf32(
    half_export: tuple[Path, object], tiny_bundle: Path, requested_providers: list[Any]
) -> None:
    """Without TF32, ONNX Runtime would not use the tensor cores for their float16 convolutions either."""
    for path, allowed in ((half_export[0], {"vae_decoder", "vae_encoder"}), (tiny_bundle, set())):
        for graph in Bundle.open(path, verify=False).graphs("fused"):
            engine_module.open_session("onnxruntime-cuda", graph.path)
            assert requested_providers[-1][1]["use_tf32"] == str(int(graph.name in allowed))


def test_a_stream_is_used_by_one_session_at_a_time(
    requested_providers: list[Any], driver: FakeDriver
) -> None:
    opened = [engine_module.open_session("onnxruntime-cuda", Path("small.onnx")) for _ in range(2)]
    first, second = (session.stream.handle for session in opened)  # type: ignore[attr-defined]
    assert first != second
    del opened
    gc.collect()
    again = [engine_module.open_session("onnxruntime-cuda", Path("small.onnx")) for _ in range(2)]
    assert {session.stream.handle for session in again} == {first, second}  # type: ignore[attr-defined]
    assert len(driver.streams) == 2


def test_libraries_are_preloaded_once_without_output(
    requested_providers: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preloads: list[int] = []
    monkeypatch.setattr(ort, "preload_dlls", lambda: (preloads.append(1), print("libcublas: none")))
    engine_module._preload_libraries.cache_clear()
    for _ in range(2):
        engine_module.open_session("onnxruntime-cuda", Path("small.onnx"))
    engine_module._preload_libraries.cache_clear()
    assert (preloads, capsys.readouterr().out) == ([1], "")


def test_a_graph_that_cannot_be_captured_runs_without_cuda_graphs(
    requested_providers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TPX_CUDA_GRAPHS", raising=False)
    with pytest.warns(
        CudaGraphUnavailable, match=r"^large\.onnx runs without a CUDA graph, .*: This session cannot use"
    ):
        opened = engine_module.open_session("onnxruntime-cuda", Path("large.onnx"))
    assert isinstance(opened, BoundSession)
    assert not opened._graphs
    assert ["enable_cuda_graph" in provider_options for _, provider_options in requested_providers] == [
        True,
        False,
    ]
    monkeypatch.setenv("TPX_CUDA_GRAPHS", "1")
    with pytest.raises(
        EngineFailed, match=r"large\.onnx: onnxruntime could not load it: This session cannot use"
    ):
        engine_module.open_session("onnxruntime-cuda", Path("large.onnx"))


def test_bound_buffers_give_the_same_image(
    tiny_bundle: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Generator.load(tiny_bundle, "onnxruntime")("a red cube", steps=3, num_images=3, batch_size=2)

    def opened(engine_name: str, path: Path) -> BoundSession:
        return open_bound(str(path), driver, path)

    monkeypatch.setattr(engine_module, "open_session", opened)
    images = Generator.load(tiny_bundle, "onnxruntime")("a red cube", steps=3, num_images=3, batch_size=2)
    assert [list(one.getdata()) for one in images] == [list(one.getdata()) for one in expected]


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
@pytest.mark.parametrize("graphs", ["1", "0"])
@pytest.mark.parametrize("loop", ["1", "0"])
def test_results_on_a_gpu_match_the_cpu(
    tiny_bundle: Path, graphs: str, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPX_CUDA_GRAPHS", graphs)
    monkeypatch.setenv("TPX_DEVICE_LOOP", loop)
    bundle, engine = Bundle.open(tiny_bundle), ENGINES["onnxruntime-cuda"]
    assert all(part.ok for part in verify_bundle(bundle, engine))
    generator = Generator(bundle, engine)
    for _ in range(WARM_UP_CALLS + 2):  # until every graph has been captured, and launched again
        images = generator("a red cube", steps=3, num_images=3, batch_size=2)
    expected = Generator.load(tiny_bundle, "onnxruntime")("a red cube", steps=3, num_images=3, batch_size=2)
    for one, other in zip(images, expected, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-weights", "int4-weights"])
def test_every_precision_is_within_its_tolerances_on_a_gpu(
    precision: str, export_once: Callable[..., tuple[Path, object]]
) -> None:
    quantisation = None if precision == "fp16" else QuantisationOptions(accept_loss=True, score_prompts=0)
    out, _ = export_once(f"{precision}-gpu", depth=2, precision=precision, quantisation=quantisation)
    reports = verify_bundle(Bundle.open(out), ENGINES["onnxruntime-cuda"])
    assert not [str(part) for part in reports if not part.ok]
