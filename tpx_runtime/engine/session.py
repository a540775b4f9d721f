"""Sessions: loaded graphs whose outputs are checked and whose errors are one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from ..errors import EngineFailed, one_line

Arrays = dict[str, npt.NDArray[Any]]


class Session(Protocol):
    """A loaded graph, ready to run."""

    def run(self, inputs: Arrays) -> Arrays:
        """All outputs of the graph by name. Raises EngineFailed."""


def checked_output(outputs: Arrays, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The output `name`, checked to have `shape`. Raises EngineFailed."""
    require_output(name, shape, outputs[name].shape if name in outputs else None)
    return outputs[name]


def require_output(name: str, shape: tuple[int, ...], found: tuple[int, ...] | None) -> None:
    """Raise EngineFailed if an output is missing (`found` is None) or has another shape."""
    if found != shape:
        raise EngineFailed(
            f"expected an output {name} of shape {shape}, found {found or 'none'}; export the bundle again"
        )


@contextmanager
def engine_errors(path: Path, package: str, action: str) -> Iterator[None]:
    """Convert the errors of `package` to EngineFailed: "PATH: PACKAGE could not `action` it: ...".

    Other exceptions propagate, such as a time limit that an application raises in a signal handler during the call.
    """
    try:
        yield
    except Exception as error:
        # By module name, because onnxruntime does not export its exception types.
        from_package = type(error).__module__.split(".")[0] == package
        if not from_package and not isinstance(error, RuntimeError | ValueError | TypeError | MemoryError):
            raise
        message = one_line(error)
        hint = "; if memory is short, generate fewer images at once" if "alloc" in message.lower() else ""
        raise EngineFailed(f"{path}: {package} could not {action} it: {message}{hint}") from error
