"""OpenVINO: its cache, graphs with static shapes, and bf16 with its own tolerance."""

import gc
import io
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import needs_openvino  # noqa: F401
import numpy as np
import openvino as ov
import pytest

from tpx_runtime.bundle import CONDITIONS, Bundle, hash_file, transformer_name
from tpx_runtime.engine import ENGINES, Arrays, Session, openvino, openvino_static, resolve
from tpx_runtime.engine.openvino_graph import Graph, StaticGraph
from tpx_runtime.engine.openvino_store import Store, map_graph
from tpx_runtime.errors import EngineFailed, EngineUnavailable
from tpx_runtime.manifest import Tolerance
from tpx_runtime.verify import (
    PRECISION_TOLERANCE,
    effective_tolerance,
    load_golden,
    require_ok,
    verify_bundle,
)

BF16 = "openvino-bf16"
HAS_BF16 = ENGINES[BF16].problem() is None
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no instructions for BF16")
GRAPH = "text_encoder/model.onnx"


def ids(rows: int) -> Arrays:
    return {"ids": np.arange(rows * 12).reshape(rows, 12) % 16}


def folder(bundle: Path, part: str = "text_encoder.model.f32") -> Path:
    return bundle.with_name(f"{bundle.name}.engines") / "openvino" / part


def build(bundle: Path, rows: int, engine: str = "openvino", graph: str = GRAPH) -> Path:
    """Compile a graph as tpx-build does, and return the file."""
    path, core = bundle / graph, openvino.core()
    config = openvino.compile_config(engine, path)
    store, shapes = openvino.open_store(engine, path), openvino_static.model_shapes(core, path, rows)
    store.prepare()
    parts = openvino_static.num_parts(core, shapes, store)
    compiled = openvino_static.compile_static(core, path, config, shapes, parts)
    store.write(store.static_file(shapes, parts), compiled)
    return store.static_file(shapes, parts)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The graphs compiled (not loaded) so far: the batch of those with static shapes, "any" for dynamic shapes."""
    recorded: list[object] = []
    compile_static, compile_dynamic = openvino_static.compile_static, openvino.compile_dynamic

    def spy_static(
        core: ov.Core, path: Path, config: dict[str, str], shapes: openvino_static.Shapes, parts: int
    ) -> object:
        recorded.append(shapes[0][1][0])
        model = compile_static(core, path, config, shapes, parts)
        cores = core.get_property("CPU", "RANGE_FOR_STREAMS")[1]
        assert parts == 1 or model.get_property("NUM_STREAMS") == min(parts, cores)
        return model

    def spy_dynamic(*args: object) -> object:
        recorded.append("any")
        return compile_dynamic(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(openvino_static, "compile_static", spy_static)
    monkeypatch.setattr(openvino, "compile_dynamic", spy_dynamic)
    monkeypatch.setattr(openvino_static, "CALLS_BEFORE_COMPILING", 3)
    return recorded


def check_outputs(session: Session, rows: int, copy: Path) -> None:
    """Run `session` and compare the outputs with ONNX Runtime's."""
    found, expected = session.run(ids(rows)), ENGINES["onnxruntime"].open(copy / GRAPH).run(ids(rows))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)


def flipped(file: Path) -> bytes:
    """The content of a file with some of its weights changed."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000 : 4] = bytes(0x3E for _ in range(1000))
    return bytes(content)


def replace_by_links(bundle: Path, blobs: Path, weights: bool) -> None:
    """Replace the files of `bundle` by links, as in Hugging Face's cache; the weights only if `weights`."""
    blobs.mkdir()
    for number, file in enumerate([path for path in bundle.rglob("*") if path.is_file()]):
        if weights or file.suffix != ".data":
            file.rename(blobs / str(number))
            file.symlink_to(blobs / str(number))


class TestCache:
    """The cache of graphs with dynamic shapes."""

    @pytest.mark.parametrize(
        "damage", ["empty", "text", "truncated", "flipped", "no checksum", "only a checksum", "no graph"]
    )
    def test_a_damaged_file_is_compiled_again(self, damage: str, copy: Path, compiled: list[object]) -> None:
        resolve("openvino").open(copy / GRAPH)
        [blob] = folder(copy).iterdir()
        content = blob.read_bytes()
        damaged = {
            "text": b"damaged",
            "truncated": content[:-1000],
            "flipped": flipped(blob),
            "no checksum": content[:-4],
            "only a checksum": bytes(4),
            "no graph": b"damaged" + zlib.crc32(b"damaged").to_bytes(4, "little"),
        }
        blob.write_bytes(damaged.get(damage, b""))
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)
        assert compiled == ["any", "any"]
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)
        assert compiled == ["any", "any"]  # loaded from the new file

    def test_the_folder_can_be_set_by_a_variable(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For example for a bundle in a read-only folder."""
        monkeypatch.setenv("TPX_ENGINES", str(tmp_path / "else where"))
        resolve("openvino").open(copy / GRAPH)
        assert len(list((tmp_path / "else where/" / copy.name / "openvino").glob("*/any.*.blob"))) == 1
        assert not folder(copy).exists()

    def test_a_folder_that_cannot_be_reached_is_not_used(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TPX_ENGINES", "n" * 300)
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)

    def test_a_folder_that_cannot_be_written_is_not_used(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def deny(path: Path, **_: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "touch", deny)
        with pytest.raises(PermissionError):
            openvino.open_store("openvino", copy / GRAPH).prepare()
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)
        assert list(folder(copy).iterdir()) == []

    def test_a_loaded_graph_survives_the_replacement_of_its_file(
        self, copy: Path, compiled: list[object]
    ) -> None:
        """A running graph reads its weights from the mapped file, which is replaced and not overwritten."""
        resolve("openvino").open(copy / GRAPH)
        session = resolve("openvino").open(copy / GRAPH)
        [blob] = folder(copy).iterdir()

        class Other:
            def export_model(self, into: io.BytesIO) -> None:
                into.write(b"of another process")

        openvino.open_store("openvino", copy / GRAPH).write(blob, Other())  # type: ignore[arg-type]
        gc.collect()
        check_outputs(session, 2, copy)
        assert compiled == ["any"]

    def test_concurrent_processes_do_not_interfere(self, copy: Path) -> None:
        """Each process compiles the graph; it does not matter which one writes the file last."""
        code = "import sys; from pathlib import Path; from tpx_runtime.engine import openvino, resolve; "
        code += "sys.stdin.read(); kept = [resolve('openvino').open(Path(name)) for name in sys.argv[1:]]"
        graphs = [str(path) for path in sorted(copy.glob("*/model.onnx"))] + [
            str(copy / transformer_name(depth, "plain")) for depth in (1, 2, 3)
        ]
        command = [sys.executable, "-c", code, *graphs]
        for _ in range(2):
            together = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(4)]
            for process in together:  # by now they have imported most modules
                assert process.stdin
                process.stdin.close()
            assert [process.wait() for process in together] == [0] * 4
            files = [file for part in folder(copy, "").iterdir() for file in part.iterdir()]
            assert len(files) == len(graphs) and all(map_graph(file) for file in files)
            shutil.rmtree(folder(copy, ""))

    def test_each_number_of_threads_has_its_own_file(
        self, copy: Path, compiled: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for _ in range(2):
            for threads in ("1", "2"):
                monkeypatch.setenv("TPX_THREADS", threads)
                check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)
        assert compiled == ["any", "any"]

    def test_two_bundles_in_one_folder_have_their_own_files(
        self, copy: Path, tmp_path: Path, compiled: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TPX_ENGINES", str(tmp_path / "engines"))
        other = Path(shutil.copytree(copy, tmp_path / "other"))
        weights = other / "text_encoder/weights.data"
        (np.fromfile(weights, np.float32) * np.float32(0.5)).tofile(weights)
        for _ in range(2):
            for bundle in (copy, other):
                check_outputs(resolve("openvino").open(bundle / GRAPH), 2, bundle)
        assert compiled == ["any", "any"]

    def test_a_bundle_of_links_has_its_cache_next_to_it(
        self, copy: Path, tmp_path: Path, compiled: list[object]
    ) -> None:
        """As in Hugging Face's cache. OpenVINO refuses linked weights, but a compiled graph does not need them."""
        replace_by_links(copy, tmp_path / "blobs", weights=False)
        for _ in range(2):
            check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)
        assert compiled == ["any"]
        assert len(list(folder(copy).iterdir())) == 1

    def test_a_link_to_a_bundle_shares_its_cache(self, copy: Path, compiled: list[object]) -> None:
        link = copy.with_name("link")
        link.symlink_to(copy)
        for bundle in (copy, link):
            resolve("openvino").open(bundle / GRAPH)
        assert compiled == ["any"]

    def test_linked_weights_give_a_one_line_error_with_advice(self, copy: Path, tmp_path: Path) -> None:
        replace_by_links(copy, tmp_path / "blobs", weights=True)
        with pytest.raises(EngineFailed) as caught:
            resolve("openvino").open(copy / GRAPH)
        assert str(caught.value) == (
            f"{copy / GRAPH}: expected its weights in the same folder, found a link out of it, which openvino does not "
            "follow; copy the bundle with its links resolved (cp -rL), or download it with local_dir"
        )

    @pytest.mark.parametrize("prebuilt", [True, False])
    @pytest.mark.parametrize("times", ["new", "the same"])
    def test_other_weights_of_the_same_graph_are_compiled_again(
        self, copy: Path, prebuilt: bool, times: str
    ) -> None:
        weights, manifest = copy / "text_encoder/weights.data", copy / "manifest.json"
        before = weights.stat()
        if prebuilt:
            build(copy, 2)
        old = resolve("openvino").open(copy / GRAPH).run(ids(2))["context"]
        (np.fromfile(weights, np.float32) * np.float32(0.5)).tofile(weights)
        if times == "the same":  # as unpacking an archive can leave it
            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
            stated = json.loads(manifest.read_text())
            stated["files"]["text_encoder/weights.data"]["sha256"] = hash_file(weights)
            manifest.write_text(json.dumps(stated))
        session = resolve("openvino").open(copy / GRAPH)
        check_outputs(session, 2, copy)
        assert np.abs(session.run(ids(2))["context"] - old).max() > 0.1

    def test_graphs_run_without_a_cache(self, copy: Path) -> None:
        copy.with_name(f"{copy.name}.engines").write_text("a file where the folder should be")
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
    def test_a_graph_that_cannot_be_stored_runs(
        self, error: Exception, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(Store, "write", fail)
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("at", ["write", "seek"])
    def test_an_incomplete_write_leaves_the_old_file(
        self, at: str, error: BaseException, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """OpenVINO ignores exceptions of the stream. Files that were not used for long are removed before, to make room."""
        store = openvino.open_store("openvino", copy / GRAPH)
        model = openvino.compile_dynamic(copy / GRAPH, openvino.compile_config("openvino", copy / GRAPH))
        store.prepare()
        store.write(store.dynamic_file, model)
        before, calls, opened = store.dynamic_file.read_bytes(), list[object](), Path.open
        for file in (store.dynamic_file, store.folder / "any.1.blob"):
            file.touch()
            os.utime(file, (0, 0))

        def failing(call: Callable[..., int]) -> Callable[..., int]:
            def once(*arguments: object) -> int:
                calls.append(arguments)
                if len(calls) == 9:
                    raise error
                return call(*arguments)

            return once

        def open_failing(self: Path, *mode: str) -> object:
            file = opened(self, *mode)
            return SimpleNamespace(
                **{"write": file.write, "seek": file.seek, "read": file.read, at: failing(getattr(file, at))}
            )

        monkeypatch.setattr(Path, "open", lambda *a: nullcontext(open_failing(*a)))
        with pytest.raises(type(error)):
            store.write(store.dynamic_file, model)
        monkeypatch.undo()
        assert [file.read_bytes() for file in store.folder.iterdir()] == [before]

    def test_weights_are_written_without_a_copy_in_memory(self, copy: Path) -> None:
        """For a large bundle a copy might not fit in memory."""

        class CheckedModel:
            def export_model(self, into: io.BytesIO) -> None:
                model.export_model(into)
                assert not io.BytesIO.getbuffer(into)

        model = openvino.compile_dynamic(copy / GRAPH, openvino.compile_config("openvino", copy / GRAPH))
        store = openvino.open_store("openvino", copy / GRAPH)
        store.prepare()
        store.write(store.dynamic_file, CheckedModel())  # type: ignore[arg-type]
        assert store.dynamic_file.stat().st_size > (copy / "text_encoder/weights.data").stat().st_size // 2

    @needs_bf16
    def test_each_precision_has_its_own_folder(self, copy: Path) -> None:
        for name in ("openvino", BF16):
            resolve(name).open(copy / GRAPH)
        assert len(list(folder(copy).iterdir())) == 1
        assert len(list(folder(copy, "text_encoder.model.bf16").iterdir())) == 1


class TestStaticShapes:
    def test_a_frequent_shape_gets_a_static_graph(self, copy: Path, compiled: list[object]) -> None:
        session = resolve("openvino").open(copy / GRAPH)
        for rows in (2, 1, 2, 2, 2, 2):
            check_outputs(session, rows, copy)
        assert compiled == ["any", 2]

    def test_the_least_recently_used_graph_is_evicted(
        self, copy: Path, compiled: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(openvino_static, "MAX_STATIC_GRAPHS", 2)
        session = resolve("openvino").open(copy / GRAPH)
        for rows in (1, 1, 1, 2, 2, 2, 1, 3, 3, 3):  # 2 is the least recently used when 3 is compiled
            session.run(ids(rows))
        assert compiled == ["any", 1, 2, 3]
        for rows in (1, 3, 2, 2):  # the calls of 2 are counted from zero again
            check_outputs(session, rows, copy)
        assert compiled == ["any", 1, 2, 3]
        check_outputs(session, 2, copy)
        assert compiled == ["any", 1, 2, 3, 2]

    def test_large_graphs_get_no_static_graph(
        self, copy: Path, compiled: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights = (copy / "text_encoder/weights.data").stat().st_size
        monkeypatch.setattr(openvino_static, "MAX_WEIGHT_BYTES", weights - 1)
        session = resolve("openvino").open(copy / GRAPH)
        for _ in range(5):
            session.run(ids(2))
        assert compiled == ["any"]

    def test_a_prebuilt_graph_is_used_from_the_first_call(self, copy: Path, compiled: list[object]) -> None:
        build(copy, 2)
        compiled.clear()
        session = resolve("openvino").open(copy / GRAPH)
        check_outputs(session, 2, copy)
        assert compiled == []
        check_outputs(session, 1, copy)
        assert compiled == ["any"]

    @pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "unknown"])
    def test_a_damaged_file_is_ignored(self, damage: str, copy: Path, compiled: list[object]) -> None:
        file = build(copy, 2)
        compiled.clear()
        if damage == "unknown":
            file.write_bytes(file.read_bytes()[:-4])  # without the checksum
        else:
            damaged = {"empty": b"", "text": b"damaged", "truncated": file.read_bytes()[:-1000]}
            file.write_bytes(damaged.get(damage) or flipped(file))
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)
        assert compiled == ["any"]

    def test_a_graph_compiled_from_an_older_file_is_ignored(self, copy: Path, compiled: list[object]) -> None:
        stale = build(copy, 2)
        shutil.copyfile(copy / GRAPH, copy / "again")
        (copy / "again").replace(copy / GRAPH)  # the same content with another modification time
        compiled.clear()
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)
        assert compiled == ["any"]
        rebuilt = build(copy, 2)
        assert rebuilt != stale
        compiled.clear()
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)
        assert compiled == []

    def test_a_prebuilt_graph_does_not_hide_wrong_inputs(self, copy: Path) -> None:
        build(copy, 2)
        session = resolve("openvino").open(copy / GRAPH)
        with pytest.raises(EngineFailed, match="expected the inputs ids, found other"):
            session.run({"other": np.zeros((2, 12), np.int64)})
        with pytest.raises(EngineFailed, match="openvino could not run it"):
            session.run({"ids": np.zeros((2, 3), np.int64)})

    def test_an_invalid_shape_gets_no_static_graph(self, copy: Path, compiled: list[object]) -> None:
        session = resolve("openvino").open(copy / GRAPH)
        for _ in range(5):
            with pytest.raises(EngineFailed, match="openvino could not run it"):
                session.run({"ids": np.zeros((2, 3), np.int64)})
        check_outputs(session, 2, copy)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("context latents", None),
        ("converted latents", None),
        ("context converted", "found context, converted"),
        ("latents", "found latents"),
        ("", "found none"),
        ("context latents other", "found context, latents, other"),
    ],
)
def test_an_input_may_have_two_names_and_is_required_once(given: str, problem: str | None) -> None:
    class Compiled:
        inputs = (Port("context", "converted"), Port("latents"))
        outputs: tuple[object, ...] = ()

        def create_infer_request(self) -> None: ...

    prefix = "expected the inputs context/converted, latents, "
    found = Graph(Compiled()).problem(dict.fromkeys(given.split(), np.zeros(1)))
    assert found == (problem and prefix + problem)


class TestHalves:
    """Even batches, run as two halves in parallel."""

    @pytest.mark.parametrize(("rows", "parts"), [(1, 1), (2, 2), (3, 1), (4, 2), (16, 2)])
    def test_an_even_batch_has_two_parts(self, rows: int, parts: int, copy: Path) -> None:
        store = openvino.open_store("openvino", copy / GRAPH)
        assert openvino_static.num_parts(Cores(2), (("ids", (rows, 12)),), store) == parts  # type: ignore[arg-type]

    def test_one_core_large_weights_or_different_rows_have_one_part(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, two = openvino.open_store("openvino", copy / GRAPH), (("ids", (2, 12)),)
        assert openvino_static.num_parts(Cores(1), two, store) == 1  # type: ignore[arg-type]
        for other in ((), (1, 3), (4, 2)):
            assert openvino_static.num_parts(Cores(2), (*two, ("other", other)), store) == 1  # type: ignore[arg-type]
        monkeypatch.setattr(openvino_static, "MAX_WEIGHT_BYTES", store.weight_bytes)
        assert openvino_static.num_parts(Cores(2), two, store) == 2  # type: ignore[arg-type]
        monkeypatch.setattr(openvino_static, "MAX_WEIGHT_BYTES", store.weight_bytes - 1)
        assert openvino_static.num_parts(Cores(2), two, store) == 1  # type: ignore[arg-type]

    @pytest.mark.parametrize("cores", [1, 2])
    @pytest.mark.parametrize("prebuilt", [True, False])
    def test_rows_keep_their_order(
        self, cores: int, prebuilt: bool, copy: Path, compiled: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Prebuilt or compiled at run time, as halves or whole."""
        original, parts = openvino_static.num_parts, []
        monkeypatch.setattr(
            openvino_static,
            "num_parts",
            lambda _, *rest: parts.append(original(Cores(cores), *rest)) or parts[-1],
        )
        if prebuilt:
            build(copy, 4)
        session = resolve("openvino").open(copy / GRAPH)
        for _ in range(4):
            check_outputs(session, 4, copy)
        assert set(parts) == {cores}
        assert compiled == [4] if prebuilt else ["any", 4]

    def test_halves_and_whole_batches_have_different_files(self, copy: Path) -> None:
        store, shapes = openvino.open_store("openvino", copy / GRAPH), (("ids", (2, 12)),)
        assert store.static_file(shapes, 2) != store.static_file(shapes, 1)

    @pytest.mark.parametrize("error", [np.nan, 1.0])
    def test_parts_that_disagree_are_loaded_again(
        self, error: float, copy: Path, compiled: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """OpenVINO sometimes creates parts of which one computes wrong values."""
        two, loads, bad = 2, list[int](), [True, True, False]

        class SometimesWrong(StaticGraph):
            def __init__(self, model: ov.CompiledModel, parts: int) -> None:
                super().__init__(model, parts)
                self._bad = bad[len(loads)]
                loads.append(parts)

            def run(self, inputs: Arrays) -> Arrays:
                outputs = super().run(inputs)
                if self._bad:
                    outputs["context"][len(outputs["context"]) // 2 :] += error
                return outputs

        monkeypatch.setattr(openvino_static, "StaticGraph", SometimesWrong)
        monkeypatch.setattr(openvino_static, "num_parts", lambda *_: two)
        build(copy, 2)
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)
        assert loads == [two] * 3  # rejected twice, then accepted
        assert compiled == [2]
        loads.clear()
        bad[2] = True
        check_outputs(resolve("openvino").open(copy / GRAPH), 2, copy)
        assert loads == [two] * openvino_static.MAX_LOAD_ATTEMPTS
        assert compiled == [2, "any"]

    def test_a_compiled_graph_whose_parts_disagree_is_not_used(
        self, copy: Path, compiled: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(StaticGraph, "parts_agree", lambda self: False)
        monkeypatch.setattr(StaticGraph, "run", lambda self, inputs: pytest.fail("it was used"))
        session = resolve("openvino").open(copy / GRAPH)
        for _ in range(4):
            check_outputs(session, 2, copy)
        assert compiled == ["any", 2]

    def test_an_error_in_one_half_waits_for_the_other(self) -> None:
        class Request:
            waited = False

            def __init__(self) -> None:
                self.data = np.zeros((2, 12), np.int64)

            def get_tensor(self, name: str) -> "Request":
                assert name == "ids"
                return self

            def start_async(self) -> None:
                assert self.data.tolist() == ids(4)["ids"][:2].tolist()

            def wait(self) -> None:
                self.waited = True

            def infer(self, share_outputs: bool) -> None:
                assert self.data.tolist() == ids(4)["ids"][2:].tolist()
                raise RuntimeError("this half failed")

        class Compiled:
            inputs = (Port("ids"),)
            outputs: tuple[object, ...] = ()
            requests: ClassVar[list[Request]] = []

            def create_infer_request(self) -> Request:
                self.requests.append(Request())
                return self.requests[-1]

        graph = StaticGraph(Compiled(), 2)
        with pytest.raises(RuntimeError, match="this half failed"):
            graph.run(ids(4))
        assert [request.waited for request in Compiled.requests] == [True, False]


@pytest.mark.parametrize("static", [True, False])
class TestArrays:
    """Inputs and outputs of graphs with static shapes (copied to and from the requests) and with dynamic shapes."""

    @pytest.fixture
    def session(self, static: bool, copy: Path) -> Session:
        if static:
            build(copy, 2)
        return resolve("openvino").open(copy / GRAPH)

    def test_outputs_are_not_overwritten_by_the_next_call(self, session: Session) -> None:
        first = session.run(ids(2))
        kept = {name: array.copy() for name, array in first.items()}
        session.run({"ids": ids(2)["ids"][::-1].copy()})
        for name, array in kept.items():
            np.testing.assert_array_equal(first[name], array)

    def test_arrays_need_not_be_contiguous(self, session: Session, copy: Path) -> None:
        reversed_ids = {"ids": ids(2)["ids"][::-1, ::-1]}
        contiguous = {"ids": np.ascontiguousarray(reversed_ids["ids"])}
        for name, array in session.run(contiguous).items():
            np.testing.assert_array_equal(session.run(reversed_ids)[name], array)


def test_a_static_graph_rejects_another_dtype(copy: Path) -> None:
    build(copy, 2)
    with pytest.raises(EngineFailed, match=r"openvino could not run it: .*float64"):
        resolve("openvino").open(copy / GRAPH).run({"ids": np.full((2, 12), 1.5)})


@pytest.mark.parametrize(("precision", "form"), [("bf16", "ERF"), ("f32", "TANH")])
def test_gelu_uses_erf_in_bf16_and_tanh_as_in_the_graph_in_f32(
    precision: str, form: str, tiny_bundle: Path
) -> None:
    class Core:
        def read_model(self, path: str) -> ov.Model:
            return openvino.core().read_model(path)

        def compile_model(self, model: ov.Model, *_: object) -> ov.Model:
            return model

    path = tiny_bundle / transformer_name(3, "plain")
    shapes = openvino_static.model_shapes(openvino.core(), path, 2)
    model = openvino_static.compile_static(Core(), path, {"INFERENCE_PRECISION_HINT": precision}, shapes, 1)  # type: ignore[arg-type]
    gelus = [node for node in model.get_ops() if node.get_type_name() == "Gelu"]
    assert {node.get_attributes()["approximation_mode"] for node in gelus} == {form}


class Port:
    """An input or output of a compiled graph."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)


class Cores:
    """A stand-in for openvino.Core on a machine with `count` cores."""

    def __init__(self, count: int) -> None:
        self._count = count

    def get_property(self, device: str, name: str) -> tuple[int, int]:
        assert (device, name) == ("CPU", "RANGE_FOR_STREAMS")
        return 1, self._count


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("2026.2.1-21903-52ddc073857", False),
        ("2025.12.0", False),
        ("2026.3.0-22451", True),
        ("2027.0.0", True),
    ],
)
def test_rejects_a_version_without_the_attention_operator(
    version: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ov, "__version__", version)
    assert ENGINES["openvino"].problem() == (
        None
        if known
        else f"expected OpenVINO 2026.3 or later for engine openvino, found {version.split('-')[0]}; "
        "install it with `pip install --upgrade 'tpx[openvino]'`"
    )


class TestBf16:
    def test_a_cpu_without_bf16_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Core:
            def get_property(self, device: str, name: str) -> list[str]:
                return ["FP32", "INT8"]

        monkeypatch.setattr(openvino, "core", Core)
        with pytest.raises(EngineUnavailable) as caught:
            resolve(BF16)
        assert str(caught.value) == (
            "expected a CPU with BF16 instructions for engine openvino-bf16, found one with FP32, INT8; "
            "use the engine openvino"
        )
        assert ENGINES["openvino"].problem() is None

    @needs_bf16
    def test_openvino_bf16_computes_in_bf16_and_openvino_does_not(self, copy: Path) -> None:
        exact = ENGINES["onnxruntime"].open(copy / GRAPH).run(ids(2))["context"]
        errors = {
            name: np.abs(resolve(name).open(copy / GRAPH).run(ids(2))["context"] - exact).max()
            for name in ("openvino", BF16)
        }
        assert errors["openvino"] < 1e-5
        assert 1e-4 < errors[BF16] < 5e-2

    def test_the_conditions_stay_in_f32(self, tiny_bundle: Path) -> None:
        assert openvino.compile_config(BF16, tiny_bundle / CONDITIONS)["INFERENCE_PRECISION_HINT"] == "f32"
        assert openvino.compile_config(BF16, tiny_bundle / GRAPH)["INFERENCE_PRECISION_HINT"] == "bf16"

    @needs_bf16
    def test_bf16_has_its_own_tolerance_except_for_the_conditions(self, tiny_bundle: Path) -> None:
        bundle = Bundle.open(tiny_bundle)
        reports = verify_bundle(bundle, resolve(BF16))
        require_ok(reports, BF16)
        strict = {"transformer conditions": bundle.manifest.tolerance.conditions}
        for report in reports:
            assert report.tolerance == strict.get(report.part, PRECISION_TOLERANCE["bf16"].transformer)
        assert any(report.error > bundle.manifest.tolerance.transformer for report in reports)

    @needs_bf16
    def test_a_wrong_graph_exceeds_the_tolerance(self, copy: Path) -> None:
        bundle = Bundle.open(copy)
        shutil.copyfile(copy / transformer_name(1, "plain"), copy / transformer_name(3, "plain"))
        reports = verify_bundle(bundle, resolve(BF16))
        assert [report.part for report in reports if not report.ok] == ["transformer depth 3"]

    @needs_bf16
    def test_wrong_weights_exceed_the_tolerance(self, copy: Path) -> None:
        path = copy / "transformer/weights.data"
        weights = np.fromfile(path, np.float32)
        weights *= 1.2
        weights.tofile(path)
        wrong = [r.part for r in verify_bundle(Bundle.open(copy, verify=False), resolve(BF16)) if not r.ok]
        assert {"transformer depth 1", "transformer depth 2", "transformer depth 3"} <= set(wrong)

    @needs_bf16
    def test_conditions_in_bf16_exceed_the_tolerance(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(openvino, "precision_of", lambda *_: "bf16")
        wrong = [report.part for report in verify_bundle(Bundle.open(copy), resolve(BF16)) if not report.ok]
        assert wrong == ["transformer conditions"]

    def test_the_wider_tolerance_applies(self) -> None:
        strict, loose = Tolerance(1e-4, 1e-4, 1e-4, 1e-4, 1.0), Tolerance(0.5, 1e-4, 1e-4, 0.5, 0.5)
        bf16 = PRECISION_TOLERANCE["bf16"]
        assert effective_tolerance(strict, None) is strict
        assert effective_tolerance(strict, "bf16") == replace(bf16, conditions=1e-4)
        assert effective_tolerance(loose, "bf16") == Tolerance(0.5, 1e-4, bf16.transformer, 0.5, 0.5)


def test_a_prebuilt_bundle_reproduces_the_golden_tensors(copy: Path) -> None:
    """A transformer, whose weights are mapped from the file."""
    path, bundle = copy / transformer_name(3, "plain"), Bundle.open(copy)
    golden = load_golden(bundle)
    inputs = {name: golden[name] for name in bundle.manifest.model.transformer_inputs}
    assert openvino_static.input_shapes(inputs) == openvino_static.model_shapes(openvino.core(), path, 2)
    build(copy, 2, graph=transformer_name(3, "plain"))
    session = resolve("openvino").open(path)
    for _ in range(2):
        outputs = session.run(inputs)
        np.testing.assert_array_equal(outputs["routes"], golden["routes_3"])
        np.testing.assert_allclose(outputs["velocity"], golden["velocity_3"], atol=1e-4)


def test_there_is_one_core_per_process() -> None:
    """If an older Core is released first, the thread's signal stack is freed memory and the next Ctrl-C crashes."""
    root = Path(__file__).parents[2]
    folders = (root / "tpx_runtime", root / "engines", root / "export")
    files = [path.name for folder in folders for path in folder.rglob("*.py") if "Core()" in path.read_text()]
    assert files == ["openvino.py"]
