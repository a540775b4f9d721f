"""Ahead-of-time compilation for OpenVINO: results, cache hits and invalid arguments."""

import io
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import needs_openvino  # noqa: F401
import pytest

from tpx_engines import build
from tpx_engines.cli import format_table
from tpx_engines.openvino_build import build_ahead
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import ENGINES, openvino, resolve
from tpx_runtime.engine.openvino_store import UNUSED_SECONDS
from tpx_runtime.engine.tensorrt_flavours import FLAVOURS
from tpx_runtime.errors import BadInput, Cancelled, EngineFailed, EngineUnavailable
from tpx_runtime.verify import require_ok, verify_bundle

ROWS = ["text_encoder", "transformer conditions"]
ROWS += [
    name for depth in (1, 2, 3) for name in (f"transformer depth {depth}", f"transformer depth {depth} x2")
]
ROWS += ["vae_decoder", "vae_encoder"]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy of the tiny bundle, so that its cache folder is next to the copy."""
    root = tmp_path / "copy"
    root.mkdir()
    for file in tiny_bundle.rglob("*"):
        if file.is_file():
            (root / file.relative_to(tiny_bundle)).parent.mkdir(parents=True, exist_ok=True)
            (root / file.relative_to(tiny_bundle)).write_bytes(file.read_bytes())
    return Bundle.open(root)


def cache_files(bundle: Bundle) -> dict[str, int]:
    """Cache files with their inode numbers, which change if a file is replaced; modification times change on loading."""
    folder = bundle.root.with_name(f"{bundle.root.name}.engines")
    return {str(path): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("rows", [[], [2]])
def test_refuses_to_compile_without_enough_memory(
    rows: list[int], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny transformer needs 0.54 GB for the library and, in fp32, 1.7 or 2.2 times its 0.4 MB."""
    largest = max(bundle.graphs("plain"), key=lambda graph: bundle.folder_bytes(graph.path.parent.name))
    folder_bytes = sum(
        path.stat().st_size for path in largest.path.parent.iterdir() if path.suffix != ".onnx"
    )
    need = build.BASE_BYTES + (2.2 if rows else 1.7) * (folder_bytes + largest.path.stat().st_size)
    monkeypatch.setattr(build, "available_bytes", lambda: need - 1)
    with pytest.raises(
        EngineUnavailable, match=r"expected about 0\.5 GB of free memory to build transformer .*onnxruntime"
    ):
        build_ahead(bundle, "openvino", rows)
    assert all("depth-3" not in name or (rows and name.endswith(".blob")) for name in cache_files(bundle))


def test_all_graphs_are_compiled_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    progress: list[tuple[str, float, int]] = []
    results = build_ahead(
        bundle, "openvino", [2, 2], lambda graph, done, total, _: progress.append((graph, done, total))
    )
    assert [result.graph for result in results] == ROWS
    assert all(result.engine_bytes > 1000 and result.seconds > 0 and not result.cached for result in results)
    assert progress[0] == ("text_encoder", 0, len(ROWS)) and progress[-1] == (
        "vae_encoder",
        len(ROWS),
        len(ROWS),
    )
    assert "transformer depth 3 x2" in format_table(results)

    built_files = cache_files(bundle)
    assert len(built_files) == len(ROWS)
    monkeypatch.setattr(build, "available_bytes", lambda: 0)  # nothing is compiled again
    second_results = build_ahead(bundle, "openvino", [2])
    assert [(r.graph, r.engine_bytes, r.seconds) for r in second_results] == [
        (r.graph, r.engine_bytes, 0) for r in results
    ]
    assert all(result.cached for result in second_results)

    monkeypatch.setattr(openvino.OpenVinoSession, "_load", lambda self: pytest.fail("compiled again"))
    from tpx_runtime.verify import load_golden

    golden = load_golden(bundle)
    inputs = {name: golden[name] for name in bundle.manifest.model.transformer_inputs}
    resolve("openvino").open(bundle.transformer(3, "plain")).run(inputs)
    monkeypatch.undo()
    require_ok(verify_bundle(bundle, resolve("openvino")), "openvino")
    assert cache_files(bundle) == built_files


def test_without_rows_only_dynamic_graphs_are_compiled(bundle: Bundle) -> None:
    assert [r.graph for r in build_ahead(bundle, "openvino", [])] == [row for row in ROWS if "x2" not in row]


def test_damaged_files_are_rebuilt_and_old_unused_files_are_removed(bundle: Bundle) -> None:
    build_ahead(bundle, "openvino", [2])
    folder = bundle.root.with_name("copy.engines") / "openvino/transformer.depth-3.plain.f32"
    [static], [blob] = folder.glob("*.exact"), folder.glob("any.*")
    static.write_bytes(b"damaged")
    blob.unlink()
    old = time.time() - UNUSED_SECONDS - 1
    (folder / "any.123").mkdir()
    unused = ["any.123/1.blob", "any.1.blob", "rows-2.1.exact", "rows-2.1.exact.crc32", ".tpx-1.part"]
    recent, unrelated = ["any.2.blob", "rows-2.2.exact", ".tpx-2.part"], ["rows-3.1.exact", "another.blob"]
    for name in [*unused, *recent, *unrelated]:
        (folder / name).write_bytes(b"of other settings")
    for name in [*unused, *unrelated, "any.123"]:
        os.utime(folder / name, (old, old))
    results = {result.graph: result.cached for result in build_ahead(bundle, "openvino", [2])}
    assert [name for name, cached in results.items() if not cached] == [
        "transformer depth 3",
        "transformer depth 3 x2",
    ]
    assert {path.name for path in folder.iterdir()} == {static.name, blob.name, *recent, *unrelated}
    assert static.stat().st_size > 1000


def test_files_in_use_do_not_expire(bundle: Bundle) -> None:
    """Otherwise compiling for other settings would remove graphs that were built long ago but are in use."""
    build_ahead(bundle, "openvino", [2])
    folder, old = bundle.root.with_name("copy.engines") / "openvino", time.time() - UNUSED_SECONDS - 1
    for name in cache_files(bundle):
        os.utime(name, (old, old))
    assert all(result.cached for result in build_ahead(bundle, "openvino", [2]))
    assert all(file.stat().st_mtime > old + 60 for file in folder.glob("*/*"))


def test_ctrl_c_keeps_finished_graphs_and_the_next_run_continues(bundle: Bundle) -> None:
    def interrupt(graph: str, done: float, total: int, what: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Cancelled, match=f"cancelled; 3 of {len(ROWS)} compiled graphs are in the cache"):
        build_ahead(bundle, "openvino", [2], interrupt)
    results = build_ahead(bundle, "openvino", [2])
    assert [result.cached for result in results] == [True] * 3 + [False] * (len(ROWS) - 3)
    assert not [name for name in cache_files(bundle) if name.endswith(".part")]


@pytest.mark.parametrize("kind", ["blob", "exact"])
def test_a_full_disk_leaves_no_partial_file(
    kind: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write of either kind fails; files written before it stay."""
    real_open = Path.open

    class FullDisk(io.BytesIO):
        def write(self, content: object) -> int:
            raise OSError(28, "No space left on device")

    def open_on_full_disk(self: Path, mode: str = "r", *rest: object, **options: object) -> object:
        is_first = not list(self.parent.glob("any.*"))
        if mode == "w+b" and is_first == (kind == "blob"):
            return FullDisk()
        return real_open(self, mode, *rest, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    message = (
        rf"expected to write .*{kind}, found: No space left on device; free some space or set TPX_ENGINES"
    )
    with pytest.raises(BadInput, match=message):
        build_ahead(bundle, "openvino", [2])
    assert len(cache_files(bundle)) == (0 if kind == "blob" else 3)
    assert all(name.endswith(".blob") for name in cache_files(bundle))


def test_refuses_to_compile_what_does_not_fit_on_the_disk(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(file.stat().st_size for file in bundle.root.glob("*/weights.data"))
    usage = SimpleNamespace(total=1e12, free=need - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder = bundle.root.with_name("copy.engines")
    with pytest.raises(BadInput, match=rf"free space for {folder / 'openvino'}, found 0\.00 GB; "):
        build_ahead(bundle, "openvino", [2])
    assert not folder.exists()
    usage.free = need
    build_ahead(bundle, "openvino", [])
    usage.free = 0
    static = build_ahead(bundle, "openvino", [2])[3]  # of graphs that were compiled, the rest may be small
    assert not static.cached
    assert sum(path.stat().st_size for path in folder.rglob("any.*")) >= need


@pytest.mark.parametrize("rows", [[0], [2, -1]])
def test_rejects_batches_of_less_than_one_row(bundle: Bundle, rows: list[int]) -> None:
    with pytest.raises(BadInput, match="expected batches of at least 1 row, found"):
        build_ahead(bundle, "openvino", rows)


@pytest.mark.parametrize("name", ["onnxruntime", "auto"])
def test_rejects_an_engine_that_does_not_compile_graphs_itself(bundle: Bundle, name: str) -> None:
    with pytest.raises(BadInput, match="expected an engine that compiles graphs itself, found onnxruntime"):
        build_ahead(bundle, name, [2])


def test_rejects_a_cache_folder_that_cannot_be_created(bundle: Bundle) -> None:
    bundle.root.with_name("copy.engines").write_text("a file where the folder should be")
    with pytest.raises(
        BadInput,
        match=r"expected a folder for compiled graphs at .*, found: Not a directory; set TPX_ENGINES to",
    ):
        build_ahead(bundle, "openvino", [2])


def test_a_damaged_graph_gives_a_one_line_error(bundle: Bundle) -> None:
    bundle.transformer(1, "plain").write_bytes(b"no graph")
    with pytest.raises(EngineFailed, match=r"depth-1\.plain\.onnx: openvino could not load it") as caught:
        build_ahead(bundle, "openvino", [2])
    assert str(caught.value).isprintable()


def test_exactly_the_openvino_engines_have_an_optional_build() -> None:
    optional = [name for name, engine in ENGINES.items() if engine.prebuilt == "optional"]
    assert optional == [name for name, engine in ENGINES.items() if engine.package == "openvino"]
    assert optional == list(openvino.PRECISIONS)


def test_exactly_the_tensorrt_engines_require_a_build() -> None:
    assert {name for name, engine in ENGINES.items() if engine.prebuilt == "required"} == set(FLAVOURS)
