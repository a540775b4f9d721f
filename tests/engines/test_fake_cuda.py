"""The fake driver and the fake TensorRT refuse what the real ones refuse."""

from collections.abc import Callable

import pytest
from fake_cuda import FakeDriver, install
from fake_tensorrt import FakeEngineFunction, FakeTensorRt

from tpx_runtime.engine.cuda import NON_BLOCKING, Buffer, CudaFailed, Driver, Graph, Stream


@pytest.mark.parametrize(
    "call",
    [lambda driver, stream: driver.call("cuStreamSynchronize", stream), lambda driver, _: Buffer(driver, 8)],
)
def test_synchronising_and_allocating_make_a_capture_invalid(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Driver, int], None]
) -> None:
    install(monkeypatch, fake := FakeDriver())
    driver = Driver()
    driver.call("cuCtxSetCurrent", driver.handle("cuDevicePrimaryCtxRetain", 0))
    stream = driver.handle("cuStreamCreate", NON_BLOCKING)
    with pytest.raises(CudaFailed, match="found CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        Graph(driver, stream, lambda: call(driver, stream))
    assert not fake.capturing and fake.held == {"streams": 1}

    def ignored() -> None:
        with pytest.raises(CudaFailed):
            call(driver, stream)

    with pytest.raises(CudaFailed, match=r"cuStreamEndCapture to succeed, found .*_CAPTURE_INVALIDATED"):
        Graph(driver, stream, ignored)
    Graph(driver, stream, lambda: None).free()  # the next capture is valid


@pytest.mark.parametrize(
    ("shape", "fits"), [((4, 3), True), ((4, 2), False), ((4,), False), ((4, 3, 1), False)]
)
def test_an_input_shape_must_agree_with_the_fixed_sizes(shape: tuple[int, ...], fits: bool) -> None:
    made = FakeEngineFunction(lambda x: {}, inputs={"x": ("FLOAT", (-1, 3))}, outputs={})
    trt = FakeTensorRt(FakeDriver(), made=made)
    runtime = trt.Runtime(type("Logger", (), {"log": lambda *_: None}))
    engine = runtime.deserialize_cuda_engine(b'"made"')
    context = engine.create_execution_context()
    assert context.set_input_shape("x", shape) == fits
    del context, engine  # each needs the one before


def test_a_mark_is_waited_for_without_what_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake := FakeDriver())
    driver = Driver()
    stream, done = Stream(driver), list[int]()
    stream.wait_for_mark()  # which is nowhere yet
    fake.enqueue(stream.handle, lambda: done.append(1))
    stream.mark()
    fake.enqueue(stream.handle, lambda: done.append(2))
    stream.wait_for_mark()
    assert done == [1]
    stream.mark()
    stream.wait_for_mark()
    assert done == [1, 2]
    stream.free()
    assert fake.held == {}
