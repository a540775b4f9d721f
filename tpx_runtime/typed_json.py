"""Converts values read from JSON to frozen dataclasses and checks each field against its type hint."""

import sys
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .errors import shorten


def parse(kind: Any, value: Any, where: str, format_name: str, defaults: bool = False) -> Any:
    """Convert `value` (from JSON) to `kind`: a dataclass, dict, tuple, int, float, bool, str, `X | None`, or Any.

    Lists become tuples, and integers become floats where a float is expected. If `defaults`, fields with a default are
    optional. Raises ValueError, which names the field as `where` + its path, or `format_name` if fields are missing or
    unknown; errors raised by the dataclasses themselves are passed on.
    """

    def parse_item(item_kind: Any, item: Any, name: object) -> Any:
        return parse(item_kind, item, f"{where}{name}.", format_name, defaults)

    if kind is Any:
        return value
    if isinstance(kind, UnionType):
        return None if value is None else parse(get_args(kind)[0], value, where, format_name, defaults)
    if hasattr(kind, "__dataclass_fields__") and isinstance(value, dict):
        names = [field.name for field in fields(kind)]
        optional = {field.name for field in fields(kind) if defaults and _has_default(field)}
        if differing := sorted((set(names) ^ set(value)) - optional):
            found = "missing" if differing[0] in names else "unknown"
            raise ValueError(
                f"expected the fields of {format_name}, found {shorten(where + differing[0])} {found}"
            )
        hints = get_type_hints(kind)
        return kind(**{name: parse_item(hints[name], value[name], name) for name in names if name in value})
    origin, members = get_origin(kind), get_args(kind)
    if origin is dict and isinstance(value, dict):
        return {key: parse_item(members[1], item, key) for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        kinds = members[:1] * len(value) if members[-1] is Ellipsis else members
        if len(kinds) == len(value):
            return tuple(
                parse_item(part, item, i) for i, (part, item) in enumerate(zip(kinds, value, strict=True))
            )
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    expected = str(kind) if origin else kind.__name__
    raise ValueError(f"expected {shorten(where[:-1])} to be {expected}, found {shorten(value)}")


def _has_default(field: Any) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING
