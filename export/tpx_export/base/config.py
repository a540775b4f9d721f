"""The sizes of a foreign model, checked: from the fields of its config.json, or from the shapes of its tensors."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpx_export.base.foreign_json import read_object
from tpx_export.base.tensors import Tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_runtime.errors import shorten

_MOST = 2**24  # of anything that is counted; identifiers up to here are exact in float32


@dataclass(frozen=True)
class Config:
    """The fields of a config.json. A field that is left out has the default of the library that wrote it."""

    path: Path
    fields: dict[str, Any]

    def count(self, name: str, default: int | None = None, most: int = _MOST) -> int:
        """A whole number in 1..most. Raises CheckpointInvalid."""
        value = self.fields.get(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.unfit(f"{name} in 1..{most}", value)
        return value

    def counts(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One or more whole numbers, each 1 or more. Raises CheckpointInvalid."""
        values = self.fields.get(name, default)
        if (
            not isinstance(values, list | tuple)
            or not values
            or not all(type(value) is int and 1 <= value <= _MOST for value in values)
        ):
            raise self.unfit(f"{name} of some whole numbers", values)
        return tuple(values)

    def real(self, name: str, default: float) -> float:
        """A number; null means the default. Raises CheckpointInvalid."""
        value = self.fields.get(name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise self.unfit(f"a number {name}", value)
        return default if value is None else float(value)

    def one_of(self, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """A value that must be one of `allowed`. Raises CheckpointInvalid."""
        value = self.fields.get(name, default)
        if not any(type(value) is type(known) and value == known for known in allowed):
            raise self.unfit(f"{name} {' or '.join(map(str, allowed))}", value)
        return value

    def unfit(self, expected: str, found: object) -> CheckpointInvalid:
        return CheckpointInvalid(
            f"{self.path}: expected {expected}, found {shorten(found)}; other models cannot be imported"
        )


def read_config(folder: Path) -> Config:
    """Read config.json in `folder`. Raises CheckpointInvalid."""
    path = folder / "config.json"
    return Config(path, read_object(path))


def shape(tensors: Tensors, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor. Raises CheckpointInvalid if it is missing, empty, or has another number of dimensions."""
    if name not in tensors:
        raise CheckpointInvalid(
            f"{tensors.where}: expected a tensor {name}, found it missing; check the file"
        )
    found = tuple(tensors[name].shape)
    if len(found) != dimensions or 0 in found:
        raise CheckpointInvalid(
            f"{tensors.where}: expected {name} of {dimensions} dimensions, found {list(found)}; check the file"
        )
    return found


def numbered(names: Iterable[str], prefix: str, least: int = 1) -> int:
    """How many numbered parts (PREFIX.0., PREFIX.1., ...) the names have, or `least` if that is more.

    If a number in between has no tensors, loading reports its tensors as missing and those of the last part as unknown.
    """
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in names)
    return max(least, len({match[1] for match in found if match}))
