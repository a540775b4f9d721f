"""The engines by name: what runs a graph, what to install for it, and which one `auto` means here."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import BadInput, EngineUnavailable, shorten
from .environment import loop_wanted
from .loop import Loop, LoopPlan
from .session import Session, one_line

# Of a transformer: tpx::RoutedLora as one node, attention in float16 as one node too, or standard operators alone.
GraphVariant = Literal["operator", "fused", "plain"]


@dataclass(frozen=True)
class Engine:
    """One way to run a graph; `package` is what it imports, `extra` is what pip installs for it.

    `module`, beside this file, has `problem(engine_name) -> str | None`, why this machine cannot use the
    engine and how to mend it, and `open_session(engine_name, path) -> Session`. It is imported when first
    asked.
    """

    name: str
    package: str
    extra: str
    module: str
    variant: GraphVariant  # of the transformer, that it reads
    precision: str | None = None  # that it computes in; None where that is the graph's own
    device: Literal["cpu", "gpu"] = "cpu"
    # Whether tpx-build has work for it: to spare processes that draw the compiling, or to make the only thing that it runs.
    prebuilt: Literal["never", "optional", "required"] = "never"
    has_loop: bool = False  # whether `module` has `start_loop(transformer, step, plan) -> Loop`

    def problem(self) -> str | None:
        """Why this engine cannot run here, on one line; None if it can."""
        if importlib.util.find_spec(self.package) is None:
            return (
                f"expected the package {self.package} for engine {self.name}, found none; "
                f"install it with `pip install 'tpx[{self.extra}]'`"
            )
        try:
            reason: str | None = self._module().problem(self.name)
        except Exception as error:  # a broken install raises whatever it stumbles on
            return (
                f"expected {self.package} to import for engine {self.name}, found: {one_line(error)}; "
                f"install it again with `pip install --force-reinstall 'tpx[{self.extra}]'`"
            )
        return reason

    def open(self, path: Path) -> Session:
        """Load the graph at `path`. Raises EngineUnavailable or EngineFailed."""
        session: Session = self._module().open_session(self.name, path)
        return session

    @property
    def loops(self) -> bool:
        """Whether it is to keep a loop's latents on the device, where it can."""
        return self.has_loop and loop_wanted()

    def start_loop(self, transformer: Session, step: Session, plan: LoopPlan) -> Loop:
        """The loop of two sessions of this engine. Raises EngineFailed."""
        loop: Loop = self._module().start_loop(transformer, step, plan)
        return loop

    def _module(self) -> Any:
        return importlib.import_module(f".{self.module}", __package__)


# In the order in which `auto` tries them.
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
            has_loop=True,
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
        # auto takes these only where nothing else is installed: they may have nothing to run.
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
NONE_RUNS = (
    f"expected one of the engines {', '.join(ENGINES)}, found none that runs here; "
    "install one with `pip install 'tpx[cpu]'`"
)


def resolve(name: str = AUTO) -> Engine:
    """The engine of that name, or the first of ENGINES that this machine can use.

    Raises BadInput for a name that is none, EngineUnavailable for an engine that cannot be used.
    """
    if name == AUTO:
        for engine in ENGINES.values():
            if engine.problem() is None:
                return engine
        raise EngineUnavailable(NONE_RUNS)
    if not isinstance(name, str) or name not in ENGINES:
        raise BadInput(f"expected an engine of {AUTO}, {', '.join(ENGINES)}, found {shorten(name)}")
    if problem := ENGINES[name].problem():
        raise EngineUnavailable(problem)
    return ENGINES[name]
