"""The engines by name: what each needs, what it can do, and which one `auto` selects."""

import importlib
import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ..bundle import GraphVariant
from ..environment import device_loop_requested
from ..errors import BadInput, EngineUnavailable, one_line, shorten
from ..interrupts import uninterrupted
from .loop import DeviceLoops
from .session import Session


class GraphEngine(Protocol):
    """What a generator needs of an engine."""

    @property
    def name(self) -> str:
        """How messages and images call it."""

    @property
    def variant(self) -> GraphVariant:
        """The variant of the transformer graph that it loads."""

    def open(self, path: Path) -> Session:
        """Load the graph at `path`. Raises EngineUnavailable or EngineFailed."""

    @property
    def device_loops(self) -> DeviceLoops | None:
        """What starts loops whose latents stay on the device; None to run them on the host."""


@dataclass(frozen=True)
class Engine:
    """One way to run a graph. `package` is the Python package it imports, `extra` the pip extra that installs it.

    `module`, next to this file, defines `problem(engine_name) -> str | None` (why this machine cannot use the engine, and
    how to fix it) and `open_session(engine_name, path) -> Session`. It is imported on first use.
    """

    name: str
    package: str
    extra: str
    module: str
    variant: GraphVariant  # of the transformer graph that the engine loads
    precision: str | None = None  # that the engine computes in; None: the precision of the graph
    device: Literal["cpu", "gpu"] = "cpu"
    # Whether tpx-build compiles graphs for it: "optional" saves compile time later, "required" engines run nothing else.
    prebuilt: Literal["never", "optional", "required"] = "never"
    has_device_loop: bool = False  # whether `module` has the functions of DeviceLoops

    def problem(self) -> str | None:
        """Why this engine cannot run here, on one line, or None if it can."""
        if importlib.util.find_spec(self.package) is None:
            return (
                f"expected the package {self.package} for engine {self.name}, found none; "
                f"install it with `pip install 'tpx[{self.extra}]'`"
            )
        try:
            reason: str | None = self._module().problem(self.name)
        except Exception as error:  # a broken installation can raise anything
            remedy = f"install it again with `pip install --force-reinstall 'tpx[{self.extra}]'`"
            if isinstance(error, MemoryError) or "bad_alloc" in str(error):
                remedy = "close other programs, because memory is short"
            return f"expected {self.package} to import for engine {self.name}, found: {one_line(error)}; {remedy}"
        return reason

    def open(self, path: Path) -> Session:
        """Load the graph at `path`. Raises EngineUnavailable or EngineFailed."""
        session: Session = self._module().open_session(self.name, path)
        return session

    @property
    def device_loops(self) -> DeviceLoops | None:
        """What starts loops on the device; None if the engine has none, or with TPX_DEVICE_LOOP=0."""
        if not self.has_device_loop or not device_loop_requested():
            return None
        loops: DeviceLoops = self._module()
        return loops

    def _module(self) -> Any:
        with uninterrupted():
            return importlib.import_module(f".{self.module}", __package__)


# In the order that `auto` tries them (auto_order has an exception).
ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "onnxruntime-cuda",
            package="onnxruntime",
            extra="gpu",
            module="onnxruntime",
            variant="fused",
            device="gpu",
            has_device_loop=True,
        ),
        Engine("onnxruntime", package="onnxruntime", extra="cpu", module="onnxruntime", variant="plain"),
        Engine(
            "openvino",
            package="openvino",
            extra="openvino",
            module="openvino",
            variant="plain",
            prebuilt="optional",
        ),
        Engine(
            "openvino-bf16",
            package="openvino",
            extra="openvino",
            module="openvino",
            variant="plain",
            precision="bf16",
            prebuilt="optional",
        ),
        # Last for `auto`: they cannot run a bundle before tpx-build.
        Engine(
            "tensorrt-rtx",
            package="tensorrt_rtx_bindings",
            extra="tensorrt-rtx",
            module="tensorrt",
            variant="operator",
            device="gpu",
            prebuilt="required",
        ),
        Engine(
            "tensorrt",
            package="tensorrt",
            extra="tensorrt",
            module="tensorrt",
            variant="operator",
            device="gpu",
            prebuilt="required",
        ),
    )
}
AUTO = "auto"
# Precisions of bundles that OpenVINO computes in half of ONNX Runtime's time or less on these processors, the only ones that
# were tried, and without VNNI in the same time (docs/quantisation.md).
_OPENVINO_FIRST, _TRIED = ("int8-weights", "int4-weights"), ("x86_64", "AMD64")
NO_USABLE_ENGINE = (
    f"expected one of the engines {', '.join(ENGINES)}, found none that runs here; "
    "install one with `pip install 'tpx[cpu]'`"
)


def auto_order(precision: str | None = None) -> list[Engine]:
    """The engines as `auto` tries them for a bundle of that precision."""
    engines = dict(ENGINES)
    if precision in _OPENVINO_FIRST and platform.machine() in _TRIED:
        engines = {name: engines.pop(name) for name in ("onnxruntime-cuda", "openvino")} | engines
    return list(engines.values())


def resolve(name: str = AUTO, precision: str | None = None) -> Engine:
    """The engine of that name, or for `auto` the first that this machine can use for a bundle of that precision.

    Raises BadInput for an unknown name, EngineUnavailable for an engine that cannot be used.
    """
    if name == AUTO:
        for engine in auto_order(precision):
            if engine.problem() is None:
                return engine
        raise EngineUnavailable(NO_USABLE_ENGINE)
    if not isinstance(name, str) or name not in ENGINES:
        raise BadInput(f"expected an engine of {AUTO}, {', '.join(ENGINES)}, found {shorten(name)}")
    if problem := ENGINES[name].problem():
        raise EngineUnavailable(problem)
    return ENGINES[name]
