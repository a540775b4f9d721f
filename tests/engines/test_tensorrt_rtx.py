"""TensorRT for RTX parses and builds every graph of a bundle, which needs no GPU."""

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from bundle_graphs import graphs_to_build

from tpx_engines import tensorrt
from tpx_engines.tensorrt import TimingCache
from tpx_export import checkpoint
from tpx_export.exporter import export_bundle
from tpx_export.pipeline import Pipeline
from tpx_export.routing import MAX_MASKED_WORK, routing_variants
from tpx_runtime.bundle import Bundle, transformer_name
from tpx_runtime.engine.tensorrt_flavours import RTX, bindings, get_logger
from tpx_runtime.errors import BadInput, EngineFailed, EngineUnavailable

SAMPLE = Path(__file__).parents[2] / "samples" / "shapes" / "shapes.safetensors"

try:
    bindings(RTX)
except EngineUnavailable as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    exports = {"fp32": "tiny_export", "fp16": "half_export", "int8": "int8_export"}
    return Bundle.open(request.getfixturevalue(exports[request.param])[0])


@pytest.mark.parametrize("capability", [86, 89, 120])
def test_builds_every_graph_at_every_depth(bundle: Bundle, capability: int) -> None:
    graphs = graphs_to_build(bundle)
    assert len(graphs) == 4 + len(bundle.manifest.model.depths)
    for name, (path, inputs) in graphs.items():
        engine = tensorrt.build(RTX, path, inputs, capability=capability)
        assert len(engine) > 10_000, name


@pytest.fixture(scope="session")
def sample_in_fp16(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The sample model's bundle, which takes half a minute to export."""
    if not SAMPLE.exists():
        pytest.skip(
            f"expected the sample's weights at {SAMPLE}, found none: a source distribution is without"
        )
    out = tmp_path_factory.mktemp("sample") / "shapes"
    export_bundle(Pipeline.from_model(checkpoint.load(SAMPLE)), out, precision="fp16")
    return Bundle.open(out)


@pytest.mark.slow
def test_builds_every_graph_of_the_sample_in_fp16(sample_in_fp16: Bundle) -> None:
    """Unlike the tiny bundle, it is large enough that the builder chooses between kernels."""
    graphs = graphs_to_build(sample_in_fp16)
    transformer_names = [f"transformer depth {depth}" for depth in (1, 2, 3)]
    assert list(graphs) == [
        "text_encoder",
        "transformer conditions",
        *transformer_names,
        "vae_decoder",
        "vae_encoder",
    ]
    sizes = {
        name: len(tensorrt.build(RTX, path, inputs, (1, 4), capability=89))
        for name, (path, inputs) in graphs.items()
    }
    weights = (sample_in_fp16.root / "transformer" / "weights.data").stat().st_size
    assert all(size > 10_000 for size in sizes.values())
    assert all(sizes[name] < 1.5 * weights for name in transformer_names), (
        "weights are no longer in half precision"
    )


def test_float32_graphs_are_built_without_tf32(tiny_bundle: Path) -> None:
    """TF32, TensorRT's default, would reduce float32 mantissas to ten bits; the engine's metadata excludes it."""
    path, inputs = graphs_to_build(Bundle.open(tiny_bundle))["text_encoder"]
    assert re.findall(rb"tf32=\d", tensorrt.build(RTX, path, inputs)) == [b"tf32=0"]


def test_rtx_libraries_are_not_loaded_globally() -> None:
    """Both flavours' libraries export the same names, so none may be loaded globally."""
    code = """
import ctypes
from tpx_runtime.engine.tensorrt_flavours import RTX, bindings
bindings(RTX)
print(hasattr(ctypes.CDLL(None), "getPluginRegistry"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


@pytest.mark.parametrize("capability", RTX.capabilities or ())
def test_builds_for_every_capability_but_sm75(tiny_bundle: Path, capability: int) -> None:
    path, inputs = graphs_to_build(Bundle.open(tiny_bundle))["text_encoder"]
    if capability == 75:
        with pytest.raises(EngineFailed, match=r"cannot build it: .*SM75.*FP32 GEMM is not supported"):
            tensorrt.build(RTX, path, inputs, capability=capability)
    else:
        assert tensorrt.build(RTX, path, inputs, capability=capability)


def test_rejects_the_routing_variant_for_large_models_on_cpus(tiny_bundle: Path, tmp_path: Path) -> None:
    _, inputs = graphs_to_build(Bundle.open(tiny_bundle))["transformer depth 1"]
    model = onnx.load(tiny_bundle / transformer_name(1))
    model.functions.clear()
    _, plain = routing_variants(model, visual_tokens=MAX_MASKED_WORK)
    path = tmp_path / "depth-1.plain.onnx"
    onnx.save(plain, path)
    with pytest.raises(
        EngineFailed, match=r"depth-1\.plain\.onnx: TensorRT for RTX cannot read it: .*NonZero"
    ):
        tensorrt.build(RTX, path, inputs)


def test_rejects_a_graph_whose_routing_function_is_missing(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    _, inputs = graphs_to_build(bundle)["transformer depth 1"]
    model = onnx.load(tiny_bundle / transformer_name(1))
    model.functions.clear()
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(EngineFailed, match="Plugin not found"):
        tensorrt.build(RTX, path, inputs)


def test_rejects_an_unknown_compute_capability(tiny_bundle: Path) -> None:
    with pytest.raises(BadInput, match="expected a compute capability of 75, 80, 86, 89, 120, 121, found 90"):
        tensorrt.build(RTX, tiny_bundle / "x.onnx", {}, capability=90)


def test_a_graph_passed_as_bytes_finds_its_weights(tiny_bundle: Path) -> None:
    """Before TensorRT 10.15 the graph is passed as bytes without its function, and the path locates the weights."""
    graphs = graphs_to_build(Bundle.open(tiny_bundle))
    path, inputs = graphs["text_encoder"]
    assert len(tensorrt.build(RTX, path, inputs, plugin=True)) > 10_000
    path, inputs = graphs["transformer depth 1"]
    # RTX has no plugins.
    with pytest.raises(EngineFailed, match="Plugin not found"):
        tensorrt.build(RTX, path, inputs, plugin=True)


@pytest.mark.parametrize("data", [b"", b"damaged" * 100])
def test_an_empty_or_damaged_timing_cache_does_not_fail(data: bytes) -> None:
    """RTX has the functions of a timing cache, although they have no effect."""
    config = bindings(RTX).Builder(get_logger(RTX)).create_builder_config()
    tensorrt._set_timing_cache_full(config, TimingCache(data))
    assert config.get_timing_cache() is not None
