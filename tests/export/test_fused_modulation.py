"""Modulated norms as one node: which graphs have them, that they compute the same, and what is left as it is."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from graph_outputs import check_same_outputs
from onnx import numpy_helper, parser

from tpx_export.exporter import Summary
from tpx_export.fusion.lookup import attributes
from tpx_export.fusion.modulation import NAME, fuse_modulation
from tpx_export.model import attention, mmdit, transformer
from tpx_export.model.text_to_image import TextToImage
from tpx_runtime.bundle import Bundle
from tpx_runtime.verify import load_golden

DEPTH = 3


def op_counts(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def modulated_norms(model: onnx.ModelProto) -> int:
    return sum(node.op_type == NAME and len(node.input) == 3 for node in model.graph.node)


def count_modulations(
    model: TextToImage, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> int:
    """The number of modulated norms in one call of the transformer in PyTorch."""
    calls: list[int] = []
    modulate = attention.modulate

    def counting_modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return modulate(x, shift, scale)

    for module in (attention, mmdit, transformer):
        monkeypatch.setattr(module, "modulate", counting_modulate)
    inputs = [torch.from_numpy(golden[name]) for name in ("latents", "timestep", "context", "pooled")]
    with torch.no_grad():
        model.transformer(*inputs, DEPTH)
    return len(calls)


def test_every_modulated_norm_of_the_fused_variant_is_one_node(
    half_export: tuple[Path, Summary], tiny_model: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(half_export[0])
    standard, fused = (
        onnx.load(bundle.transformer(DEPTH, variant), load_external_data=False)
        for variant in ("operator", "fused")
    )
    expected = count_modulations(tiny_model, load_golden(bundle), monkeypatch)
    assert modulated_norms(standard) == 0
    assert modulated_norms(fused) == expected > 0
    assert op_counts(fused)[NAME] == op_counts(standard)[NAME]


def test_it_computes_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    path = bundle.transformer(DEPTH)
    model = onnx.load(path, load_external_data=False)
    fuse_modulation(model, path.parent)
    assert modulated_norms(model)
    check_same_outputs(bundle, DEPTH, model)


def small_model(
    weight: float | tuple[float, ...] = 1,
    expanded: bool = False,
    x: str = "b, n, 4",
    scale: str = "b, 1, 4",
    axis: int = -1,
    order: str = "h, s",
) -> onnx.ModelProto:
    """A norm of x with that constant weight, times s, plus t; `order` is that of the product's factors."""
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 20]> g (float[{x}] x, float[{scale}] scale, float[{scale}] shift) '
        f"=> (float[{x}] y) <float[{x}] h, float[{scale}] s, float[{scale}] t> {{ "
        f"{'w = Expand(one, size) ' if expanded else ''} s = Identity(scale) t = Identity(shift) "
        f"h = LayerNormalization<axis = {axis}, epsilon = 0.25>(x, {'w' if expanded else 'weight'}) "
        f"m = Mul({order}) y = Add(m, t) }}"
    )
    constants = {"weight": np.full(4, weight, np.float32)}
    if expanded:
        constants = {"one": np.float32(weight), "size": np.array([4])}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()
    )
    return model


@pytest.mark.parametrize("expanded", [False, True])
def test_fuses_norms_whose_weights_are_one(expanded: bool, tmp_path: Path) -> None:
    model = small_model(expanded=expanded)
    fuse_modulation(model, tmp_path)
    assert op_counts(model) == {"Identity": 2, NAME: 1}
    fused = model.graph.node[-1]
    assert list(fused.input) == ["x", "s", "t"]
    assert attributes(fused) == {"axis": -1, "epsilon": 0.25}


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": 2},
        {"weight": (1, 2, 1, 1)},
        {"weight": 2, "expanded": True},
        {"scale": "b, n, 4"},
        {"order": "s, h", "x": "b, 1, 4"},
        {"axis": 1},
        {"x": "n, 4", "scale": "1, 4"},
    ],
)
def test_other_norms_stay_as_they_are(changes: dict[str, object], tmp_path: Path) -> None:
    model = small_model(**changes)  # type: ignore[arg-type]
    nodes = list(model.graph.node)
    fuse_modulation(model, tmp_path)
    assert list(model.graph.node) == nodes
