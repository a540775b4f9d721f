"""ONNX Runtime with bound buffers, run on the CPU's memory in the place of a GPU's, and CUDA graphs with a stand-in."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import parser

from tpx_runtime.engine import onnxruntime as engine_module
from tpx_runtime.engine.onnxruntime_bound import MOST_KEPT, BoundSession
from tpx_runtime.errors import EngineFailed
from tpx_runtime.generator import Generator

ADD = parser.parse_model(
    '<ir_version: 8, opset_import: ["": 17]> g (float[n, 2] x, float[2] y) => (float[n, 2] sum) { sum = Add(x, y) }'
)


def session() -> ort.InferenceSession:
    return ort.InferenceSession(ADD.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture
def bound() -> BoundSession:
    return BoundSession(session(), Path("add.onnx"), "cpu")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what is written to buffers."""
    seen: list[tuple[int, ...]] = []
    update = ort.OrtValue.update_inplace

    def counted(self: ort.OrtValue, array: np.ndarray) -> None:
        seen.append(array.shape)
        update(self, array)

    monkeypatch.setattr(ort.OrtValue, "update_inplace", counted)
    return seen


def test_outputs_are_the_callers_own(bound: BoundSession) -> None:
    x, y = np.ones((3, 2), np.float32), np.ones(2, np.float32)
    first = bound.run({"x": x, "y": y})["sum"]
    second = bound.run({"x": 2 * x, "y": y})["sum"]
    assert (first == 2).all() and (second == 3).all()


def test_only_what_changed_is_uploaded_again(bound: BoundSession, uploads: list[tuple[int, ...]]) -> None:
    x, y = np.ones((3, 2), np.float32), np.ones(2, np.float32)
    bound.run({"x": x, "y": y})
    assert uploads == [(3, 2), (2,)]
    uploads.clear()
    bound.run({"x": x, "y": y})
    assert uploads == []
    assert (bound.run({"x": x + 1, "y": y})["sum"] == 3).all()
    assert uploads == [(3, 2)]
    y[:] = 5  # the same array, but no longer what it was
    assert (bound.run({"x": x, "y": y})["sum"] == 6).all()
    assert uploads == [(3, 2), (3, 2), (2,)]


def test_arrays_with_gaps_are_read_as_they_are(bound: BoundSession) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    assert np.array_equal(bound.run({"x": x, "y": np.zeros(2, np.float32)})["sum"], x)


def test_each_set_of_shapes_keeps_buffers_up_to_a_limit(
    bound: BoundSession, uploads: list[tuple[int, ...]]
) -> None:
    y = np.zeros(2, np.float32)

    def run(rows: int) -> None:
        x = np.full((rows, 2), rows, np.float32)
        assert np.array_equal(bound.run({"x": x, "y": y})["sum"], x)

    def written(rows: int) -> set[tuple[int, ...]]:
        uploads.clear()
        run(rows)
        return set(uploads)

    for rows in range(1, MOST_KEPT + 1):
        assert written(rows) == {(rows, 2), (2,)}
    assert written(1) == {(1, 2)}
    assert written(MOST_KEPT + 1) == {
        (MOST_KEPT + 1, 2),
        (2,),
    }  # in the place of 2 rows, which have waited longest
    assert written(2) == {(2, 2), (2,)}
    assert written(1) == {(1, 2)}


@pytest.mark.parametrize(
    "inputs",
    [{}, {"x": np.ones((1, 2), np.float32)}, {"x": np.ones((1, 2)), "y": np.ones(2, np.float32)}],
)
def test_inputs_that_do_not_fit_are_one_line_and_the_next_call_is_right(
    bound: BoundSession, inputs: dict[str, np.ndarray]
) -> None:
    good = {"x": np.ones((1, 2), np.float32), "y": np.ones(2, np.float32)}
    bound.run(good)
    with pytest.raises(EngineFailed, match=r"^add\.onnx: onnxruntime could not run it: ") as caught:
        bound.run(inputs)
    assert str(caught.value).isprintable()
    assert (bound.run(good)["sum"] == 2).all()


class Watched:
    """A session that tells what it is asked to run and to release."""

    def __init__(self) -> None:
        self._session = session()
        self.asked: list[str | None] = []
        self.released: list[int] = []

    def run_with_iobinding(self, binding: ort.IOBinding, options: ort.RunOptions | None) -> None:
        self.asked.append(options and options.get_run_config_entry("gpu_graph_id"))
        self._session.run_with_iobinding(binding, options)

    def release_captured_graph(self, graph: int) -> None:
        self.released.append(graph)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


@pytest.mark.parametrize("graphs", [True, False])
def test_each_set_of_shapes_is_a_graph_once_its_outputs_have_their_place(graphs: bool) -> None:
    watched, y = Watched(), np.ones(2, np.float32)
    bound = BoundSession(watched, Path("add.onnx"), "cpu", graphs)
    for rows in (1, 1, 1, 2, 2, 1):
        out = bound.run({"x": np.full((rows, 2), rows, np.float32), "y": y})["sum"]
        assert np.array_equal(out, np.full((rows, 2), rows + 1, np.float32))
    assert watched.asked == (["-1", "0", "0", "-1", "1", "0"] if graphs else [None] * 6)
    for rows in range(3, 2 + MOST_KEPT):
        bound.run({"x": np.ones((rows, 2), np.float32), "y": y})
    assert watched.released == ([1] if graphs else [])
    watched.released.clear()
    with pytest.raises(EngineFailed):
        bound.run({"x": np.ones((1, 2), np.float32)})
    assert len(watched.released) == (MOST_KEPT + 1 if graphs else 0)  # all, with those of what failed


@pytest.mark.parametrize("wanted", ["1", "0", None])
def test_the_gpu_engine_binds_and_asks_for_graphs_where_they_are_wanted(
    wanted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "add.onnx"
    path.write_bytes(ADD.SerializeToString())
    asked: list[Any] = []

    made = Watched()

    def load(model: str, options: object, providers: list[Any]) -> Any:
        asked.extend(providers)
        made.get_providers = lambda: ["CUDAExecutionProvider"]  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(ort, "InferenceSession", load)
    monkeypatch.delenv("TPX_CUDA_GRAPHS", raising=False)
    if wanted:
        monkeypatch.setenv("TPX_CUDA_GRAPHS", wanted)
    opened = engine_module.open_session("onnxruntime-cuda", path)
    graphs = wanted == "1"
    assert isinstance(opened, BoundSession)
    assert asked == [("CUDAExecutionProvider", {"enable_cuda_graph": "1"} if graphs else {})]
    assert (opened._device, opened._graphs) == ("cuda", graphs)


def test_a_picture_through_bound_buffers_is_the_same(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Generator.load(tiny_bundle, "onnxruntime")("a red cube", steps=3, num_images=3, batch_size=2)

    def opened(engine_name: str, path: Path) -> BoundSession:
        return BoundSession(
            ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]), path, "cpu", graphs=True
        )

    monkeypatch.setattr(engine_module, "open_session", opened)
    drawn = Generator.load(tiny_bundle, "onnxruntime")("a red cube", steps=3, num_images=3, batch_size=2)
    assert [list(one.getdata()) for one in drawn] == [list(one.getdata()) for one in expected]
