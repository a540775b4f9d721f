"""The plugin in TensorRT's own Python code, without its libraries: the bindings are loaded with stubs of 9 C symbols.

The registry, the dimensions and the expression builder, which the stubs lack, are small fakes. All code of
`tensorrt.plugin` that checks and calls the plugin is NVIDIA's. No kernel is launched.
"""

import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from surface import load_beside_stubs

from tpx_runtime.errors import BadInput, EngineUnavailable

if find_spec("triton") is None:
    pytest.skip("expected the package triton, found none; pip install triton", allow_module_level=True)

DISTRIBUTION = "tensorrt-cu13-bindings"
TOKENS = {"batch": 2, "tokens": 77}  # values of the dynamic dimensions
SHAPES: tuple[tuple[Any, ...], ...] = (("batch", "tokens", 48), ("batch", "tokens"), (3, 48, 20), (3, 20, 72))


class Dimension:
    """A dimension, or an expression of dimensions: its value for TOKENS, and whether it is static."""

    def __init__(self, value: int, known: bool) -> None:
        self.value, self.known = value, known

    def is_constant(self) -> bool:
        return self.known

    def get_constant_value(self) -> int:
        return self.value


class Expressions:
    """The expression builder: computes the operations of trt.DimensionOperation immediately."""

    def constant(self, value: int) -> Dimension:
        return Dimension(value, True)

    def operation(self, op: Any, first: Dimension, second: Dimension) -> Dimension:
        a, b = first.value, second.value
        value = {"SUM": a + b, "PROD": a * b, "CEIL_DIV": -(-a // b)}[op.name]
        return Dimension(value, first.known and second.known)


def _dimension(size: int | str) -> Dimension:
    return Dimension(TOKENS[size], False) if isinstance(size, str) else Dimension(size, True)


def _load(folder: Path) -> Any:
    """Load the bindings as the module `tensorrt`, with stub libraries and fake dimensions and registry."""
    trt: Any = load_beside_stubs(folder)
    sys.modules["tensorrt"] = trt
    creators: dict[tuple[str, str], Any] = {}
    registry = SimpleNamespace(
        register_creator=lambda creator, space: creators.update({(space, creator.name): creator}),
        get_creator=lambda name, version, space: creators[space, name],
    )
    trt.get_plugin_registry = lambda: registry
    trt.IDimensionExpr = Dimension
    trt.ISymExpr = type("ISymExpr", (), {})
    trt.DimsExprs = lambda length: [None] * length
    return trt


def _start(folder: Path) -> None:
    from tpx_engines import routed_lora_plugin

    trt = _load(folder)
    routed_lora_plugin.register(89)
    globals()["trt"] = trt


def _build(dtype: str, tactic: int, shapes: tuple[tuple[Any, ...], ...] = SHAPES) -> dict[str, Any]:
    """Call the plugin as TensorRT does when it builds an engine, and return its answers as plain values."""
    trt: Any = globals()["trt"]
    real_type = trt.DataType.HALF if dtype == "fp16" else trt.DataType.FLOAT
    types = [real_type, trt.DataType.INT64, real_type, real_type]
    creator = trt.get_plugin_registry().get_creator("RoutedLora", "1", "tpx")
    plugin = creator.create_plugin(
        "RoutedLora",
        "tpx",
        trt.PluginFieldCollection([]),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    answers: dict[str, Any] = {"version": trt.__version__, "torch": "torch" in sys.modules}
    answers["output types"] = [t.name for t in plugin.get_output_data_types(types, [len(s) for s in shapes])]
    dims = [[_dimension(size) for size in shape] for shape in shapes]
    outputs = plugin.get_output_shapes(dims, [], Expressions())
    answers["output shapes"] = [[d.value for d in shape] for shape in outputs]

    descriptions = []
    for shape, data_type in zip([*shapes, (*shapes[0][:2], shapes[3][2])], [*types, real_type], strict=True):
        description = trt.DynamicPluginTensorDesc()
        description.desc.dims = trt.Dims([size if isinstance(size, int) else -1 for size in shape])
        description.desc.type, description.desc.format = data_type, trt.TensorFormat.LINEAR
        descriptions.append(description)
    formats = plugin.get_supported_format_combinations(descriptions, 4)
    answers["offered"] = [
        [(description.type.name, description.format.name) for description in formats[i : i + 5]]
        for i in range(0, len(formats), 5)
    ]
    plugin.configure_plugin(descriptions[:4], descriptions[4:])
    answers["tactics"] = sorted(plugin.get_valid_tactics())
    plugin.set_tactic(tactic)

    class Scalars(dict[int, Any]):
        nbSymExprs = 0

    launch, scalars = SimpleNamespace(), Scalars()
    plugin.get_launch_params(dims, descriptions, 4, launch, scalars, Expressions())
    answers["launch"] = {name: value.expr.value for name, value in vars(launch).items()}
    answers["scalars"] = [(scalars[i].dtype.name, scalars[i].expr.value) for i in range(scalars.nbSymExprs)]
    name, ptx = plugin.get_kernel([d.desc for d in descriptions[:4]], [d.desc for d in descriptions[4:]])
    answers["kernel"], answers["ptx"] = name, ptx.decode()
    return answers


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A separate process, so that the stubs and fakes do not conflict with another TensorRT."""
    if find_spec("tensorrt_bindings") is None:
        pytest.skip(f"expected the package {DISTRIBUTION}, found none; pip install --no-deps {DISTRIBUTION}")
    if shutil.which("gcc") is None:
        pytest.skip("expected gcc for the stub libraries, found none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        folder = tmp_path_factory.mktemp("stubs")
        with ProcessPoolExecutor(1, get_context("spawn"), _start, (folder,)) as pool:
            yield pool


@pytest.mark.parametrize(("dtype", "rows"), [("fp16", 64), ("fp32", 32)])
@pytest.mark.parametrize("tactic", [1, 2])
def test_gives_tensorrt_its_types_shapes_formats_launch_and_kernel(
    tensorrt: ProcessPoolExecutor, dtype: str, rows: int, tactic: int
) -> None:
    answers = tensorrt.submit(_build, dtype, tactic).result()
    real_type = {"fp16": "HALF", "fp32": "FLOAT"}[dtype]
    assert answers["output types"] == [real_type]
    assert answers["output shapes"] == [[2, 77, 72]]
    layout = "LINEAR"
    assert sorted(answers["offered"]) == [
        [(name, layout), ("INT64", layout), (name, layout), (name, layout), (name, layout)]
        for name in ("FLOAT", "HALF")
    ]
    assert answers["tactics"] == [1, 2, 3, 6]
    shared = answers["launch"].pop("shared_mem")
    assert 0 < shared <= 48 * 1024
    assert answers["launch"] == {
        "grid_x": -(-154 // rows) + 2,
        "grid_y": tactic,
        "grid_z": 1,
        "block_x": 128,
        "block_y": 1,
        "block_z": 1,
    }
    assert answers["scalars"] == [("INT32", 154)]
    assert f".visible .entry {answers['kernel']}(" in answers["ptx"]
    assert ".target sm_89" in answers["ptx"]
    assert not answers["torch"], "building an engine must not need torch"


def test_rejects_weights_of_dynamic_shape(tensorrt: ProcessPoolExecutor) -> None:
    shapes = (("batch", "tokens", 48), ("batch", "tokens"), ("batch", 48, 20), ("batch", 20, 72))
    with pytest.raises(BadInput, match=r"expected weights of static shape, found a \(-1, 48, 20\)"):
        tensorrt.submit(_build, "fp16", 1, shapes).result()


def test_rejects_a_second_registration(tensorrt: ProcessPoolExecutor) -> None:
    from tpx_engines import routed_lora_plugin

    with pytest.raises(ValueError, match="already has a defin"):
        tensorrt.submit(routed_lora_plugin.register, 86).result()


def test_reports_missing_tensorrt_and_an_unsupported_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpx_engines import routed_lora_plugin

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        EngineUnavailable, match=r"expected TensorRT with its module tensorrt.plugin \(10\.14 or later\)"
    ):
        routed_lora_plugin.register(89)
    with pytest.raises(BadInput, match=r"expected a compute capability of 80, .*, found 75"):
        routed_lora_plugin.register(75)
