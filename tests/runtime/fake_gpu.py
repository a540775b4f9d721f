"""ONNX Runtime on a GPU, imitated with its CPU provider and the fake driver: what is enqueued runs when it is waited for."""

from pathlib import Path

import onnxruntime as ort
import pytest
from fake_cuda import FakeDriver, install

from tpx_runtime.engine.cuda import Driver, Stream
from tpx_runtime.engine.onnxruntime_bound import BoundSession


class GpuSession(ort.InferenceSession):
    """A session that enqueues its runs on a stream, and waits for them unless it is told not to.

    `captured` counts the runs during captures, `runs` all others. The next `allocations` captures need memory, so they fail.
    """

    def __init__(self, model: str | bytes, driver: FakeDriver, stream: Stream) -> None:
        super().__init__(model, providers=["CPUExecutionProvider"])
        self._driver, self._stream = driver, stream.handle
        self.captured = self.runs = self.allocations = 0

    def run_with_iobinding(self, binding: ort.IOBinding, options: ort.RunOptions | None = None) -> None:
        assert options is not None and options.get_run_config_entry("gpu_graph_id") == "-1"
        run = super().run_with_iobinding
        self._driver.enqueue(self._stream, lambda: run(binding))
        if self._driver.capturing:
            self.captured += 1
            if self.allocations:
                self.allocations -= 1
                self._driver._break_capture()
                raise RuntimeError("Failed to allocate memory")
            # Without the option ONNX Runtime would wait for the stream, which a capture does not allow.
            assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        else:
            self.runs += 1
            # Not through the driver's C function, in which exceptions are lost.
            self._driver._run(self._stream, len(self._driver.streams[self._stream]))


def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Install a fake driver, whose memory is that of the process."""
    install(monkeypatch, driver := FakeDriver())
    driver.foreign_memory = True
    return driver


def open_bound(
    model: str | bytes, driver: FakeDriver, path: Path = Path("add.onnx"), graphs: bool = True
) -> BoundSession:
    """A bound session on a stream of its own."""
    stream = Stream(Driver())
    return BoundSession(GpuSession(model, driver, stream), path, "cpu", stream, graphs)
