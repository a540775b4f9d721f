"""Files of tensors that are complete or absent: .safetensors, and what torch.load reads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tpx_runtime.errors import BadInput, one_line
from tpx_runtime.files import atomic_file


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file atomically. Raises BadInput, for example if the disk is full."""
    with _errors_as_bad_input(path), atomic_file(path) as part:
        save_file(dict(tensors), part, metadata)


def write_torch(value: object, path: Path) -> None:
    """Write `value` with torch.save, atomically. Raises BadInput, for example if the disk is full."""
    # torch does not say why it could not write to a path.
    with _errors_as_bad_input(path), atomic_file(path) as part, part.open("wb") as file:
        torch.save(value, file)


@contextmanager
def _errors_as_bad_input(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # The error of a file that torch writes to is the context of an error of torch's own.
        cause = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
        if not isinstance(cause, Exception):  # Ctrl-C
            raise cause from None
        reason = getattr(cause, "strerror", None) or one_line(cause, 100)
        raise BadInput(
            f"expected to write {path}, found: {reason}; free some space or choose another path"
        ) from None
