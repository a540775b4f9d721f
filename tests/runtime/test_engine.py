"""Selecting an engine, or the reason why it cannot be used; errors of real engines for broken graphs and inputs."""

import importlib
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tomllib
from importlib.machinery import ModuleSpec
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from fake_cuda import FakeDriver, install

from tpx_runtime.engine import (
    AUTO,
    ENGINES,
    Arrays,
    Engine,
    checked_output,
    cuda,
    engine_errors,
    resolve,
)
from tpx_runtime.engine import onnxruntime as engine_onnxruntime
from tpx_runtime.engine.registry import auto_order
from tpx_runtime.errors import BadInput, EngineFailed, EngineUnavailable, one_line

REAL = ["onnxruntime", "openvino"]
NAMES = ", ".join(ENGINES)


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make find_spec report these packages as not installed."""
    find_spec = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in packages else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)


@pytest.mark.parametrize("name", REAL)
def test_resolve_returns_the_requested_engine(name: str) -> None:
    assert resolve(name) is ENGINES[name]
    assert ENGINES[name].problem() is None


def test_auto_selects_the_first_usable_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def problem(engine: Engine) -> str | None:
        checked.append(engine.name)
        return None if engine.name == "onnxruntime" else "no"

    monkeypatch.setattr(Engine, "problem", problem)
    assert resolve().name == "onnxruntime"
    assert checked == list(ENGINES)[: list(ENGINES).index("onnxruntime") + 1]


def test_an_interrupt_during_an_import_is_neither_lost_nor_an_unusable_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(name: str, package: str) -> None:
        """As an extension module does, whose initialisation loses the exception of a signal."""
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half imported") from None

    monkeypatch.setattr(importlib, "import_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve(AUTO)


def test_auto_skips_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "onnxruntime")
    assert resolve(AUTO).name == "openvino"


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "arm64"])
@pytest.mark.parametrize(
    "precision", [None, "fp32", "fp16", "int8", "int8-weights", "int4-weights", "unknown"]
)
def test_auto_prefers_openvino_for_quantised_weights(
    precision: str | None, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = ["openvino-bf16", "onnxruntime", "openvino"]
    monkeypatch.setattr(Engine, "problem", lambda engine: None if engine.name in usable else "no")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    preferred = precision in ("int8-weights", "int4-weights") and machine != "arm64"
    assert resolve(AUTO, precision).name == ("openvino" if preferred else "onnxruntime")
    usable.append("onnxruntime-cuda")
    assert resolve(AUTO, precision).name == "onnxruntime-cuda"
    usable[:] = ["openvino-bf16", "onnxruntime"]
    assert resolve(AUTO, precision).name == "onnxruntime"
    assert sorted(engine.name for engine in auto_order(precision)) == sorted(ENGINES)


def test_auto_without_any_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *(engine.package for engine in ENGINES.values()))
    with pytest.raises(EngineUnavailable) as caught:
        resolve(AUTO)
    assert str(caught.value) == (
        f"expected one of the engines {NAMES}, found none that runs here; "
        "install one with `pip install 'tpx[cpu]'`"
    )


@pytest.mark.parametrize("name", ["tensorflow", "", "ONNXRUNTIME", "a\nb" * 100, None, ["openvino"]])
def test_rejects_an_unknown_engine_name(name: str) -> None:
    with pytest.raises(BadInput) as caught:
        resolve(name)
    message = str(caught.value)
    assert message.startswith(f"expected an engine of auto, {NAMES}, found ")
    assert message.isprintable()
    assert len(message) < 200


@pytest.mark.parametrize("name", list(ENGINES))
def test_the_error_for_an_engine_not_installed_names_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ENGINES[name]
    hide(monkeypatch, engine.package)
    with pytest.raises(EngineUnavailable) as caught:
        resolve(name)
    assert str(caught.value) == (
        f"expected the package {engine.package} for engine {name}, found none; "
        f"install it with `pip install 'tpx[{engine.extra}]'`"
    )


def test_every_extra_exists_and_installs_the_package() -> None:
    facts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = facts["project"]["optional-dependencies"]
    for engine in ENGINES.values():
        # A package may have another name than its distribution, known only if it is installed.
        distributions = packages_distributions().get(engine.package, [engine.package])
        requirements = [requirement.replace("-", "_") for requirement in extras[engine.extra]]
        names = [found.replace("-", "_").removesuffix("_bindings") for found in distributions]
        assert any(name.startswith(found) for name in requirements for found in names), engine.name


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libtbb.so.12: cannot open\nshared object file"),
        AttributeError("libtbb.so.12: cannot open shared object file"),
    ],
)
def test_a_package_that_fails_to_import_is_reported(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_module = importlib.import_module

    def failing_import(name: str, package: str | None = None) -> object:
        if name == ".openvino":
            raise error
        return import_module(name, package)

    monkeypatch.setattr(importlib, "import_module", failing_import)
    with pytest.raises(EngineUnavailable) as caught:
        resolve("openvino")
    assert str(caught.value) == (
        "expected openvino to import for engine openvino, found: libtbb.so.12: cannot open shared object "
        "file; install it again with `pip install --force-reinstall 'tpx[openvino]'`"
    )


class TestThreads:
    """CPU engines use every core unless TPX_THREADS limits them."""

    @pytest.mark.parametrize(("value", "threads"), [(None, 0), ("", 0), (" 3 ", 3)])
    def test_onnxruntime_uses_the_given_number(
        self, value: str | None, threads: int, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnxruntime

        threads_seen: list[int] = []
        create = onnxruntime.InferenceSession

        def recording(path: str, options: onnxruntime.SessionOptions, providers: object) -> object:
            threads_seen.append(options.intra_op_num_threads)
            return create(path, options, providers=providers)

        monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
        monkeypatch.delenv("TPX_THREADS", raising=False)
        if value is not None:
            monkeypatch.setenv("TPX_THREADS", value)
        ENGINES["onnxruntime"].open(tiny_bundle / "text_encoder/model.onnx")
        assert threads_seen == [threads]

    def test_openvino_uses_the_given_number_and_does_not_split_for_one(
        self, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tpx_runtime.engine import openvino, openvino_static

        path = tiny_bundle / "text_encoder/model.onnx"
        store, shapes = openvino.open_store("openvino", path), (("ids", (2, 12)),)
        assert "INFERENCE_NUM_THREADS" not in openvino.compile_config("openvino", path)
        monkeypatch.setenv("TPX_ENGINES", str(tmp_path))
        for threads, parts in (("1", 1), ("2", 2)):
            monkeypatch.setenv("TPX_THREADS", threads)
            other = openvino.open_store("openvino", path)
            compiled = openvino.compile_dynamic(path, openvino.compile_config("openvino", path))
            assert compiled.get_property("INFERENCE_NUM_THREADS") == int(threads)
            assert openvino_static.num_parts(openvino.core(), shapes, other) == parts
            assert other.dynamic_file.name != store.dynamic_file.name  # compiled separately

    @pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1000000"])
    @pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
    def test_rejects_an_invalid_number(
        self, name: str, value: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TPX_THREADS", value)
        with pytest.raises(BadInput, match=r"expected TPX_THREADS to be a whole number in 1\.\.\d+, found "):
            ENGINES[name].open(tiny_bundle / "text_encoder/model.onnx")


class TestCuda:
    """onnxruntime-cuda on a machine or with a package that cannot run it: never a silent fallback."""

    def test_a_package_without_cuda_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        with pytest.raises(EngineUnavailable, match=r"found one without; .*pip install 'tpx\[gpu\]'"):
            resolve("onnxruntime-cuda")

    def test_an_old_version_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "__version__", "1.29.1")
        with pytest.raises(
            EngineUnavailable, match=r"expected onnxruntime 1\.30 or later .*, found 1\.29\.1; "
        ):
            resolve("onnxruntime-cuda")

    def test_a_missing_driver_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        monkeypatch.setattr(cuda, "load_library", lambda name: None)
        with pytest.raises(EngineUnavailable) as caught:
            resolve("onnxruntime-cuda")
        assert str(caught.value) == (
            f"expected an NVIDIA driver ({cuda.DRIVER}), found none; engine onnxruntime-cuda needs it, "
            "use the engine onnxruntime"
        )

    def test_a_driver_without_a_gpu_is_reported_and_auto_skips_the_engine(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnxruntime

        driver = SimpleNamespace(cuInit=lambda flags: cuda.NO_DEVICE, cuGetErrorName=lambda code, text: 1)
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
        monkeypatch.setattr(cuda, "load_library", lambda name: driver)
        with pytest.raises(
            EngineUnavailable, match="expected an NVIDIA GPU, found a driver without one; eng"
        ):
            resolve("onnxruntime-cuda")
        assert resolve("auto").name != "onnxruntime-cuda"

    def test_falling_back_to_the_cpu_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime

        install(monkeypatch, driver := FakeDriver())
        monkeypatch.setattr("tpx_runtime.engine.onnxruntime._idle_streams", [])
        session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"], get_outputs=list)
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kwargs: session)
        for _ in range(2):
            with pytest.raises(EngineUnavailable) as caught:
                ENGINES["onnxruntime-cuda"].open(Path("model.onnx"))
        assert len(driver.streams) == 1  # used again
        assert str(caught.value) == (
            "expected CUDAExecutionProvider for engine onnxruntime-cuda, found that onnxruntime fell back to "
            "CPUExecutionProvider; check the CUDA and cuDNN that onnxruntime-gpu asks for"
        )


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("content", [b"", b"no graph", None])
def test_a_graph_that_does_not_load_gives_a_one_line_error(
    name: str, content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineFailed) as caught:
        ENGINES[name].open(path)
    assert str(caught.value).startswith(f"{path}: {name} could not load it: ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"ids": np.zeros((1, 3), np.int64)},
        {"other": np.zeros((1, 12), np.int64)},
    ],
)
def test_wrong_inputs_give_a_one_line_error(
    name: str, inputs: dict[str, np.ndarray], tiny_bundle: Path
) -> None:
    session = ENGINES[name].open(tiny_bundle / "text_encoder/model.onnx")
    with pytest.raises(EngineFailed, match=f"{name} could not run it: ") as caught:
        session.run(inputs)
    assert str(caught.value).isprintable()


class TimeLimit(Exception):
    """Raised by an application in a signal handler during an engine call."""


class Foreign(Exception):
    """An exception type of an engine's own module."""


Foreign.__module__ = "engine.inner"


def test_engine_errors_are_converted_and_others_propagate() -> None:
    with pytest.raises(TimeLimit), engine_errors(Path("a.onnx"), "engine", "run"):
        raise TimeLimit
    for error in (RuntimeError("bad\nshape"), Foreign("bad\nshape"), ValueError("bad\nshape")):
        with (
            pytest.raises(EngineFailed, match=r"^a\.onnx: engine could not run it: bad shape$"),
            engine_errors(Path("a.onnx"), "engine", "run"),
        ):
            raise error


def test_a_memory_error_is_reported_with_advice() -> None:
    with (
        pytest.raises(EngineFailed, match=r"Failed to allocate memory; if memory is short, generate"),
        engine_errors(Path("a.onnx"), "engine", "run"),
    ):
        raise RuntimeError("Failed to allocate memory")


@pytest.mark.parametrize("name", REAL)
def test_runs_a_graph_at_any_batch_size(name: str, tiny_bundle: Path) -> None:
    session = ENGINES[name].open(tiny_bundle / "text_encoder/model.onnx")
    ids = np.arange(36).reshape(3, 12) % 16
    together = session.run({"ids": ids})
    assert together["context"].shape == (3, 12, 32)
    assert together["context"].dtype == np.float32
    for row in range(3):
        single = session.run({"ids": ids[row : row + 1]})
        for key in ("context", "pooled"):
            np.testing.assert_allclose(single[key][0], together[key][row], rtol=1e-4, atol=1e-5)
    assert not np.shares_memory(together["context"], session.run({"ids": ids})["context"])


def test_onnx_runtime_names_a_path_that_is_not_utf8() -> None:
    path = Path(os.fsdecode(b"/tmp/h\xff/model.onnx"))
    with pytest.raises(
        EngineFailed, match=r"^expected a bundle whose path is UTF-8, found b'/tmp/h\\xff/model"
    ):
        ENGINES["onnxruntime"].open(path)


def test_onnx_runtime_returns_memory_in_a_call_with_fewer_rows() -> None:
    shrinks: list[bool] = []

    def run(names: list[str], inputs: Arrays, options: ort.RunOptions | None) -> list[object]:
        shrinks.append(
            options is not None
            and options.get_run_config_entry("memory.enable_memory_arena_shrinkage") == "cpu:0"
        )
        return []

    session = SimpleNamespace(get_outputs=list, run=run)
    opened = engine_onnxruntime.OrtSession(session, Path("model.onnx"))
    for rows in (1, 64, 64, 2, 2, 1, 8):
        opened.run({"x": np.zeros((rows, 3)), "slot": np.array(0)})
    assert shrinks == [False, False, False, True, False, True, False]


_MEMORY_OF_CALLS = """
import sys
from pathlib import Path
import numpy as np
from onnx import TensorProto, helper, numpy_helper, save
from tpx_engines.bench.memory import peak_bytes
from tpx_runtime.engine import ENGINES
path, images = Path(sys.argv[1]), np.ones((1, 32, 512, 512), np.float32)
weight = numpy_helper.from_array(np.ones((32, 32, 1, 1), np.float32), "w")
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (None, 32, None, None)) for name in "xz"]
layers = [("Conv", "xw", "a"), ("Conv", "aw", "b"), ("Conv", "bw", "c"), ("Add", "ac", "d"), ("Conv", "dw", "z")]
nodes = [helper.make_node(kind, [*inputs], [output]) for kind, inputs, output in layers]
graph = helper.make_graph(nodes, "graph", values[:1], values[1:], [weight])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
session = ENGINES["onnxruntime"].open(path)
for _ in range(2):
    session.run({"x": images})
    print(peak_bytes())
"""


def test_onnx_runtime_needs_no_more_memory_in_the_second_call(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _MEMORY_OF_CALLS, str(tmp_path / "model.onnx")]
    first, second = map(
        int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    assert second - first < 16 * 2**20  # each result has 32 MiB


def test_memory_patterns_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: dict[str, bool] = {}

    def record(path: str, options: ort.SessionOptions, providers: list[tuple[str, dict[str, str]]]) -> None:
        patterns[providers[0][0]] = options.enable_mem_pattern

    monkeypatch.setattr(ort, "InferenceSession", record)
    for provider in engine_onnxruntime.PROVIDERS.values():
        engine_onnxruntime._load(Path("model.onnx"), provider, {})
    assert patterns == {"CPUExecutionProvider": False, "CUDAExecutionProvider": False}


def test_output_is_checked_by_name_and_shape() -> None:
    outputs = {"image": np.zeros((2, 3))}
    assert checked_output(outputs, "image", (2, 3)) is outputs["image"]
    with pytest.raises(EngineFailed, match=r"expected an output image of shape \(3, 2\), found \(2, 3\)"):
        checked_output(outputs, "image", (3, 2))
    with pytest.raises(EngineFailed, match=r"expected an output velocity of shape \(1,\), found none"):
        checked_output(outputs, "velocity", (1,))


def test_one_line_joins_and_shortens_a_long_error() -> None:
    assert one_line(RuntimeError("a\n  b\t c")) == "a b c"
    assert len(one_line(RuntimeError("x" * 10_000))) == 300 and one_line("abc", 2) == "ab"


def test_using_one_engine_imports_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "openvino"):
        monkeypatch.delitem(sys.modules, f"tpx_runtime.engine.{package}", raising=False)
    resolve("onnxruntime")
    assert "tpx_runtime.engine.openvino" not in sys.modules


RELEASE_AND_INTERRUPT = """
import signal
from pathlib import Path
from tpx_runtime.engine import ENGINES

first, second = (ENGINES[{name!r}].open(Path({bundle!r}) / part / "model.onnx") for part in ("text_encoder", "vae_decoder"))
del first
del second
signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize("name", REAL)
def test_ctrl_c_works_after_graphs_were_released(name: str, tiny_bundle: Path) -> None:
    """OpenVINO sets a signal stack for the thread; if that has been freed, the next signal crashes."""
    code = RELEASE_AND_INTERRUPT.format(name=name, bundle=str(tiny_bundle))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == -signal.SIGINT
    assert result.stderr.splitlines()[-1] == "KeyboardInterrupt"
