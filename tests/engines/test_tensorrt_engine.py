"""The engines tensorrt and tensorrt-rtx: the built engine is found and used, or a one-line error says what to build."""

import gc
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_graphs import graphs_to_build
from click.testing import CliRunner, Result
from fake_cuda import FakeDriver, install
from fake_tensorrt import FakeEngineFunction, FakeTensorRt
from onnx import TensorProto, helper
from PIL import Image
from runtime.fakes import FakeEngine, functions, make_bundle

from tpx_engines.cache import EngineCache, Key
from tpx_engines.tensorrt import build
from tpx_runtime.bundle import Bundle
from tpx_runtime.cli import run
from tpx_runtime.engine import ENGINES, cuda, resolve, tensorrt_flavours
from tpx_runtime.engine import tensorrt as module
from tpx_runtime.engine import tensorrt_session as session_module
from tpx_runtime.engine.engine_file import graph_name
from tpx_runtime.engine.gpu import Gpu, local_gpu
from tpx_runtime.engine.tensorrt_flavours import FLAVOURS, FULL, RTX, bindings
from tpx_runtime.errors import EngineFailed, EngineUnavailable
from tpx_runtime.generator import Generator

VERSION = "1.7.1.116"
LOCAL_GPU = Gpu(89, "NVIDIA L4", "580.65.06")
NAMES = list(FLAVOURS)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    install(monkeypatch, fake)
    return fake


@pytest.fixture
def bundle(bundle_path: Path) -> Bundle:
    return Bundle.open(bundle_path)


@pytest.fixture
def bundle_path(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "paper")


@pytest.fixture
def trt(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRt]:
    """A fake TensorRT with an engine `text` that doubles its ids."""
    ids = {"ids": ("INT64", (-1, 9))}
    text = FakeEngineFunction(lambda ids: {"y": ids * 2}, ids, {"y": ("INT64", (-1, 9))})
    fake = FakeTensorRt(driver, VERSION, text=text)
    tensorrt_flavours.get_logger.cache_clear()
    for target_module in (module, session_module, tensorrt_flavours):
        monkeypatch.setattr(target_module, "bindings", lambda flavour: fake)
    modules, find_spec = {flavour.module for flavour in FLAVOURS.values()}, importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: name in modules or find_spec(name, *of)
    )
    yield fake
    tensorrt_flavours.get_logger.cache_clear()


def key(bundle: Bundle, graph: str = "text_encoder", engine: str = "tensorrt-rtx") -> Key:
    return Key(
        bundle=bundle.hash,
        graph=graph,
        precision="fp32",
        batch=(1, 2),
        engine=engine,
        version=VERSION,
        capability="sm89",
        gpu=LOCAL_GPU.name,
        driver=LOCAL_GPU.driver,
        plugin="" if engine == "tensorrt-rtx" else "0123456789abcdef",
    )


def store(bundle: Bundle, engine_key: Key, engine: str = "text", folder: Path | None = None) -> Path:
    cache = EngineCache.for_bundle(bundle, folder)
    cache.prepare()
    return cache.store(engine_key, json.dumps(engine).encode())


class TestProblem:
    """Why an engine cannot be used here, on one line."""

    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "bindings", lambda flavour: None)

    @pytest.mark.parametrize("name", NAMES)
    def test_no_problem_with_a_driver_a_gpu_and_the_package(self, driver: FakeDriver, name: str) -> None:
        assert module.problem(name) is None

    @pytest.mark.parametrize("name", NAMES)
    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        install(monkeypatch, None)
        assert module.problem(name) == (
            f"expected an NVIDIA driver ({cuda.DRIVER}), found none; engine {name} needs it"
        )

    def test_a_driver_without_a_gpu(self, driver: FakeDriver) -> None:
        driver.fail["cuInit"] = 100
        assert module.problem("tensorrt") == (
            "expected an NVIDIA GPU, found a driver without one; engine tensorrt needs it"
        )

    def test_a_driver_that_does_not_start(self, driver: FakeDriver) -> None:
        driver.fail["cuInit"] = 803
        assert "expected an NVIDIA driver that starts, found error 803" in str(module.problem("tensorrt"))

    @pytest.mark.parametrize("entry", ["cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"])
    def test_a_gpu_whose_properties_cannot_be_read(self, driver: FakeDriver, entry: str) -> None:
        driver.fail[entry] = 2
        assert f"expected CUDA's {entry} to succeed, found CUDA_ERROR" in str(module.problem("tensorrt"))

    def test_a_gpu_that_rtx_does_not_support(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, FakeDriver((9, 0), b"NVIDIA H100"))
        assert module.problem("tensorrt-rtx") == (
            "expected a GPU of sm75, sm80, sm86, sm89, sm120, sm121 for engine tensorrt-rtx, found NVIDIA H100 (sm90); "
            "use the engine tensorrt"
        )
        assert module.problem("tensorrt") is None

    def test_libraries_that_do_not_load(self, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(flavour: object) -> None:
            raise EngineUnavailable("expected libtensorrt_rtx.so to load, found: wrong ELF class")

        monkeypatch.setattr(module, "bindings", broken)
        assert module.problem("tensorrt-rtx") == (
            "expected libtensorrt_rtx.so to load, found: wrong ELF class; engine tensorrt-rtx needs it"
        )

    @pytest.mark.parametrize("name", NAMES)
    def test_the_problem_on_this_machine_is_one_line(self, name: str) -> None:
        problem = ENGINES[name].problem()
        if problem is not None:
            assert problem.startswith("expected ")
            assert problem.isprintable()
            with pytest.raises(EngineUnavailable) as caught:
                resolve(name)
            assert str(caught.value) == problem


class TestBindings:
    """Loading the module and its libraries."""

    @pytest.fixture(autouse=True)
    def clear_cache(self) -> Iterator[None]:
        bindings.cache_clear()
        yield
        bindings.cache_clear()

    def test_reports_the_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt_flavours, "find_spec", lambda name: None)
        for flavour, package in ((RTX, "onnxruntime_ep_nv_tensorrt_rtx"), (FULL, "tensorrt")):
            with pytest.raises(EngineUnavailable) as caught:
                bindings(flavour)
            assert str(caught.value) == (
                f"expected the package {package} for engine {flavour.name}, found none; "
                f"install it with `pip install 'tpx[{flavour.name}]'`"
            )

    @pytest.mark.parametrize("text", ["", "not a library"])
    def test_reports_a_missing_or_broken_library(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        package = tmp_path / "hollow"
        package.mkdir()
        (package / "__init__.py").touch()
        if text:
            (package / "libtensorrt_rtx.so.1").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        found = "to load, found: " if text else f"in {package}, found none; install it again with "
        with pytest.raises(EngineUnavailable, match=f"expected libtensorrt_rtx.so {found}"):
            bindings(replace(RTX, library_package="hollow"))

    def test_a_module_that_fails_to_import_gives_a_one_line_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "trt_broken.py").write_text("raise RuntimeError('libnvinfer.so.11:\\n not here')")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(
            EngineUnavailable, match=r"expected trt_broken to import .*libnvinfer\.so\.11: not here;"
        ):
            bindings(replace(FULL, module="trt_broken"))

    def test_rejects_an_older_tensorrt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        old = FakeTensorRt(FakeDriver(), "10.13.3.9")
        monkeypatch.setattr(tensorrt_flavours, "find_spec", lambda name: object())
        monkeypatch.setattr(tensorrt_flavours.importlib, "import_module", lambda name: old)
        with pytest.raises(
            EngineUnavailable, match=r"expected TensorRT 10\.14 or later, found 10\.13\.3\.9; install"
        ):
            bindings(FULL)


def run_text_encoder(bundle: Bundle, name: str = "tensorrt-rtx") -> np.ndarray:
    """The output of the text encoder's engine for two rows."""
    session = ENGINES[name].open(bundle.root / "text_encoder/model.onnx")
    return session.run({"ids": np.arange(18).reshape(2, 9)})["y"]


@pytest.mark.parametrize("name", NAMES)
def test_uses_the_engine_that_was_built(trt: FakeTensorRt, bundle: Bundle, name: str) -> None:
    store(bundle, key(bundle, engine=name))
    np.testing.assert_array_equal(run_text_encoder(bundle, name), np.arange(18).reshape(2, 9) * 2)


def test_uses_an_engine_that_was_built_without_a_gpu(trt: FakeTensorRt, bundle: Bundle) -> None:
    store(bundle, replace(key(bundle), gpu=None, driver=None))
    assert run_text_encoder(bundle).shape == (2, 9)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_engine_is_reported_with_the_build_command(
    trt: FakeTensorRt, bundle: Bundle, name: str
) -> None:
    with pytest.raises(EngineUnavailable) as caught:
        run_text_encoder(bundle, name)
    assert str(caught.value) == (
        f"expected an engine of text_encoder in {bundle.root}.engines (text-encoder.fp32.b*.{name}.sm89.engine), "
        f"found none; build it with `tpx-build {bundle.root} --engine {name}`"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("bundle", "cd" * 32), ("version", "1.7.1.117"), ("gpu", "NVIDIA L40"), ("driver", "590.10")],
)
def test_reports_the_difference_and_the_build_command(
    trt: FakeTensorRt, bundle: Bundle, field: str, value: str
) -> None:
    expected_key = key(bundle)
    path = store(bundle, replace(expected_key, **{field: value}))
    with pytest.raises(EngineUnavailable) as caught:
        run_text_encoder(bundle)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected {field} '{getattr(expected_key, field)[:30]}")
    assert f", found '{value[:30]}" in message
    assert message.endswith(f"; build it again with `tpx-build {bundle.root} --engine tensorrt-rtx`")
    assert message.count("expected") == 1


@pytest.mark.parametrize("field", ["graph", "precision", "engine", "capability"])
def test_ignores_engines_of_another_graph_precision_engine_or_capability(
    trt: FakeTensorRt, bundle: Bundle, field: str
) -> None:
    other_values = {"graph": "vae_decoder", "precision": "fp16", "engine": "tensorrt", "capability": "sm120"}
    store(bundle, replace(key(bundle), **{field: other_values[field]}))
    with pytest.raises(EngineUnavailable, match="found none; build it with"):
        run_text_encoder(bundle)


def test_rejects_a_damaged_engine(trt: FakeTensorRt, bundle: Bundle) -> None:
    path = store(bundle, key(bundle))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(EngineUnavailable, match=r"expected SHA-256 .*build it again with `tpx-build"):
        run_text_encoder(bundle)


def test_prefers_the_lowest_minimum_batch_then_the_highest_maximum(trt: FakeTensorRt, bundle: Bundle) -> None:
    for batch in ((2, 8), (1, 2), (1, 4), (4, 4)):
        store(bundle, replace(key(bundle), batch=batch))
    session = ENGINES["tensorrt-rtx"].open(bundle.root / "text_encoder/model.onnx")
    session.run({"ids": np.zeros((5, 9), np.int64)})
    assert [shapes["ids"][0] for shapes in trt.executed] == [4, 1]


def test_a_matching_engine_is_found_next_to_others(trt: FakeTensorRt, bundle: Bundle) -> None:
    store(bundle, replace(key(bundle), batch=(1, 8), version="1.7.0.1"))
    store(bundle, key(bundle))
    assert run_text_encoder(bundle).shape == (2, 9)


def test_an_environment_variable_sets_the_engine_folder(
    trt: FakeTensorRt, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "else where"
    monkeypatch.setenv("TPX_ENGINES", str(folder))
    with pytest.raises(EngineUnavailable, match=f"in {folder}/paper .* --engine tensorrt-rtx`"):
        run_text_encoder(bundle)
    other = Bundle.open(make_bundle(tmp_path / "other"))
    for each in (bundle, other):
        store(each, key(each))
    assert run_text_encoder(bundle).shape == (2, 9)
    assert run_text_encoder(other).shape == (2, 9)


def test_a_folder_of_engines_that_cannot_be_reached_is_named(
    trt: FakeTensorRt, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPX_ENGINES", "n" * 300)
    with pytest.raises(
        EngineUnavailable, match="n/paper: expected a folder to read, found: File name too long; "
    ):
        run_text_encoder(bundle)


def test_an_environment_variable_switches_cuda_graphs_on_and_off(
    trt: FakeTensorRt, driver: FakeDriver, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(bundle, key(bundle, engine="tensorrt"))
    for value, captures in (("0", 0), ("1", 1)):
        monkeypatch.setenv("TPX_CUDA_GRAPHS", value)
        session = ENGINES["tensorrt"].open(bundle.root / "text_encoder/model.onnx")
        for _ in range(3):
            session.run({"ids": np.arange(18).reshape(2, 9)})
        assert driver.calls["cuStreamBeginCapture_v2"] == captures


def test_graph_names_match_those_of_tpx_build(bundle: Bundle) -> None:
    assert {graph_name(path): path for path, _ in graphs_to_build(bundle).values()} == {
        graph: path for graph, (path, _) in graphs_to_build(bundle).items()
    }


def test_local_gpu(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_gpu() == LOCAL_GPU
    monkeypatch.setattr(cuda, "load_library", {cuda.DRIVER: driver}.get)
    assert local_gpu() == replace(LOCAL_GPU, driver=None)
    driver.fail["cuInit"] = 100
    assert local_gpu() is None
    install(monkeypatch, None)
    assert local_gpu() is None


def store_fake_engines(trt: FakeTensorRt, bundle: Bundle, engine: str) -> None:
    """Store a fake engine for every graph of a fake bundle, with the graph's function and shapes."""
    graph_functions = functions(bundle.manifest)
    kinds = {np.dtype(np.int64): "INT64", np.dtype(np.float32): "FLOAT"}
    for graph, (path, shapes) in graphs_to_build(bundle).items():
        function = graph_functions[path.relative_to(bundle.root).as_posix()]
        dtypes = {name: np.int64 if name == "ids" else np.float32 for name in shapes}
        example_inputs = {
            name: np.ones([size or 1 for size in shape], dtypes[name]) for name, shape in shapes.items()
        }
        inputs = {
            name: (kinds[array.dtype], (-1, *array.shape[1:])) for name, array in example_inputs.items()
        }
        outputs = {
            name: (kinds[array.dtype], (-1, *array.shape[1:]))
            for name, array in function(example_inputs).items()
        }
        trt.made[graph] = FakeEngineFunction(
            lambda function=function, **arrays: function(arrays), inputs, outputs
        )
        store(bundle, key(bundle, graph, engine), graph)


@pytest.fixture
def tpx_run(bundle_path: Path, tmp_path: Path) -> Callable[..., Result]:
    fixed = ["a red cube", "--bundle", str(bundle_path), "--out", str(tmp_path / "out.png"), "--steps", "2"]
    return lambda *arguments: CliRunner().invoke(run, [*fixed, *arguments])


@pytest.mark.parametrize("name", NAMES)
def test_generates_the_same_image_as_another_engine(
    trt: FakeTensorRt,
    driver: FakeDriver,
    bundle: Bundle,
    tpx_run: Callable[..., Result],
    name: str,
    tmp_path: Path,
) -> None:
    store_fake_engines(trt, bundle, name)
    result = tpx_run("--engine", name)
    assert result.exit_code == 0, result.output
    assert f"engine: {name}\n" in result.stderr
    [expected] = Generator(bundle, FakeEngine())("a red cube", steps=2)  # type: ignore[arg-type]
    with Image.open(tmp_path / "out.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    gc.collect()
    assert driver.held == {}


@pytest.mark.parametrize("name", NAMES)
def test_tpx_run_without_engines_prints_the_build_command(
    trt: FakeTensorRt, tpx_run: Callable[..., Result], name: str, tmp_path: Path
) -> None:
    result = tpx_run("--engine", name)
    assert (result.exit_code, (tmp_path / "out.png").exists()) == (4, False)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: expected an engine of ")
    assert last.endswith(f"build it with `tpx-build {tmp_path / 'paper'} --engine {name}`")


@pytest.fixture
def rtx() -> None:
    try:
        bindings(RTX)
    except EngineUnavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture
def no_driver() -> None:
    if cuda.load_library(cuda.DRIVER):
        pytest.skip("expected a machine without an NVIDIA driver, found one")


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("valid", [True, False])
def test_real_libraries_without_a_driver_give_a_one_line_error(
    no_driver: None, driver: FakeDriver, tmp_path: Path, valid: bool
) -> None:
    """NVIDIA's own library reports that the driver is missing, in one line, and no resources of the fake driver remain."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", ports[:1], ports[1:])
    path = tmp_path / "relu.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    engine = build(RTX, path, {"x": (None, 4)}) if valid else b"no engine"
    with pytest.raises(EngineFailed) as caught:
        session_module.TensorRtSession(RTX, cuda.Driver(), engine, (1, 2), path, tmp_path / "kernels")
    message = str(caught.value)
    assert message.startswith(f"{path}: tensorrt-rtx could not load its engine: ")
    assert "CUDA driver version is insufficient" in message
    assert message.isprintable()
    assert driver.held == {}
