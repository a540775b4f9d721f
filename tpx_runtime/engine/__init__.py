"""The engines: who can run a graph, what to install for it, and which one `auto` means here."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, EngineFailed, EngineUnavailable, shorten
from .gpu import loop_wanted

Arrays = dict[str, npt.NDArray[Any]]

# Of a transformer: tpx::RoutedLora as one node, attention in float16 as one node too, or standard operators alone.
Spelling = Literal["operator", "fused", "plain"]


class Session(Protocol):
    """A graph that is loaded and ready."""

    def run(self, inputs: Arrays) -> Arrays:
        """Every output of the graph by name. Raises EngineFailed."""


@dataclass(frozen=True)
class Course:
    """A denoising loop, all told ahead: N calls on the rows of so many `pictures`, a negative branch's first.

    `context` is what the transformer is told beside latents and conditions, `tables` what a step's graph is given once
    (docs/bundle.md), and `ends` the number of calls after each of the sampler's steps.
    """

    pictures: int
    latents: npt.NDArray[np.float32]  # [rows, C, H, W], of the first call
    context: Arrays
    tables: Arrays
    ends: list[int]
    prediction: str  # the transformer's output

    @property
    def inputs(self) -> Arrays:
        """Of the first call."""
        conditions = self.tables["table"][0][self.tables["told"]]
        return {"latents": self.latents, "conditions": conditions, **self.context}


class Loop(Protocol):
    """A loop that is at the start of its course, on a device; each call of `advance` is one of the transformer."""

    def advance(self) -> None:
        """Raises EngineFailed."""

    def latents(self) -> npt.NDArray[np.float32]:
        """As the next call is shown them, [rows, C, H, W]."""

    def routes(self) -> npt.NDArray[np.int64] | None:
        """Of the latest call, [rows, S, N]; None where the model does not think."""


def output(outputs: Arrays, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The output `name` of a session, whose shape must be `shape`. Raises EngineFailed."""
    require_output(name, shape, outputs[name].shape if name in outputs else None)
    return outputs[name]


def require_output(name: str, shape: tuple[int, ...], found: tuple[int, ...] | None) -> None:
    """Raises EngineFailed for an output that is not there (None) or of another shape."""
    if found != shape:
        raise EngineFailed(
            f"expected an output {name} of shape {shape}, found {found or 'none'}; export the bundle again"
        )


def one_line(error: BaseException) -> str:
    """What an engine's own error says, fit for an error message."""
    return " ".join(str(error).split())[:300]


@contextmanager
def failing(path: Path, package: str, doing: str) -> Iterator[None]:
    """Turn what `package` raises inside into EngineFailed, such as "could not run it" of the graph at `path`.

    What an application raises in a signal handler while the engine works, a time limit perhaps, is not its and goes on.
    """
    try:
        yield
    except Exception as error:
        its_own = type(error).__module__.split(".")[0] == package  # onnxruntime exports none of these by name
        if not its_own and not isinstance(error, RuntimeError | ValueError | TypeError | MemoryError):
            raise
        said = one_line(error)
        mend = "; where memory is short, draw fewer pictures at once" if "alloc" in said.lower() else ""
        raise EngineFailed(f"{path}: {package} could not {doing} it: {said}{mend}") from error


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
    spelling: Spelling  # of the transformer, that it reads
    precision: str | None = None  # that it computes in; None where that is the graph's own
    device: Literal["cpu", "gpu"] = "cpu"
    # Whether tpx-build has work for it: to spare processes that draw the compiling, or to make the only thing that it runs.
    built: Literal["never", "ahead", "only"] = "never"
    looping: bool = False  # whether `module` has `start_loop(transformer, step, course) -> Loop`

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
        return self.looping and loop_wanted()

    def start_loop(self, transformer: Session, step: Session, course: Course) -> Loop:
        """The loop of two sessions of this engine. Raises EngineFailed."""
        loop: Loop = self._module().start_loop(transformer, step, course)
        return loop

    def _module(self) -> Any:
        return importlib.import_module(f".{self.module}", __name__)


# In the order in which `auto` tries them.
ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "onnxruntime-cuda",
            package="onnxruntime",
            extra="gpu",
            module="onnxruntime",
            spelling="fused",
            device="gpu",
            looping=True,
        ),
        Engine("onnxruntime", package="onnxruntime", extra="cpu", module="onnxruntime", spelling="plain"),
        Engine(
            "openvino",
            package="openvino",
            extra="openvino",
            module="openvino",
            spelling="plain",
            built="ahead",
        ),
        Engine(
            "openvino-bf16",
            package="openvino",
            extra="openvino",
            module="openvino",
            spelling="plain",
            precision="bf16",
            built="ahead",
        ),
        # auto takes these only where nothing else is installed: they may have nothing to run.
        Engine(
            "tensorrt-rtx",
            package="tensorrt_rtx_bindings",
            extra="tensorrt-rtx",
            module="tensorrt",
            spelling="operator",
            device="gpu",
            built="only",
        ),
        Engine(
            "tensorrt",
            package="tensorrt",
            extra="tensorrt",
            module="tensorrt",
            spelling="operator",
            device="gpu",
            built="only",
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
