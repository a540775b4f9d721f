"""Baselines generate the same image as the bundle, with the same model, sampler and noise in another framework."""

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from runtime.fakes import FAKE
from tiny import make_tiny, make_tiny_classes

from tpx_engines.bench import baselines, compiled, configurations, naive, peak
from tpx_engines.bench.baselines import eager_runner, require_fits
from tpx_engines.bench.configurations import engines
from tpx_engines.bench.flops import graph_flops
from tpx_engines.bench.peak import gemm
from tpx_engines.bench.process import MeasurementFailed
from tpx_engines.bench.runner import Runner, Workload, engine_runner
from tpx_export import checkpoint
from tpx_export.model import ThinkingSpec
from tpx_export.model.text_to_image import TextToImage
from tpx_export.pipeline import Pipeline
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.similarity import psnr_db
from tpx_runtime.guidance import GuidedPrediction
from tpx_runtime.sampling import Array


@pytest.fixture(scope="module")
def workload(
    tiny_bundle: Path, tiny_model: TextToImage, tmp_path_factory: pytest.TempPathFactory
) -> Workload:
    ckpt = tmp_path_factory.mktemp("ckpt") / "tiny.safetensors"
    checkpoint.save(tiny_model, ckpt)
    return Workload(
        tiny_bundle, 3, "a red cube", None, seed=5, steps=3, guidance=2.0, sampler="euler", ckpt=ckpt
    )


def test_require_fits_accepts_only_the_checkpoint_of_the_bundles_model(
    tiny_model: TextToImage, tmp_path: Path
) -> None:
    checkpoint.save(tiny_model, ckpt := tmp_path / "tiny.safetensors")
    pipeline = Pipeline.from_model(tiny_model)
    text_encoders, defaults = (pipeline.text[0].spec,), replace(pipeline.defaults, depth=1)
    manifest = replace(
        FAKE,
        name="tiny",
        model=pipeline.model,
        text_encoders=text_encoders,
        latent=pipeline.latent,
        defaults=defaults,
    )
    require_fits(ckpt, manifest)
    require_fits(ckpt, replace(manifest, model=replace(pipeline.model, depths=(1, 2))))
    others = {
        r"name 'tiny'\), found .* with name 'tiny-classes'": make_tiny_classes(3),
        r"experts 3\), found .* with experts 5": make_tiny(ThinkingSpec((0, 2), 5, 4, 3)),
        r"thinking_blocks \(0, 2\)\), found .* with thinking_blocks \(1, 2\)": make_tiny(
            ThinkingSpec((1, 2), 3, 4, 3)
        ),
        r"depths \(1, 2, 3\)\), found .* with depths \(1, 2\)": make_tiny(ThinkingSpec((0, 2), 3, 4, 2)),
    }
    for message, model in others.items():
        checkpoint.save(model, tmp_path / "other.safetensors")
        with pytest.raises(BadInput, match=message):
            require_fits(tmp_path / "other.safetensors", manifest)


def similarity(a: Runner, b: Runner, images: int = 2) -> float:
    """The lowest PSNR of the images."""
    (first, _), (second, _) = a.draw(images), b.draw(images)
    return min(psnr_db(*pair) for pair in zip(first, second, strict=True))


def test_eager_pytorch_generates_the_bundles_image(workload: Workload) -> None:
    bundle = engine_runner(workload, {"engine": "onnxruntime"})
    (measured,) = configurations.baselines([configurations.REFERENCE], [workload.depth])
    eager = eager_runner(workload, measured.options)
    same_db = similarity(bundle, eager)
    assert same_db > 55
    bf16 = eager_runner(workload, {"name": "eager", "precision": "bf16", "device": "cpu"})
    # Another precision changes the image, but not its content.
    assert 15 < similarity(eager, bf16) < same_db
    other_seed = eager_runner(
        replace(workload, seed=6), {"name": "eager", "precision": "fp32", "device": "cpu"}
    )
    assert similarity(eager, other_seed) < 30


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_eager_pytorch_matches_the_bundle_with_and_without_guidance(
    workload: Workload, guidance: float
) -> None:
    guided = replace(workload, guidance=guidance)
    assert (
        similarity(
            engine_runner(guided, {"engine": "onnxruntime"}),
            eager_runner(guided, {"name": "", "precision": "fp32", "device": "cpu"}),
            1,
        )
        > 55
    )


def test_the_naive_export_generates_the_bundles_image(workload: Workload, tmp_path: Path) -> None:
    naive.export(str(workload.ckpt), [3], str(tmp_path))
    exported = replace(workload, export_folder=tmp_path)
    bundle = engine_runner(workload, {"engine": "onnxruntime"})
    for framework in ("onnxruntime", "openvino"):
        options = {"name": "naive", "framework": framework, "precision": "fp32"}
        assert similarity(bundle, naive.naive_runner(exported, options)) > 55
    assert graph_flops(tmp_path / "transformer-depth-3.onnx", 2) > 0


def test_a_cpu_without_bf16_is_named(
    workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    monkeypatch.setattr("tpx_runtime.engine.openvino.core", lambda: cpu)
    options = {"name": "naive", "framework": "openvino", "precision": "bf16"}
    with pytest.raises(
        MeasurementFailed, match="expected a CPU with bf16 for OpenVINO, found FP32, INT8; leave it"
    ):
        naive.naive_runner(replace(workload, export_folder=tmp_path), options)


def test_compiling_chooses_the_fastest_setting(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    call_seconds = {"default": 2.0, "freezing": 1.0, "freezing + max-autotune": 3.0}
    tried: list[Any] = []
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def compile_(module: torch.nn.Module, dynamic: bool, options: dict[str, Any]) -> Callable[..., Any]:
        (name,) = (name for name, chosen in compiled.SETTINGS["cpu"].items() if chosen == options)
        tried.append(name)

        def run(*inputs: Any) -> Any:
            clock.now += call_seconds[name]
            return module(*inputs)

        return run

    monkeypatch.setattr(compiled, "time", clock)
    monkeypatch.setattr(torch, "compile", compile_)
    runner = compiled.compiled_runner(workload, {"name": "compiled", "precision": "fp32", "device": "cpu"})
    assert runner.notes["setting"] == "freezing"
    # The last is the decoder.
    assert tried == [*compiled.SETTINGS["cpu"], "freezing"]
    assert runner.notes["tried"] == {name: 1e3 * seconds for name, seconds in call_seconds.items()}
    # The first calls of the transformer and of the decoder.
    assert runner.notes["compile_s"] == 2.0
    assert (
        similarity(runner, eager_runner(workload, {"name": "eager", "precision": "fp32", "device": "cpu"}), 1)
        == np.inf
    )
    tried.clear()
    compiled.compiled_runner(
        replace(workload, compile_setting="default"),
        {"name": "compiled", "precision": "fp32", "device": "cpu"},
    )
    assert tried == ["default", "default"]


@pytest.fixture
def kernel_imports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Baselines on "gpu" run on the CPU, with the operator's plain implementation; the kernels that they import."""
    imported: list[str] = []
    monkeypatch.setitem(baselines.TORCH_DEVICES, "gpu", "cpu")
    monkeypatch.setattr(baselines, "importlib", SimpleNamespace(import_module=imported.append))
    return imported


def test_baselines_on_a_gpu_use_the_kernel_and_float16(workload: Workload, kernel_imports: list[str]) -> None:
    on_cpu = eager_runner(workload, {"name": "eager", "precision": "fp32", "device": "cpu"})
    assert kernel_imports == []
    half = eager_runner(workload, {"name": "eager", "precision": "fp16", "device": "gpu"})
    assert kernel_imports == ["tpx_engines.routed_lora_triton"]
    assert 30 < similarity(on_cpu, half) < np.inf


def test_baselines_on_a_gpu_are_compiled_with_cuda_graphs(
    workload: Workload, kernel_imports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[dict[str, Any]] = []

    def compile_(module: torch.nn.Module, dynamic: bool, options: dict[str, Any]) -> torch.nn.Module:
        tried.append(options)
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    compiled.compiled_runner(
        replace(workload, compile_setting="CUDA graphs"),
        {"name": "compiled", "precision": "fp16", "device": "gpu"},
    )
    assert tried == [{"triton.cudagraphs": True}] * 2
    assert kernel_imports == ["tpx_engines.routed_lora_triton"]


def test_only_arrays_that_are_new_are_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[npt.NDArray[Any]] = []
    from_numpy = torch.from_numpy

    def recording(array: npt.NDArray[Any]) -> torch.Tensor:
        uploaded.append(array)
        return from_numpy(array)

    monkeypatch.setattr(torch, "from_numpy", recording)
    run = baselines.network(lambda x, y: (x + y, x > y), "cpu")
    x, y = np.full(2, 3, np.float16), np.full(2, 4, np.float16)
    run(x, y)
    total, greater = run(y, y)
    assert [array is x for array in uploaded] == [True, False, False]
    assert total.dtype == np.float32 and (total == 8).all() and not greater.any()


def test_baselines_in_bf16_say_that_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported in (True, False):
        oneDNN = SimpleNamespace(_is_mkldnn_bf16_supported=lambda answer=supported: answer)
        monkeypatch.setattr(torch.ops, "mkldnn", oneDNN)
        problems = {one.name: one.problem for one in configurations.baselines([], [1]) if one.device == "cpu"}
        slow = {name for name, problem in problems.items() if problem and "bf16" in problem}
        assert slow == (set() if supported else {"PyTorch eager bf16", "torch.compile bf16"})


def test_baselines_on_a_gpu_say_why_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "_multiplies_bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = configurations.baselines([], [1])
    problems = {one.name: one.problem for one in chosen}
    assert {one.options["device"] for one in chosen if one.problem} == {"gpu"}
    on_gpu = {name for name in problems if name.endswith(", GPU")}
    assert len(on_gpu) == 3
    for name, problem in problems.items():
        assert (problem is not None) == (name in on_gpu), name
    assert str(problems[configurations.GPU_REFERENCE]).startswith(
        f"expected a GPU and PyTorch for CUDA, found PyTorch {torch.__version__} without one; "
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert {one.problem for one in configurations.baselines([], [1])} == {None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="expected a GPU and PyTorch for CUDA, found none")
def test_eager_pytorch_on_a_gpu_generates_the_bundles_image(workload: Workload) -> None:
    bundle = engine_runner(workload, {"engine": "onnxruntime"})
    options = {"name": "eager", "precision": "fp32", "device": "gpu"}
    assert similarity(bundle, eager_runner(workload, options)) > 55


def test_the_peak_is_measured_in_the_requested_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpx_engines.bench.peak.SIDE", 256)
    single, half = gemm("fp32"), gemm("bf16")
    assert single["flops"] > 1e8 and half["flops"] > 1e7
    assert half["by"].startswith("PyTorch ")
    monkeypatch.setitem(sys.modules, "torch", None)
    by_openvino = peak._openvino("fp32")
    assert by_openvino is not None and by_openvino[0] > 1e8
    assert gemm("fp32")["by"].startswith(("numpy ", "OpenVINO "))
    monkeypatch.setattr(peak, "_openvino", lambda precision: None)
    assert gemm("fp32")["by"].startswith("numpy ")
    assert gemm("bf16") == {"flops": 0.0, "by": ""}


def test_psnr_matches_its_definition() -> None:
    from PIL import Image

    grey: Sequence[Image.Image] = [Image.new("RGB", (4, 4), (level,) * 3) for level in (100, 110)]
    assert psnr_db(grey[0], grey[0]) == np.inf
    assert psnr_db(*grey) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr_db(grey[0], Image.new("RGB", (5, 4))) == 0


def test_configurations_of_another_bundle_have_its_precision_and_path(
    workload: Workload, tmp_path: Path
) -> None:
    (own,), (other,) = (
        engines(["openvino"], [2], [1], "fp32"),
        engines(["openvino"], [2], [1], "int8", tmp_path),
    )
    assert (own.name, own.precision, own.options) == (
        "TPX, openvino",
        "fp32",
        {"engine": "openvino", "cache_interval": 1},
    )
    assert (other.name, other.precision) == ("TPX int8, openvino", "int8")
    assert other.options == {"engine": "openvino", "cache_interval": 1, "bundle": str(tmp_path)}
    options = {"engine": "onnxruntime", "cache_interval": 1}
    (image,), _ = engine_runner(workload, options).draw(1)
    shutil.copytree(workload.bundle, moved := tmp_path / "moved")
    runner = engine_runner(replace(workload, bundle=tmp_path), {**options, "bundle": str(moved)})
    assert runner.draw(1)[0][0].tobytes() == image.tobytes()


def test_every_cache_interval_is_a_separate_configuration(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, cached = engines(["onnxruntime"], [2], [1, 2], "fp32")
    assert (full.name, cached.name) == ("TPX, onnxruntime", "TPX, onnxruntime, cache interval 2")
    assert cached.cache_interval == 2
    for measured, expected_calls in ((full, 5), (cached, 3)):
        runner = engine_runner(replace(workload, steps=5), measured.options)
        assert model_calls(runner, monkeypatch) == expected_calls


def model_calls(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the runner calls the model for one image."""
    timesteps: list[float] = []
    predict = GuidedPrediction.__call__

    def record(self: GuidedPrediction, latents: Array, timestep: float) -> Array:
        timesteps.append(timestep)
        return predict(self, latents, timestep)

    monkeypatch.setattr(GuidedPrediction, "__call__", record)
    runner.draw(1)
    monkeypatch.undo()
    return len(timesteps)


def test_configurations_name_the_installed_distribution_packages() -> None:
    packages = {
        configuration.options["engine"]: configuration.packages
        for configuration in engines([], [1], [1], "fp32")
    }
    assert packages["onnxruntime"] == ("tpx", "onnxruntime")
    assert packages["onnxruntime-cuda"] == ("tpx", "onnxruntime-gpu")


def test_every_timed_image_computes_its_own_conditions(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditions are not reused from the previous image, because a baseline computes them at every step."""
    runner = engine_runner(
        Workload(
            bundle=tiny_bundle,
            depth=1,
            prompt="a red cube",
            class_id=None,
            seed=0,
            steps=2,
            guidance=3.0,
            sampler="euler",
        ),
        {"engine": "onnxruntime"},
    )
    opened: list[Path] = []
    open_graph = runner.generator.denoiser._graphs.open

    def recording_open(path: Path) -> Any:
        opened.append(path)
        return open_graph(path)

    monkeypatch.setattr(runner.generator.denoiser._graphs, "open", recording_open)
    for _ in range(3):
        runner.draw(1)
    assert [path.name for path in opened].count("conditions.onnx") == 3
