"""tpx-build: builds and cache hits, bad arguments, progress, and cancelled builds."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from bundle_graphs import graphs_to_build
from click.testing import CliRunner, Result
from runtime.fakes import CLASSES, THREE_ENCODERS, make_bundle, without_encoder

from tpx_engines import build as module
from tpx_engines import routed_lora_choice, target, tensorrt
from tpx_engines.cache import EngineCache
from tpx_engines.cli import main
from tpx_engines.progress import Progress
from tpx_engines.routed_lora_graph import adapter_rank
from tpx_engines.target import choose_gpu, parse_batch
from tpx_engines.tensorrt import Shapes, TimingCache
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import tensorrt_flavours
from tpx_runtime.engine.gpu import Gpu
from tpx_runtime.engine.tensorrt_flavours import FULL, RTX, Flavour, bindings
from tpx_runtime.errors import BadInput, Cancelled, EngineFailed, EngineUnavailable

TRANSFORMERS = [f"transformer depth {depth}" for depth in (1, 2, 3)]
GRAPHS = ["text_encoder", "transformer conditions", *TRANSFORMERS, "vae_decoder", "vae_encoder"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "local_gpu", lambda: None)


class FakeBuilder:
    """A fake TensorRT builder: records its arguments, and calls `then` at graph number `at`."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.timings: list[bytes] = []
        self.plugins: list[bool] = []
        self.version = "1.7.1.116"
        self.at, self.then = -1, lambda progress: None

    def __call__(
        self,
        flavour: Flavour,
        path: Path,
        inputs: Shapes,
        batch: tuple[int, int],
        capability: int,
        progress: Progress,
        timings: TimingCache,
        plugin: bool,
    ) -> bytes:
        if len(self.built) == self.at:
            self.at = -1
            self.then(progress)
        if progress.cancelled:
            raise Cancelled("stopped by the monitor")
        self.built.append(f"{path.parent.name}/{path.stem}")
        self.timings.append(timings.data)
        self.plugins.append(plugin)
        timings.data += b"+"
        return f"{path} {batch} {capability}".encode()


def press_ctrl_c(progress: Progress, signal_number: signal.Signals = signal.SIGINT) -> None:
    """Send Ctrl-C or another signal to the main thread, and wait until it was received."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal_number)
    assert progress._stop.wait(60)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> FakeBuilder:
    fake = FakeBuilder()
    monkeypatch.setattr(tensorrt, "build", fake)
    monkeypatch.setattr(module, "version", lambda flavour: fake.version)
    return fake


@pytest.fixture
def tpx_build(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Result]:
    """Runs tpx-build of the tiny bundle with an empty cache and more arguments, by default for sm89."""

    def run(*arguments: str) -> Result:
        gpu = [] if "--gpu" in arguments else ["--gpu", "sm89"]
        return CliRunner().invoke(
            main, [str(tiny_bundle), "--cache", str(tmp_path / "cache"), *gpu, *arguments]
        )

    return run


def engine_origins(result: Result) -> list[str]:
    """The last column of the table, "build" or "cache", for each graph."""
    assert result.exit_code == 0, result.output
    *table, notice = result.stderr.splitlines()
    lines = (table if notice.startswith("notice:") else [*table, notice])[-len(GRAPHS) :]
    assert [line[:22].strip() for line in lines] == GRAPHS
    return [line.split()[-1] for line in lines]


def test_builds_every_graph_once_and_then_uses_the_cache(
    builder: FakeBuilder, tpx_build: Callable[..., Result], tmp_path: Path
) -> None:
    first = tpx_build()
    assert engine_origins(first) == ["build"] * len(GRAPHS)
    assert first.stderr.endswith(f"\nnotice: set TPX_ENGINES={tmp_path / 'cache'} for tpx-run to find them\n")
    assert first.stdout == f"{tmp_path / 'cache/tiny'}\n"
    assert engine_origins(tpx_build()) == ["cache"] * len(GRAPHS)
    assert builder.built == [
        "text_encoder/model",
        "transformer/conditions",
        "transformer/depth-1",
        "transformer/depth-2",
        "transformer/depth-3",
        "vae_decoder/model",
        "vae_encoder/model",
    ]


@pytest.mark.parametrize("arguments", [["--batch", "1,4"], ["--gpu", "sm120"]])
def test_another_batch_or_gpu_is_built_without_replacing_engines(
    builder: FakeBuilder, tpx_build: Callable[..., Result], arguments: list[str]
) -> None:
    tpx_build()
    assert engine_origins(tpx_build(*arguments)) == ["build"] * len(GRAPHS)
    assert engine_origins(tpx_build()) == ["cache"] * len(GRAPHS)


def test_another_version_is_rebuilt_with_a_reason(
    builder: FakeBuilder, tpx_build: Callable[..., Result]
) -> None:
    tpx_build()
    builder.version = "1.7.2.3"
    result = tpx_build()
    assert engine_origins(result) == ["build"] * len(GRAPHS)
    assert result.stderr.count("expected version '1.7.2.3', found '1.7.1.116'") == len(GRAPHS)


def test_only_the_damaged_engine_is_rebuilt(
    builder: FakeBuilder, tpx_build: Callable[..., Result], tmp_path: Path
) -> None:
    tpx_build()
    (damaged,) = (tmp_path / "cache/tiny").glob("transformer-depth-2.*")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    result = tpx_build()
    assert engine_origins(result) == ["cache"] * 3 + ["build"] + ["cache"] * 3
    assert result.stderr.startswith(f"building again: {damaged}: expected SHA-256 ")


def test_a_failed_build_keeps_the_engines_built_before(
    builder: FakeBuilder, tpx_build: Callable[..., Result], tmp_path: Path
) -> None:
    def fail(progress: Progress) -> None:
        raise EngineFailed("cannot build it")

    builder.at, builder.then = 2, fail
    result = tpx_build()
    assert (result.exit_code, result.stdout) == (5, "")
    assert "error: cannot build it\n" in result.stderr
    assert engine_origins(tpx_build()) == ["cache"] * 2 + ["build"] * 5


def test_ctrl_c_stops_the_builder_and_the_next_run_continues(
    builder: FakeBuilder, tpx_build: Callable[..., Result], tmp_path: Path, how: signal.Signals
) -> None:
    builder.at, builder.then = 2, partial(press_ctrl_c, signal_number=how)
    result = tpx_build()
    assert (result.exit_code, result.stdout) == (130, "")
    message = f"error: cancelled; 2 of 7 engines are in {tmp_path / 'cache/tiny'}, run the same command to continue\n"
    assert result.stderr.endswith(message)
    names = sorted(path.name for path in (tmp_path / "cache/tiny").iterdir())
    assert [name.split(".")[0] for name in names] == ["text-encoder", "transformer-conditions"]
    assert engine_origins(tpx_build()) == ["cache"] * 2 + ["build"] * 5


def test_an_engine_finished_after_ctrl_c_is_stored(
    builder: FakeBuilder, tpx_build: Callable[..., Result]
) -> None:
    def finish_despite_ctrl_c(progress: Progress) -> None:
        press_ctrl_c(progress)
        progress._stop = threading.Event()

    builder.at, builder.then = 1, finish_despite_ctrl_c
    result = tpx_build()
    assert result.exit_code == 130
    assert "error: cancelled; 2 of 7 engines are in " in result.stderr
    assert engine_origins(tpx_build()) == ["cache"] * 2 + ["build"] * 5


def test_a_second_ctrl_c_exits_immediately(
    builder: FakeBuilder, tpx_build: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    exited, exit_codes = threading.Event(), []

    def press_twice_and_wait(progress: Progress) -> None:
        press_ctrl_c(progress)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        exited.wait()

    def fake_exit(code: int) -> None:
        exit_codes.append(code)
        exited.set()
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", fake_exit)
    builder.at, builder.then = 1, press_twice_and_wait
    result = tpx_build()
    assert exit_codes == [130]
    assert "error: stopped; finished engines are in " in result.stderr
    assert engine_origins(tpx_build())[:2] == ["cache", "build"]


def test_the_signal_handler_is_restored(builder: FakeBuilder, tpx_build: Callable[..., Result]) -> None:
    before = signal.getsignal(signal.SIGINT)
    builder.at, builder.then = 0, press_ctrl_c
    assert tpx_build().exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("text", "batch"), [("1,4", (1, 4)), ("2", (2, 2)), ("3,3", (3, 3)), ("1,9999", (1, 9999))]
)
def test_parses_a_batch_range(text: str, batch: tuple[int, int]) -> None:
    assert parse_batch(text) == batch


@pytest.mark.parametrize(
    "text",
    ["", "0", "0,1", "4,1", "1,", ",1", "1,2,3", "1-4", "1, 4", "-1,2", "a", "1.5", "1,10000", "１,４"],
)
def test_rejects_an_invalid_batch_range(text: str) -> None:
    with pytest.raises(BadInput, match="expected --batch MIN,MAX with 1 <= MIN <= MAX <= 9999, such as"):
        parse_batch(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "4,1"], "expected --batch MIN,MAX"),
        (["--gpu", "sm90"], "expected --gpu of sm75, sm80, sm86, sm89, sm120, sm121, found 'sm90'"),
        (["--gpu", "89"], "expected --gpu of sm75"),
        (
            ["--engine", "auto"],
            "expected --engine of tensorrt-rtx, tensorrt, openvino, openvino-bf16, found 'auto'",
        ),
        (["--engine", "tensorflow"], "expected --engine of tensorrt-rtx, tensorrt, openvino"),
        (
            ["--engine", "openvino", "--gpu", "sm89"],
            "expected --gpu only with tensorrt-rtx or tensorrt, found it",
        ),
        (["--precision", "int8"], "expected --precision fp32, that of "),
        (
            ["--engine", "openvino-bf16", "--precision", "bf16"],
            "expected --precision fp32, that of ",
        ),
    ],
)
def test_rejects_invalid_arguments(
    builder: FakeBuilder, tpx_build: Callable[..., Result], arguments: list[str], message: str
) -> None:
    result = tpx_build(*arguments)
    assert (result.exit_code, result.stdout, builder.built) == (2, "", [])
    assert result.stderr.startswith("error: expected ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_precision_of_the_bundle_may_be_named(
    builder: FakeBuilder, tpx_build: Callable[..., Result]
) -> None:
    assert tpx_build("--precision", "fp32").exit_code == 0
    assert builder.built


def test_onnxruntime_needs_no_build(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(main, [str(tiny_bundle), "--engine", "onnxruntime"])
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "notice: onnxruntime needs no build; it runs the bundle as it is\n"


def test_openvino_rejects_the_cache_option(tiny_bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, [str(tiny_bundle), "--engine", "openvino-bf16", "--cache", str(tmp_path / "cache")]
    )
    assert result.exit_code == 2
    assert "expected --cache only with tensorrt-rtx or tensorrt, found it with openvino-bf16" in result.stderr


def test_openvino_is_built_once_and_then_cached(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    first, again = (
        CliRunner().invoke(main, [str(bundle), "--engine", "openvino", "--batch", "2"]) for _ in range(2)
    )
    assert (first.exit_code, first.stdout) == (0, f"{tmp_path / 'tiny.engines' / 'openvino'}\n")
    rows = [line.split() for line in first.stderr.splitlines() if line.startswith("transformer depth 3")]
    assert [row[:4] for row in rows][-1] == ["transformer", "depth", "3", "x2"]
    assert "build" in first.stderr and "cache" not in first.stderr.split("from")[-1]
    assert again.exit_code == 0 and "build" not in again.stderr.split("from")[-1]


def test_requires_the_gpu_option_on_a_machine_without_a_gpu(builder: FakeBuilder, tiny_bundle: Path) -> None:
    result = CliRunner().invoke(main, [str(tiny_bundle)])
    assert result.exit_code == 2
    assert result.stderr == (
        "error: expected an NVIDIA GPU to build for, found none in this machine; "
        "choose one of sm75, sm80, sm86, sm89, sm120, sm121 with --gpu, or build for this CPU with --engine openvino or "
        "openvino-bf16\n"
    )


def test_chooses_the_local_gpu_unless_another_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(89, "NVIDIA L4", "580.65.06")
    monkeypatch.setattr(target, "local_gpu", lambda: gpu)
    assert choose_gpu(RTX, None) == choose_gpu(RTX, "sm89") == gpu
    assert choose_gpu(RTX, "sm86") == Gpu(86)
    monkeypatch.setattr(target, "local_gpu", lambda: Gpu(90, "NVIDIA H100", None))
    assert choose_gpu(RTX, "sm89") == Gpu(89)
    with pytest.raises(
        BadInput, match=r"expected a GPU of sm75.*, found NVIDIA H100 \(sm90\); choose another"
    ):
        choose_gpu(RTX, None)


LOCAL_GPU = Gpu(89, "NVIDIA L4", "580.65.06")


class TestFullTensorRt:
    """--engine tensorrt: for the GPU in the machine, with a timing cache and the plugin."""

    @pytest.fixture(autouse=True)
    def the_local_gpu_is_an_l4(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(target, "local_gpu", lambda: LOCAL_GPU)

    @pytest.fixture
    def tpx_build(self, tiny_bundle: Path, tmp_path: Path, builder: FakeBuilder) -> Callable[..., Result]:
        builder.version = "11.4.0.106"
        fixed = [str(tiny_bundle), "--cache", str(tmp_path / "cache"), "--engine", "tensorrt"]
        return lambda *arguments: CliRunner().invoke(main, [*fixed, *arguments])

    @pytest.fixture
    def plugin(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Makes the plugin usable, and returns the list of capabilities that it was registered for."""
        registered: list[int] = []
        monkeypatch.setattr(routed_lora_choice, "plugin_problem", lambda flavour, capability, bundle: None)
        monkeypatch.setattr(module, "register_once", registered.append)
        return registered

    def test_reuses_timing_caches_separately_with_and_without_the_plugin(
        self, builder: FakeBuilder, tpx_build: Callable[..., Result], plugin: list[int], tmp_path: Path
    ) -> None:
        assert engine_origins(tpx_build()) == ["build"] * len(GRAPHS)
        uses_plugin = [path.startswith("transformer/depth") for path in builder.built]
        earlier_builds = [uses_plugin[:number].count(uses_plugin[number]) for number in range(len(GRAPHS))]
        # Builds with and without the plugin have different timing caches.
        assert builder.timings == [b"+" * number for number in earlier_builds]
        suffixes = ("", f".{routed_lora_choice.plugin_hash()[:12]}")
        cache_files = [
            tmp_path / f"cache/tiny/tensorrt.11.4.0.106.sm89{suffix}.timings" for suffix in suffixes
        ]
        assert [len(path.read_bytes()) for path in cache_files] == [
            uses_plugin.count(False),
            uses_plugin.count(True),
        ]
        assert engine_origins(tpx_build()) == ["cache"] * len(GRAPHS)

    def test_only_transformers_contain_the_plugin(
        self, builder: FakeBuilder, tpx_build: Callable[..., Result], plugin: list[int]
    ) -> None:
        tpx_build()
        uses_plugin = [path.startswith("transformer/depth") for path in builder.built]
        assert builder.plugins == uses_plugin
        assert plugin == [89] * sum(uses_plugin)

    def test_a_changed_plugin_rebuilds_only_the_transformers(
        self,
        builder: FakeBuilder,
        tpx_build: Callable[..., Result],
        plugin: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tpx_build()
        monkeypatch.setattr(routed_lora_choice, "plugin_hash", lambda: "fedcba9876543210")
        result = tpx_build()
        rebuilt = [graph.startswith("transformer depth") for graph in GRAPHS]
        assert engine_origins(result) == ["build" if is_rebuilt else "cache" for is_rebuilt in rebuilt]
        assert result.stderr.count("expected plugin 'fedcba9876543210', found '") == sum(rebuilt)

    def test_prints_a_notice_when_it_builds_without_the_plugin(
        self,
        builder: FakeBuilder,
        tpx_build: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(routed_lora_choice, "bindings", lambda flavour: None)
        monkeypatch.setattr(routed_lora_choice, "find_spec", lambda name: None if name == "triton" else name)
        result = tpx_build()
        assert result.stderr.startswith(
            "notice: building without the routing plugin: expected the package triton, found none; install it with "
        )
        assert not any(builder.plugins)

    def test_a_high_rank_is_built_without_the_plugin(
        self,
        builder: FakeBuilder,
        tpx_build: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        kernel = pytest.importorskip("tpx_engines.routed_lora_kernel", reason="triton is not installed")
        monkeypatch.setattr(routed_lora_choice, "bindings", lambda flavour: None)
        monkeypatch.setattr(routed_lora_choice, "find_spec", lambda name: name)
        # The rank in the tiny bundle is 4.
        monkeypatch.setattr(kernel, "MAX_RANK", 3)
        result = tpx_build()
        assert engine_origins(result) == ["build"] * len(GRAPHS)
        notice = "notice: building without the routing plugin: expected adapters of rank 1 to 3, found 4\n"
        assert result.stderr.startswith(notice)
        assert not any(builder.plugins)

    @pytest.mark.parametrize("arguments", [["--gpu", "sm86"], ["--gpu", "x"]])
    def test_builds_only_for_the_local_gpu(
        self, builder: FakeBuilder, tpx_build: Callable[..., Result], arguments: list[str]
    ) -> None:
        result = tpx_build(*arguments)
        assert (result.exit_code, builder.built) == (2, [])
        assert result.stderr == (
            f"error: expected a GPU of '{arguments[1]}' in this machine, because engine tensorrt builds only for it, "
            "found NVIDIA L4 (sm89); build on the machine that will run it\n"
        )

    def test_requires_a_gpu(
        self, builder: FakeBuilder, tpx_build: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(target, "local_gpu", lambda: None)
        result = tpx_build()
        assert (result.exit_code, result.stderr) == (
            2,
            "error: expected an NVIDIA GPU in this machine, because engine tensorrt builds only for it, found none; "
            "build on the machine that will run it\n",
        )


def test_plugin_problem_gives_the_reason(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="expected the package triton, found none")
    bundle = Bundle.open(tiny_bundle)
    assert routed_lora_choice.plugin_problem(RTX, 89, bundle) == "TensorRT for RTX takes no plugins"
    monkeypatch.setattr(routed_lora_choice, "bindings", lambda flavour: None)
    monkeypatch.setattr(routed_lora_choice, "find_spec", lambda name: name)
    assert routed_lora_choice.plugin_problem(FULL, 89, bundle) is None
    assert "found sm75" in (routed_lora_choice.plugin_problem(FULL, 75, bundle) or "")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)
        assert (routed_lora_choice.plugin_problem(FULL, 89, bundle) or "").startswith(
            "expected the package onnx "
        )
    monkeypatch.setattr(routed_lora_choice, "find_spec", lambda name: None)
    assert (
        routed_lora_choice.plugin_problem(FULL, 89, bundle)
        == "expected TensorRT with its module plugin, found none"
    )


def test_the_plugin_hash_depends_on_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="expected the package triton, found none")
    first = routed_lora_choice.plugin_hash()
    assert first == routed_lora_choice.plugin_hash()
    for name in routed_lora_choice.SOURCES:
        text = Path(routed_lora_choice.__file__).with_name(name).read_bytes()
        (tmp_path / name).write_bytes(text + b"#" * (name == routed_lora_choice.SOURCES[-1]))
    monkeypatch.setattr(routed_lora_choice, "__file__", str(tmp_path / "x.py"))
    assert routed_lora_choice.plugin_hash() != first


def test_adapter_rank_is_read_from_the_graph(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert [adapter_rank(bundle.transformer(depth)) for depth in bundle.manifest.model.depths] == [4, 4, 4]
    assert adapter_rank(bundle.vae_decoder) == 0
    (tmp_path / "model.onnx").write_bytes(b"\xff damaged")
    with pytest.raises(EngineFailed, match=r"model\.onnx: expected an ONNX graph, found: "):
        adapter_rank(tmp_path / "model.onnx")


def test_refuses_to_build_without_enough_memory(
    builder: FakeBuilder, tpx_build: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: 200 << 20)
    result = tpx_build()
    assert (result.exit_code, builder.built, list(tmp_path.iterdir())) == (4, [], [])
    assert (
        "error: expected about 0.5 GB of free memory to build transformer depth 3 (0.0 GB of weights), "
        in (result.stderr)
    )
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    assert engine_origins(tpx_build()) == ["build"] * len(GRAPHS)
    monkeypatch.setattr(module, "available_bytes", lambda: 0)
    assert engine_origins(tpx_build()) == ["cache"] * len(GRAPHS)


def test_refuses_to_build_what_does_not_fit_on_the_disk(
    builder: FakeBuilder,
    tpx_build: Callable[..., Result],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = SimpleNamespace(
        total=1e12, free=sum(f.stat().st_size for f in tiny_bundle.glob("*/weights.data"))
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = tpx_build()
    assert (result.exit_code, builder.built, list(tmp_path.iterdir())) == (2, [], [])
    assert f"GB or more of free space for {tmp_path / 'cache/tiny'}, found 0.00 GB; " in result.stderr
    usage.free = 1e9
    assert engine_origins(tpx_build()) == ["build"] * len(GRAPHS)
    usage.free, builder.version = 0, "1.7.2.3"  # each engine makes room for the next version
    assert engine_origins(tpx_build()) == ["build"] * len(GRAPHS)


def test_graph_bytes_are_those_of_the_graph_and_its_weights_file(
    builder: FakeBuilder, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(tiny_bundle, verify=False)
    tasks = module.plan(bundle, EngineCache(tmp_path), (1, 2), Gpu(89), RTX)
    sizes = {path.name: path.stat().st_size for path in (tiny_bundle / "transformer").iterdir()}
    assert tasks[3].graph_bytes == sizes["depth-2.onnx"] + sizes["weights.data"]


def test_input_shapes_come_from_the_bundle(tiny_bundle: Path) -> None:
    shapes = {
        name: inputs for name, (_, inputs) in graphs_to_build(Bundle.open(tiny_bundle, verify=False)).items()
    }
    # Modulations of three blocks and the output, and two gates.
    conditions_width = 64 * (12 * 3 - 2) + 2 * 64
    denoise = {"latents": (None, 4, 8, 8), "conditions": (None, conditions_width), "context": (None, 12, 32)}
    assert shapes == {
        "text_encoder": {"ids": (None, 12)},
        "transformer conditions": {"timestep": (None,), "pooled": (None, 32)},
        **dict.fromkeys(TRANSFORMERS, denoise),
        "vae_decoder": {"latents": (None, 4, 8, 8)},
        "vae_encoder": {"image": (None, 3, 64, 64)},
    }


def test_every_text_encoder_is_a_graph_to_build(tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "three", THREE_ENCODERS)
    graphs = graphs_to_build(Bundle.open(root))
    assert [graphs[f"text_encoder{number}"] for number in ("", "_2", "_3")] == [
        (root / "text_encoder/model.onnx", {"ids": (None, 8)}),
        (root / "text_encoder_2/model.onnx", {"ids": (None, 8)}),
        (root / "text_encoder_3/model.onnx", {"ids": (None, 13)}),
    ]
    assert graphs["transformer depth 2"][1]["context"] == (None, 21, 16)
    assert graphs["transformer conditions"][1]["pooled"] == (None, 19)


def test_a_class_conditional_model_has_a_class_input(tmp_path: Path) -> None:
    graphs = graphs_to_build(Bundle.open(make_bundle(tmp_path / "classes", CLASSES)))
    transformers = ["transformer conditions", "transformer depth 1"]
    assert list(graphs) == [*transformers, "vae_decoder", "vae_encoder"]
    conditions, denoise = (graphs[name][1] for name in transformers)
    assert conditions == {"timestep": (None,), "class_id": (None,)}
    assert denoise == {"latents": (None, 4, 2, 3), "conditions": (None, 11)}


def test_a_bundle_without_an_image_encoder_has_no_encoder_to_build(tmp_path: Path) -> None:
    bundle = without_encoder(make_bundle(tmp_path / "paper"))
    assert "vae_encoder" not in graphs_to_build(bundle)
    assert "vae_decoder" in graphs_to_build(bundle)


def test_reports_missing_tensorrt_libraries(
    monkeypatch: pytest.MonkeyPatch, tpx_build: Callable[..., Result]
) -> None:
    monkeypatch.setattr(tensorrt_flavours, "find_spec", lambda name: None)
    bindings.cache_clear()
    result = tpx_build()
    bindings.cache_clear()
    assert result.exit_code == 4
    assert "found none; install it with `pip install 'tpx[tensorrt-rtx]'`" in result.stderr


def test_progress_never_decreases() -> None:
    progress, fractions = Progress(), [0.0]

    def step(name: str) -> None:
        assert progress.step(name)
        fractions.append(progress.fraction)

    progress.start("all", None, 2)
    progress.start("part", "all", 4)
    assert progress.phase == "part"
    for _ in range(4):
        step("part")
    progress.finish("part")
    assert progress.phase == "all"
    # One step more than announced.
    for _ in range(3):
        step("all")
    step("unknown")
    assert fractions == [0, 0.125, 0.25, 0.375, 0.5, 0.5, 1, 1, 1]
    progress._stop.set()
    assert not progress.step("all")


def test_progress_is_thread_safe() -> None:
    progress, errors = Progress(), []

    def report(thread: int) -> None:
        try:
            for number in range(2000):
                name = f"{thread} {number}"
                progress.start(name, None, 2)
                progress.step(name)
                progress.finish(name)
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=report, args=(thread,)) for thread in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert progress.fraction == 0.5


def test_cuda_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_to_start(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt = SimpleNamespace(Builder=fail_to_start, IProgressMonitor=object)
    logger = SimpleNamespace(take_message=lambda: "CUDA initialization failure with error: 35")
    monkeypatch.setattr(tensorrt, "bindings", lambda flavour: trt)
    monkeypatch.setattr(tensorrt, "get_logger", lambda flavour: logger)
    with pytest.raises(
        EngineFailed, match=r"^TensorRT cannot start its builder: CUDA initialization failure"
    ):
        tensorrt.build(FULL, Path("model.onnx"), {})


@pytest.fixture
def rtx_libraries() -> None:
    try:
        bindings(RTX)
    except EngineUnavailable as missing:
        pytest.skip(str(missing))


@pytest.mark.usefixtures("rtx_libraries")
def test_builds_the_tiny_bundle(tpx_build: Callable[..., Result], tiny_bundle: Path, tmp_path: Path) -> None:
    assert engine_origins(tpx_build("--batch", "1,4")) == ["build"] * len(GRAPHS)
    assert len(list((tmp_path / "cache/tiny").iterdir())) == len(GRAPHS)
    bundle, cache = Bundle.open(tiny_bundle), EngineCache(tmp_path / "cache/tiny")
    for task in module.plan(bundle, cache, (1, 4), Gpu(89), RTX):
        engine = cache.load(task.key)
        assert engine is not None
        assert len(engine) > task.graph_bytes / 4, task.key.graph


@pytest.mark.usefixtures("rtx_libraries")
def test_ctrl_c_cancels_a_real_build(
    tpx_build: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Progress.step

    def step_and_press(progress: Progress, name: str) -> bool:
        if not progress.cancelled:
            press_ctrl_c(progress)
        return step(progress, name)

    monkeypatch.setattr(Progress, "step", step_and_press)
    result = tpx_build()
    assert (result.exit_code, result.stdout) == (130, "")
    assert "error: cancelled; 0 of 7 engines are in " in result.stderr
    assert list((tmp_path / "cache/tiny").iterdir()) == []


@pytest.mark.usefixtures("rtx_libraries")
def test_the_monitor_reports_and_stops_a_build(tiny_bundle: Path) -> None:
    path, inputs = graphs_to_build(Bundle.open(tiny_bundle, verify=False))["text_encoder"]
    progress = Progress()
    assert tensorrt.build(RTX, path, inputs, progress=progress)
    assert progress.fraction > 0.5
    progress._stop.set()
    with pytest.raises(Cancelled, match=r"model\.onnx: cancelled, nothing was written"):
        tensorrt.build(RTX, path, inputs, progress=progress)
