"""tpx-bench: its arguments, table and plot, and that Ctrl-C leaves no process or file behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from runtime.fakes import CLASSES, FAKE, make_bundle

from tpx_engines.bench.cli import main
from tpx_engines.bench.configurations import Configuration
from tpx_engines.bench.request import CHECKPOINTS
from tpx_export import checkpoint
from tpx_export.checkpoint import SUFFIXES
from tpx_export.model.text_to_image import TextToImage

HERE = Path(__file__).parent
INTERRUPTED = """
import sys
import tpx_engines.bench.configurations as configurations
import tpx_engines.bench.measure as measure
from tpx_engines.bench.cli import main

def engines(names, depths, cache_intervals, precision, also=None):
    options = {"log": sys.argv[2], "step_s": 60.0}
    fast = configurations.Configuration("right", 2, "bench_factories:right", options)
    return [fast, configurations.Configuration("slow", 2, "bench_factories:slow", options)]

measure.PEAKS = ()
configurations.engines = engines
main([sys.argv[1], "--rounds", "1", "--batch", "1", "--prompt", "a cube", "--json", sys.argv[3]])
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "paper")


@pytest.fixture
def bench(
    bundle: Path, configuration: Callable[..., Configuration], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs tpx-bench on a bundle whose only engine is a factory of these tests."""
    monkeypatch.setattr(
        "tpx_engines.bench.configurations.engines",
        lambda names, depths, cache_intervals, precision, also=None: [configuration("right")],
    )

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(
            main, [str(bundle), "--rounds", "1", "--batch", "1", "--prompt", "a cube", *arguments]
        )

    return invoke


def test_prints_and_plots_a_table(bench: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = bench("--plot", str(tmp_path / "bench.png"))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# fake (fp32), 12x8 pixels\n")
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("| right | ")]
    # The fake bundle has no graph whose operations could be counted.
    assert "| same image | - |" in row
    with Image.open(tmp_path / "bench.png") as image:
        assert image.width > 500


def test_a_plot_that_does_not_fit_leaves_the_old_one(
    bench: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write = Path.write_bytes

    def write_half(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    (tmp_path / "bench.png").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", write_half)
    result = bench("--plot", str(tmp_path / "bench.png"))
    assert result.exit_code == 2 and "found: No space left on device; free some space or" in result.stderr
    assert (tmp_path / "bench.png").read_bytes() == b"old"
    assert not list(tmp_path.glob(".tpx-*"))


def test_rejects_a_plot_without_matplotlib_before_measuring(
    bench: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: Callable[[], list[int]],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = bench("--plot", str(tmp_path / "bench.png"))
    message = "error: expected matplotlib for --plot, found none; pip install 'tpx[bench]'\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)
    assert started() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1,x"], "expected --batch to be whole numbers in 1..256"),
        (["--batch", "0"], "expected --batch to be whole numbers in 1..256"),
        (["--depth", "3"], "expected a depth of 1, 2, 4"),
        (["--steps", "0"], "expected steps to be a whole number"),
        (["--prompt", "a zebra"], "zebra"),
        (["--baseline", "PyTorch eager fp32"], "expected --ckpt with --baseline"),
        (["--ckpt", "nowhere.safetensors"], "expected a checkpoint in --ckpt, found no file"),
        (["--ckpt", __file__], "ending in .safetensors or .pt in --ckpt, found test_cli.py"),
        (["--plot", "image.jpg"], "expected an output name that ends in .png"),
        (["--json", "nowhere/at/all.json"], "expected to write nowhere/at/all.json"),
        (["--json", "n" * 300], "found: File name too long"),
        (["--ckpt", "n" * 300 + ".pt"], "found: File name too long"),
    ],
)
def test_invalid_arguments_give_a_one_line_error_before_measuring(
    bench: Callable[..., Result], arguments: list[str], message: str, started: Callable[[], list[int]]
) -> None:
    result = bench(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert started() == []


@pytest.mark.parametrize("name", ["TPX_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_rejects_a_limit_on_the_number_of_threads(
    bench: Callable[..., Result], started: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    result = bench()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: expected no limit on the number of threads, which not all engines would keep, found {name} set; unset it\n"
    )
    assert started() == []


def test_results_of_other_variables_are_not_continued(
    bench: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "bench.json")
    assert bench("--json", path).exit_code == 0
    monkeypatch.setenv("TPX_DEVICE_LOOP", "0")
    result = bench("--json", path)
    assert result.exit_code == 2 and "(no TPX_DEVICE_LOOP), found TPX_DEVICE_LOOP 0; use" in result.stderr
    monkeypatch.setenv("TPX_DEVICE_LOOP", "maybe")
    assert "expected TPX_DEVICE_LOOP to be 0 or 1" in bench().stderr


def test_rejects_the_checkpoint_of_another_model_before_measuring(
    bench: Callable[..., Result], tiny_model: TextToImage, tmp_path: Path, started: Callable[[], list[int]]
) -> None:
    checkpoint.save(tiny_model, tmp_path / "tiny.safetensors")
    result = bench("--ckpt", str(tmp_path / "tiny.safetensors"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: expected in --ckpt the checkpoint of bundle fake (name 'fake'), found {tmp_path / 'tiny.safetensors'} "
        "with name 'tiny'; pass the checkpoint that the bundle was exported from\n"
    )
    assert started() == []


def test_rejects_a_checkpoint_without_pytorch_before_measuring(
    bench: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: Callable[[], list[int]],
) -> None:
    (tmp_path / "model.pt").touch()
    monkeypatch.setitem(sys.modules, "tpx_engines.bench.baselines", None)
    result = bench("--ckpt", str(tmp_path / "model.pt"))
    assert (result.exit_code, result.stdout, started()) == (4, "", [])
    assert result.stderr.startswith("error: expected PyTorch for --ckpt, found none; ")


def test_checkpoint_suffixes_are_those_of_the_exporter() -> None:
    assert CHECKPOINTS == SUFFIXES


def test_rejects_an_unknown_engine_or_baseline(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    for option, name in (("--engine", "warp"), ("--baseline", "warp")):
        ckpt = ["--ckpt", str(tmp_path / "model.pt")] if option == "--baseline" else []
        result = CliRunner().invoke(main, [str(bundle), "--prompt", "a cube", option, name, *ckpt])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: expected a{'n' * (option == '--engine')} {option[2:]} of ")


def test_fails_with_the_reasons_if_no_configuration_runs(
    bench: Callable[..., Result], configuration: Callable[..., Configuration], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = configuration("right", problem="expected a GPU, found none")
    monkeypatch.setattr(
        "tpx_engines.bench.configurations.engines",
        lambda names, depths, cache_intervals, precision, also=None: [failing],
    )
    result = bench()
    assert result.exit_code == 4
    assert "- right: expected a GPU, found none" in result.stdout
    assert "error: expected at least one of 1 configurations to run here" in result.stderr


def test_a_class_conditional_bundle_is_measured_with_class_0(
    tmp_path: Path, bench: Callable[..., Result]
) -> None:
    classes = make_bundle(tmp_path / "classes", CLASSES)
    result = CliRunner().invoke(main, [str(classes), "--rounds", "1", "--batch", "1"])
    assert result.exit_code == 0, result.output
    assert "class 0, seed 0, 20 steps of ddim" in result.stdout


def test_also_measures_a_bundle_of_another_precision(
    bundle: Path, tmp_path: Path, configuration: Callable[..., Configuration], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Path | None]] = []

    def engines(
        names: object, depths: object, cache_intervals: object, precision: str, also: Path | None = None
    ) -> list[Configuration]:
        calls.append((precision, also))
        return [configuration("wrong" if also else "right")]

    monkeypatch.setattr("tpx_engines.bench.configurations.engines", engines)
    half = make_bundle(tmp_path / "half", replace(FAKE, precision="fp16"))
    arguments = [str(bundle), "--rounds", "1", "--batch", "1", "--prompt", "a cube"]
    result = CliRunner().invoke(main, [*arguments, "--also", str(half)])
    assert result.exit_code == 0, result.output
    assert calls == [("fp32", None), ("fp16", half.resolve())]
    assert "| right | " in result.stdout and "| wrong | " in result.stdout
    second_copy = shutil.copytree(half, tmp_path / "again")
    result = CliRunner().invoke(main, [*arguments, "--also", str(half), "--also", str(second_copy)])
    assert result.exit_code == 2
    assert "expected --also of different precisions, found fp16 twice; measure one of them" in result.stderr
    result = CliRunner().invoke(main, [*arguments, "--also", str(bundle)])
    assert result.exit_code == 2
    assert "in another precision than fp32 with depth 2, found fake in fp32" in result.stderr


def test_ctrl_c_leaves_no_process_and_no_file_behind(
    bundle: Path, tmp_path: Path, started: Callable[[], list[int]], how: signal.Signals
) -> None:
    (tmp_path / "scratch").mkdir()
    paths = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(bundle), str(tmp_path / "log"), str(tmp_path / "bench.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(tmp_path / "scratch")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(started()) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = started()
    assert len(workers) == 2 and all(map(is_alive, workers))
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith(
        f"error: cancelled; run the same command to continue from {tmp_path / 'bench.json'}\n"
    )
    assert not any(map(is_alive, workers))
    assert list((tmp_path / "scratch").iterdir()) == []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
