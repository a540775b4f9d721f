"""Engines fuse the norms and attention that they recognise in a transformer's graph into one kernel each."""

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from tpx_export.exporter import Summary
from tpx_export.model.attention import RMSNorm
from tpx_export.model.text_to_image import TextToImage
from tpx_runtime.bundle import Bundle

DEPTH = 3


@pytest.fixture(scope="module")
def graph(tiny_bundle: Path) -> Path:
    return Bundle.open(tiny_bundle, verify=False).transformer(DEPTH, "plain")


@pytest.fixture(scope="module")
def fused_graph(half_export: tuple[Path, Summary]) -> Path:
    return Bundle.open(half_export[0], verify=False).transformer(DEPTH, "fused")


def count_qk_norms(model: TextToImage) -> int:
    """Number of query and key norms: all calls but that of the last block's text queries, which nothing reads."""
    calls: list[int] = []
    spec, batch = model.transformer.spec, 1
    hooks = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for module in model.transformer.modules()
        if isinstance(module, RMSNorm)
    ]
    with torch.no_grad():
        model.transformer(
            torch.zeros(batch, spec.latent_channels, *spec.latent_size),
            torch.zeros(batch),
            torch.zeros(batch, spec.context_tokens, spec.context_width),
            torch.zeros(batch, spec.pooled_width),
            DEPTH,
        )
    for hook in hooks:
        hook.remove()
    return len(calls) - 1


@pytest.mark.parametrize("fixture", ["graph", "fused_graph"])
def test_onnx_runtime_fuses_every_norm(
    tiny_model: TextToImage, fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    graph = request.getfixturevalue(fixture)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    model = onnx.load(options.optimized_model_filepath, load_external_data=False)
    op_counts = Counter(node.op_type for node in model.graph.node)
    assert op_counts["SimplifiedLayerNormalization"] == count_qk_norms(tiny_model)


def test_openvino_fuses_attention_and_every_norm(tiny_model: TextToImage, graph: Path) -> None:
    import needs_openvino  # noqa: F401

    from tpx_runtime.engine.openvino import core
    from tpx_runtime.engine.openvino_static import compile_static, model_shapes

    shapes = model_shapes(core(), graph, rows=2)
    compiled = compile_static(core(), graph, {"INFERENCE_PRECISION_HINT": "f32"}, shapes, parts=1)
    op_counts = Counter(
        node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()
    )
    assert op_counts["RMS"] == count_qk_norms(tiny_model)
    assert not op_counts["Softmax"] and not op_counts["MatMul"]
