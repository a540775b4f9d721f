"""Checked access to the sizes of a foreign model: the fields of its config.json, and the shapes of its tensors."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpx_export.base.foreign_json import read_object
from tpx_export.base.tensors import Tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_runtime.errors import shorten

_MAX_COUNT = 2**24  # token ids up to here are exact in float32


@dataclass(frozen=True)
class Config:
    """The fields of a config.json. A missing field has the default of the library that wrote the file."""

    path: Path
    fields: dict[str, Any]

    def count(self, name: str, default: int | None = None, maximum: int = _MAX_COUNT) -> int:
        """An integer in 1..maximum. Raises CheckpointInvalid."""
        value = self.fields.get(name, default)
        if type(value) is not int or not 1 <= value <= maximum:
            raise self.invalid(f"{name} in 1..{maximum}", value)
        return value

    def counts(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One or more integers, each 1 or more. Raises CheckpointInvalid."""
        values = self.fields.get(name, default)
        if (
            not isinstance(values, list | tuple)
            or not values
            or not all(type(value) is int and 1 <= value <= _MAX_COUNT for value in values)
        ):
            raise self.invalid(f"a list of positive integers {name}", values)
        return tuple(values)

    def real(self, name: str, default: float) -> float:
        """A number; null means the default. Raises CheckpointInvalid."""
        value = self.fields.get(name)
        if value is not None and (type(value) not in (int, float) or not abs(value) <= sys.float_info.max):
            raise self.invalid(f"a number {name}", value)
        return default if value is None else float(value)

    def scale(self, name: str, default: float) -> float:
        """A number above 0. Raises CheckpointInvalid."""
        if (value := self.real(name, default)) <= 0:
            raise self.invalid(f"a {name} above 0", value)
        return value

    def one_of(self, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """A value that must be one of `allowed`. Raises CheckpointInvalid."""
        value = self.fields.get(name, default)
        if not any(type(value) is type(option) and value == option for option in allowed):
            raise self.invalid(f"{name} {' or '.join(map(str, allowed))}", value)
        return value

    def invalid(self, expected: str, found: object) -> CheckpointInvalid:
        """The error for a field that is not supported."""
        return CheckpointInvalid(
            f"{self.path}: expected {expected}, found {shorten(found)}; other models cannot be imported"
        )


def read_config(folder: Path) -> Config:
    """Read config.json in `folder`. Raises CheckpointInvalid."""
    path = folder / "config.json"
    return Config(path, read_object(path))


def tensor_shape(tensors: Tensors, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor. Raises CheckpointInvalid if it is missing, empty, or has another number of dimensions."""
    if name not in tensors:
        raise CheckpointInvalid(f"{tensors.path}: expected a tensor {name}, found none; check the file")
    found = tuple(tensors[name].shape)
    if len(found) != dimensions or 0 in found:
        raise CheckpointInvalid(
            f"{tensors.path}: expected {name} with {dimensions} dimensions, found {list(found)}; check the file"
        )
    return found


def count_numbered(names: Iterable[str], prefix: str, minimum: int = 1) -> int:
    """How many numbered parts (PREFIX.0., PREFIX.1., ...) the names have, at least `minimum`.

    If the tensors of a part in between are missing, loading reports them, and those of the last part as unknown.
    """
    matches = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in names)
    return max(minimum, len({match[1] for match in matches if match}))
