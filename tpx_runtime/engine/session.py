"""What an engine gives: a session of a graph, whose answers are checked and whose errors are one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from ..errors import EngineFailed

Arrays = dict[str, npt.NDArray[Any]]


class Session(Protocol):
    """A graph that is loaded and ready."""

    def run(self, inputs: Arrays) -> Arrays:
        """Every output of the graph by name. Raises EngineFailed."""


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
