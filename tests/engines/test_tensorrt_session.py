"""Running built engines without a GPU: a fake driver and a fake TensorRT compute in host memory."""

import gc
import json
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeDriver, install
from fake_tensorrt import FakeEngineFunction, FakeTensorRt

from tpx_runtime.engine import cuda, tensorrt_flavours
from tpx_runtime.engine import tensorrt_session as module
from tpx_runtime.engine.tensorrt_flavours import FULL, RTX, Flavour
from tpx_runtime.engine.tensorrt_session import TensorRtSession
from tpx_runtime.errors import EngineFailed, EngineUnavailable

PATH = Path("bundle/transformer/depth-2.onnx")
WIDE = FakeEngineFunction(
    lambda x, context, ids: {
        "y": x * 2 + context.sum((1, 2))[:, None] + ids[:, None],
        "routes": ids[:, None] * np.array([[1, 10]]),
    },
    inputs={"x": ("FLOAT", (-1, 5)), "context": ("FLOAT", (-1, 3, 4)), "ids": ("INT64", (-1,))},
    outputs={"y": ("FLOAT", (-1, 5)), "routes": ("INT64", (-1, 2))},
)
ODD = FakeEngineFunction(
    lambda x: {"y": x}, inputs={"x": ("INT8", (-1, 2))}, outputs={"y": ("INT8", (-1, 2))}
)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    install(monkeypatch, fake)
    return fake


@pytest.fixture
def trt(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRt]:
    fake = FakeTensorRt(driver, wide=WIDE, odd=ODD)
    tensorrt_flavours.get_logger.cache_clear()
    for target_module in (module, tensorrt_flavours):
        monkeypatch.setattr(target_module, "bindings", lambda flavour: fake)
    yield fake
    tensorrt_flavours.get_logger.cache_clear()


Open = Callable[..., TensorRtSession]


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """The cache file of kernels that TensorRT for RTX compiles."""
    return tmp_path / "text.kernels"


@pytest.fixture
def open_session(trt: FakeTensorRt, driver: FakeDriver, kernels: Path) -> Iterator[Open]:
    """Opens sessions, and checks at the end that everything was freed."""

    def make(
        name: str = "wide",
        batch: tuple[int, int] = (1, 4),
        graphs: bool = False,
        flavour: Flavour = FULL,
    ) -> TensorRtSession:
        engine = json.dumps(name).encode()
        return TensorRtSession(flavour, cuda.Driver(), engine, batch, PATH, kernels, graphs)

    gc.freeze()  # collect only objects created by the test
    yield make
    gc.collect()
    gc.unfreeze()
    assert (driver.held, trt.alive) == ({}, [])


def inputs(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, 5)).astype(np.float32),
        "context": rng.standard_normal((rows, 3, 4)).astype(np.float32),
        "ids": rng.integers(0, 9, rows),
    }


def run_and_check(session: TensorRtSession, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the session, and compare its outputs with numpy."""
    outputs = session.run(arrays)
    expected = WIDE.function(**arrays)
    assert outputs.keys() == {"y", "routes"}
    np.testing.assert_allclose(outputs["y"], expected["y"], rtol=1e-5)
    np.testing.assert_array_equal(outputs["routes"], expected["routes"])
    assert (outputs["y"].dtype, outputs["routes"].dtype) == (np.float32, np.int64)
    return outputs


def test_outputs_match_numpy_and_are_not_overwritten(open_session: Open) -> None:
    session = open_session()
    first = run_and_check(session, inputs(2))
    copies = {name: array.copy() for name, array in first.items()}
    run_and_check(session, inputs(3, seed=1))
    run_and_check(session, inputs(1, seed=2))
    # Later calls do not overwrite earlier outputs.
    for name, array in first.items():
        np.testing.assert_array_equal(array, copies[name])


def test_buffers_are_reused_for_the_same_or_fewer_rows(open_session: Open, driver: FakeDriver) -> None:
    session = open_session()
    for seed in range(4):
        run_and_check(session, inputs(4, seed))
    assert driver.calls["cuMemAlloc_v2"] == driver.calls["cuMemAllocHost_v2"] == 5
    run_and_check(session, inputs(2))
    run_and_check(session, inputs(4))
    assert driver.calls["cuMemAlloc_v2"] == 5


def test_a_buffer_that_is_too_small_is_replaced(open_session: Open, driver: FakeDriver) -> None:
    session = open_session()
    run_and_check(session, inputs(1))
    run_and_check(session, inputs(4))
    assert (driver.calls["cuMemAlloc_v2"], driver.calls["cuMemFree_v2"], len(driver.device)) == (10, 5, 5)


def test_unchanged_inputs_are_not_uploaded_again(open_session: Open, driver: FakeDriver) -> None:
    session, arrays = open_session(), inputs(2)
    run_and_check(session, arrays)
    assert driver.calls["cuMemcpyHtoDAsync_v2"] == 3
    run_and_check(session, {**arrays, "x": arrays["x"] + 1})
    assert driver.calls["cuMemcpyHtoDAsync_v2"] == 4
    run_and_check(session, {name: array.copy() for name, array in arrays.items()})
    assert driver.calls["cuMemcpyHtoDAsync_v2"] == 7


def test_inputs_changed_in_place_are_uploaded(open_session: Open, driver: FakeDriver) -> None:
    session, arrays = open_session(), inputs(2)
    run_and_check(session, arrays)
    arrays["context"][1, 2, 3] += 1
    run_and_check(session, arrays)
    assert driver.calls["cuMemcpyHtoDAsync_v2"] == 4


def test_alternating_shapes_give_correct_outputs(open_session: Open) -> None:
    session, arrays = open_session(), inputs(2)
    run_and_check(session, arrays)
    run_and_check(session, inputs(1, seed=3))
    run_and_check(session, arrays)


def test_after_a_failure_everything_is_uploaded_again(open_session: Open, trt: FakeTensorRt) -> None:
    session, arrays = open_session(), inputs(2)
    run_and_check(session, arrays)
    trt.refuse.add("execute")
    other = inputs(2, seed=4)
    with pytest.raises(EngineFailed):
        session.run({**arrays, "x": other["x"]})
    run_and_check(session, arrays)


@pytest.mark.parametrize(
    ("batch", "rows", "expected"),
    [
        ((1, 4), 4, [4]),
        ((1, 4), 9, [4, 4, 1]),
        ((2, 4), 1, [2]),
        ((2, 4), 5, [4, 2]),
        ((3, 3), 7, [3, 3, 3]),
    ],
)
def test_any_number_of_rows_runs_in_slices(
    open_session: Open, trt: FakeTensorRt, batch: tuple[int, int], rows: int, expected: list[int]
) -> None:
    run_and_check(open_session(batch=batch), inputs(rows))
    assert [shapes["x"][0] for shapes in trt.executed] == expected


def test_arrays_need_not_be_contiguous(open_session: Open) -> None:
    arrays = inputs(2)
    arrays["x"] = np.asfortranarray(arrays["x"])
    arrays["context"] = arrays["context"].transpose(0, 2, 1).copy().transpose(0, 2, 1)
    run_and_check(open_session(), arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "expected x of float32 [-1, 5], found <class 'NoneType'>"),
        ({"x": np.zeros((2, 5))}, "expected x of float32 [-1, 5], found float64 [2, 5]"),
        ({"x": np.zeros((2, 6), np.float32)}, "expected x of float32 [-1, 5], found float32 [2, 6]"),
        ({"ids": np.zeros((2, 1), np.int64)}, "expected ids of int64 [-1], found int64 [2, 1]"),
        ({"ids": np.zeros(3, np.int64)}, "expected the same number of rows in every input, found [2, 3]"),
        (inputs(0), "expected the same number of rows in every input, found [0]"),
        ({"more": np.zeros(2)}, "expected the inputs context, ids, x, found context, ids, more, x"),
    ],
)
def test_wrong_inputs_are_reported_and_the_session_stays_usable(
    open_session: Open, driver: FakeDriver, change: dict[str, np.ndarray], message: str
) -> None:
    session = open_session()
    with pytest.raises(EngineFailed, match=re.escape(message)) as caught:
        session.run({**inputs(2), **change})
    assert str(caught.value).startswith(f"{PATH}: tensorrt could not run it: ")
    assert not driver.calls["cuMemAlloc_v2"]
    run_and_check(session, inputs(2))


@pytest.mark.parametrize(
    ("what", "message"),
    [("shape", "accept x of shape (2, 5)"), ("address", "use the memory for x"), ("execute", "run it")],
)
def test_a_tensorrt_error_is_reported_in_one_line(
    open_session: Open, trt: FakeTensorRt, what: str, message: str
) -> None:
    session = open_session()
    trt.refuse.add(what)
    with pytest.raises(EngineFailed) as caught:
        session.run(inputs(2))
    assert str(caught.value) == f"{PATH}: tensorrt could not {message}: Error Code 1: {what} refused"


@pytest.mark.parametrize(
    ("what", "message"), [("deserialize", "load its engine"), ("context", "create an execution context")]
)
def test_an_engine_that_fails_to_open_leaks_nothing(
    open_session: Open, trt: FakeTensorRt, what: str, message: str
) -> None:
    trt.refuse.add(what)
    with pytest.raises(EngineFailed) as caught:
        open_session()
    assert str(caught.value) == f"{PATH}: tensorrt could not {message}: Error Code 1: {what} refused"


def test_cuda_that_does_not_start_gives_a_one_line_error(open_session: Open, trt: FakeTensorRt) -> None:
    trt.refuse.add("runtime")
    with pytest.raises(EngineFailed) as caught:
        open_session()
    assert (
        str(caught.value) == f"{PATH}: tensorrt could not start: CUDA initialization failure with error: 35"
    )


def test_ctrl_c_during_a_call_waits_for_the_device(
    open_session: Open, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, arrays = open_session(), inputs(2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "_launch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.run(arrays)
    assert list(driver.streams.values()) == [[]]
    run_and_check(session, arrays)


def test_rejects_an_unsupported_dtype(open_session: Open) -> None:
    with pytest.raises(EngineFailed, match="expected x of FLOAT, HALF, INT64, INT32, BOOL, found INT8"):
        open_session("odd")


@pytest.mark.parametrize(
    ("entry", "code", "message"),
    [
        (
            "cuMemAlloc_v2",
            2,
            "expected CUDA's cuMemAlloc_v2 to succeed, found CUDA_ERROR_OUT_OF_MEMORY; generate fewer",
        ),
        ("cuMemAllocHost_v2", 2, "cuMemAllocHost_v2 to succeed, found CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuMemcpyHtoDAsync_v2", 700, "cuMemcpyHtoDAsync_v2 to succeed, found CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuMemcpyDtoHAsync_v2", 700, "cuMemcpyDtoHAsync_v2 to succeed, found CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuStreamSynchronize", 4711, "cuStreamSynchronize to succeed, found error 4711"),
        ("cuCtxSetCurrent", 700, "cuCtxSetCurrent to succeed, found CUDA_ERROR_ILLEGAL_ADDRESS"),
    ],
)
def test_a_cuda_error_is_reported_by_name_in_one_line(
    open_session: Open, driver: FakeDriver, entry: str, code: int, message: str
) -> None:
    session = open_session()
    driver.fail[entry] = code
    with pytest.raises(EngineFailed, match=re.escape(message)) as caught:
        session.run(inputs(2))
    assert str(caught.value).isprintable()
    run_and_check(session, inputs(2))


@pytest.mark.parametrize("entry", ["cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamCreate"])
def test_a_failed_device_setup_leaks_nothing(open_session: Open, driver: FakeDriver, entry: str) -> None:
    driver.fail[entry] = 2
    with pytest.raises(EngineFailed, match=f"expected CUDA's {entry} to succeed"):
        open_session()


def test_an_older_driver_is_reported(driver: FakeDriver) -> None:
    del driver.cuStreamCreate  # type: ignore[attr-defined]
    with pytest.raises(EngineUnavailable, match="driver with cuStreamCreate, found an older one; update it"):
        cuda.Driver().handle("cuStreamCreate", 1)


def test_garbage_collection_frees_resources_in_order(
    open_session: Open, driver: FakeDriver, trt: FakeTensorRt
) -> None:
    session = open_session()
    run_and_check(session, inputs(2))
    session_reference = weakref.ref(session)
    driver.order.clear()
    del session
    gc.collect()
    assert session_reference() is None
    assert driver.order == [
        "cuCtxSetCurrent",
        "cuStreamSynchronize",
        *["cuMemFree_v2", "cuMemFreeHost"] * 5,
        "cuStreamDestroy_v2",
    ]
    assert trt.alive == []


def test_closing_twice_is_allowed_and_a_closed_session_raises(open_session: Open, driver: FakeDriver) -> None:
    session = open_session()
    run_and_check(session, inputs(2))
    session.close()
    session.close()
    assert driver.held == {}
    with pytest.raises(EngineFailed, match="expected an open session, found a closed one"):
        session.run(inputs(2))


def test_a_failed_free_does_not_prevent_the_others(open_session: Open, driver: FakeDriver) -> None:
    session = open_session()
    run_and_check(session, inputs(2))
    driver.fail |= dict.fromkeys(["cuCtxSetCurrent", "cuMemFree_v2", "cuStreamDestroy_v2"], 700)
    session.close()
    assert driver.held == {"device": 1, "streams": 1}
    driver.device.clear()
    driver.streams.clear()


def test_two_sessions_share_no_state(open_session: Open, driver: FakeDriver) -> None:
    first, second = open_session(), open_session()
    for seed in range(3):
        run_and_check(first, inputs(2, seed))
        run_and_check(second, inputs(3, seed + 10))
    first.close()
    run_and_check(second, inputs(3))


class TestCudaGraphs:
    """CUDA graphs: captured at the second call of the same shapes, then launched."""

    def test_outputs_match_numpy_with_one_capture_and_repeated_launches(
        self, open_session: Open, driver: FakeDriver, trt: FakeTensorRt
    ) -> None:
        session = open_session(graphs=True)
        for seed in range(5):
            run_and_check(session, inputs(2, seed))
        assert driver.calls["cuStreamBeginCapture_v2"] == 1
        assert driver.calls["cuGraphLaunch"] == 4
        assert len(trt.executed) == 5

    def test_another_shape_is_captured_again_and_replaces_the_graph(
        self, open_session: Open, driver: FakeDriver
    ) -> None:
        session = open_session(graphs=True)
        for rows in (2, 2, 2, 3, 3, 3, 2, 2):
            run_and_check(session, inputs(rows, rows))
        assert driver.calls["cuStreamBeginCapture_v2"] == 3
        assert len(driver.launchable) == 1

    def test_a_graph_that_cannot_be_instantiated_gives_an_error_and_is_freed(
        self, open_session: Open, driver: FakeDriver
    ) -> None:
        session = open_session(graphs=True)
        run_and_check(session, inputs(2))
        driver.fail["cuGraphInstantiateWithFlags"] = 2
        with pytest.raises(EngineFailed, match="CUDA's cuGraphInstantiateWithFlags to succeed"):
            session.run(inputs(2))
        assert driver.graphs == {}

    def test_a_failure_during_capture_ends_the_capture(
        self, open_session: Open, driver: FakeDriver, trt: FakeTensorRt
    ) -> None:
        session = open_session(graphs=True)
        run_and_check(session, inputs(2))
        trt.refuse.add("execute")
        with pytest.raises(EngineFailed, match="execute refused"):
            session.run(inputs(2))
        assert not driver.capturing
        assert driver.graphs == {}
        run_and_check(session, inputs(2, 1))

    def test_is_off_by_default(self, open_session: Open, driver: FakeDriver) -> None:
        session = open_session()
        for seed in range(3):
            run_and_check(session, inputs(2, seed))
        assert not driver.calls["cuStreamBeginCapture_v2"]

    def test_rtx_uses_its_own_graph_capture(
        self, open_session: Open, driver: FakeDriver, trt: FakeTensorRt
    ) -> None:
        session = open_session(graphs=True, flavour=RTX)
        for seed in range(3):
            run_and_check(session, inputs(2, seed))
        assert [graph for graph, _ in trt.strategies] == [trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE]
        assert not driver.calls["cuStreamBeginCapture_v2"]


class TestRtxKernels:
    """Kernels of TensorRT for RTX are compiled before a shape runs, and cached for other processes."""

    def test_kernels_are_compiled_eagerly(self, open_session: Open, trt: FakeTensorRt) -> None:
        run_and_check(open_session(flavour=RTX), inputs(2))
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        assert trt.strategies == [(trt.CudaGraphStrategy.DISABLED, eager)]

    def test_kernels_are_cached_for_the_next_session(
        self, open_session: Open, trt: FakeTensorRt, kernels: Path
    ) -> None:
        session = open_session(flavour=RTX)
        run_and_check(session, inputs(2))
        assert not kernels.exists()
        session.close()
        assert kernels.read_bytes() == b"kernels"
        trt.compiled = b""
        modified_ns = kernels.stat().st_mtime_ns
        open_session(flavour=RTX).close()
        assert (kernels.read_bytes(), kernels.stat().st_mtime_ns) == (b"kernels", modified_ns)
        trt.compiled = b"kernels of more shapes"
        open_session(flavour=RTX).close()
        assert kernels.read_bytes() == b"kernels of more shapes"

    def test_a_cache_of_another_version_is_replaced(self, open_session: Open, kernels: Path) -> None:
        kernels.write_bytes(b"of another version")
        open_session(flavour=RTX).close()
        assert kernels.read_bytes() == b"kernels"

    def test_a_cache_that_cannot_be_written_is_ignored(self, open_session: Open, kernels: Path) -> None:
        kernels.mkdir()
        session = open_session(flavour=RTX)
        run_and_check(session, inputs(2))
        session.close()
        assert list(kernels.parent.iterdir()) == [kernels]

    def test_full_tensorrt_writes_no_kernel_cache(self, open_session: Open, kernels: Path) -> None:
        open_session().close()
        assert not kernels.exists()
