"""Conversion of foreign tensors to the tensors of our modules.

conversions: our name ─▶ Conversion(foreign names, function)        Tensors ─check_shapes─▶ load_foreign ─▶ module
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tpx_export.base.tensors import FLOAT8, Tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.precision import STORED_DTYPES
from tpx_runtime.errors import first_few

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Conversion:
    """One of our tensors is the result of `convert`, called with the foreign tensors `names` in order."""

    names: tuple[str, ...]
    convert: Callable[..., Tensor]


def unchanged(name: str) -> Conversion:
    """The foreign tensor as it is."""
    return Conversion((name,), lambda value: value)


def concatenated(*names: str) -> Conversion:
    """Foreign tensors concatenated along the first dimension, such as q, k and v to one projection."""
    return Conversion(names, lambda *values: torch.cat(values))


def swapped_halves(name: str) -> Conversion:
    """(scale, shift) to (shift, scale), or the reverse."""
    return Conversion((name,), lambda value: torch.cat(value.chunk(2)[::-1]))


def linear(ours: str, *theirs: str) -> dict[str, Conversion]:
    """Weight and bias of one layer, from one foreign layer or several concatenated ones."""
    parts = {part: [f"{name}.{part}" for name in theirs] for part in ("weight", "bias")}
    return {f"{ours}.{part}": concatenated(*n) if len(n) > 1 else unchanged(*n) for part, n in parts.items()}


def patch_layers(patch: int, out_channels: int, patch_in: str, patch_out: str) -> dict[str, Conversion]:
    """Our `patch_in` and `patch_out` from their convolution `patch_in` and their linear layer `patch_out`.

    The rows of theirs are ordered (p, q, channel), those of ours (channel, p, q).
    """

    def reordered(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (patch**2, out_channels)).transpose(0, 1).flatten(0, 1)

    return {
        "patch_in.weight": Conversion((f"{patch_in}.weight",), lambda weight: weight.flatten(1)),
        "patch_in.bias": unchanged(f"{patch_in}.bias"),
        "patch_out.weight": Conversion((f"{patch_out}.weight",), reordered),
        "patch_out.bias": Conversion((f"{patch_out}.bias",), reordered),
    }


def foreign_shapes(module: nn.Module, conversions: Mapping[str, Conversion]) -> dict[str, tuple[int, ...]]:
    """The shape that each foreign tensor must have if its conversion only concatenates tensors or reorders rows."""
    return {
        foreign: (ours.shape[0] // len(conversions[name].names), *ours.shape[1:])
        for name, ours in module.state_dict().items()
        for foreign in conversions[name].names
    }


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Tensors,
    is_valid: Callable[[torch.dtype], bool],
    expected: str,
) -> None:
    """Check shapes and types of foreign tensors before their conversion, which could hide a wrong shape.

    Missing tensors are ignored here: `load_foreign` reports them. Raises CheckpointInvalid, whose message has the first few.
    """
    faults = []
    for name, shape in shapes.items():
        if name not in tensors:
            continue
        value = tensors[name]
        if tuple(value.shape) != shape or not is_valid(value.dtype):
            dtype = str(value.dtype).removeprefix("torch.")
            faults.append(f"{name} is {dtype} {list(value.shape)}, not {list(shape)}")
    if faults:
        raise CheckpointInvalid(
            f"{tensors.path}: expected {expected}, found {len(faults)} that do not fit: {first_few(faults)}"
        )


def load_foreign(
    module: M,
    conversions: Mapping[str, Conversion],
    tensors: Tensors,
    unused: Iterable[str] = (),
) -> M:
    """Load `tensors` in their stored precision into `module`, which is on the meta device.

    Only float8 is converted, to float16. `conversions` has an entry for every tensor of the module's state dict; `unused`
    names foreign tensors of a known format that are not needed. Raises CheckpointInvalid, whose message names
    the first tensors that are missing, unknown, of another shape or of an unsupported type.
    """
    expected = {name: value.shape for name, value in module.state_dict().items()}
    assert conversions.keys() == expected.keys(), sorted(conversions.keys() ^ expected.keys())
    required = {name for conversion in conversions.values() for name in conversion.names}
    faults = [f"{name} missing" for name in sorted(required - tensors.keys())]
    faults += [f"{name} unknown" for name in sorted(tensors.keys() - required - set(unused))]
    state: dict[str, Tensor] = {}
    if not faults:
        for name, conversion in conversions.items():
            value = conversion.convert(*(tensors[foreign] for foreign in conversion.names))
            value = value.half() if value.dtype in FLOAT8 else value
            if value.shape != expected[name]:
                faults.append(f"{conversion.names[0]} gives {list(value.shape)}, not {list(expected[name])}")
            elif value.dtype not in STORED_DTYPES:
                faults.append(f"{conversion.names[0]} is {value.dtype}, not a float of 32 or 16 bits")
            else:
                # Without `data` a buffer may be a view, which torch cannot export after an in-place change of precision.
                state[name] = value.data
    if faults:
        raise CheckpointInvalid(
            f"{tensors.path}: expected the {len(required)} tensors of this model, found {len(faults)} that do not fit: "
            f"{first_few(faults)}"
        )
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)
