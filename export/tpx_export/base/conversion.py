"""How foreign tensors become the tensors of our modules.

recipe: our name ─▶ From(foreign names, function)        Tensors ─check_shapes─▶ load_foreign ─▶ module
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tpx_export.base.tensors import FLOAT8, Tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.precision import STORED

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class From:
    """How one of our tensors is made: `make` is called with the foreign tensors `names`, in order."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


def same(name: str) -> From:
    """The foreign tensor as it is."""
    return From((name,), lambda value: value)


def stacked(*names: str) -> From:
    """Foreign tensors one below the other: q, k and v as one projection."""
    return From(names, lambda *values: torch.cat(values))


def swapped_halves(name: str) -> From:
    """(scale, shift) to (shift, scale), and back."""
    return From((name,), lambda value: torch.cat(value.chunk(2)[::-1]))


def linear(ours: str, *theirs: str) -> dict[str, From]:
    """Weight and bias of one layer, from one of theirs or from several stacked."""
    parts = {part: [f"{name}.{part}" for name in theirs] for part in ("weight", "bias")}
    return {f"{ours}.{part}": stacked(*n) if len(n) > 1 else same(*n) for part, n in parts.items()}


def patch_layers(patch: int, out_channels: int, patch_in: str, patch_out: str) -> dict[str, From]:
    """Our `patch_in` and `patch_out` from their convolution `patch_in` and their linear layer `patch_out`.

    The rows of theirs are ordered (p, q, channel), those of ours (channel, p, q).
    """

    def reordered(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (patch**2, out_channels)).transpose(0, 1).flatten(0, 1)

    return {
        "patch_in.weight": From((f"{patch_in}.weight",), lambda weight: weight.flatten(1)),
        "patch_in.bias": same(f"{patch_in}.bias"),
        "patch_out.weight": From((f"{patch_out}.weight",), reordered),
        "patch_out.bias": From((f"{patch_out}.bias",), reordered),
    }


def foreign_shapes(module: nn.Module, recipe: Mapping[str, From]) -> dict[str, tuple[int, ...]]:
    """The shape that each foreign tensor must have if its recipe only stacks tensors or reorders rows."""
    return {
        foreign: (ours.shape[0] // len(recipe[name].names), *ours.shape[1:])
        for name, ours in module.state_dict().items()
        for foreign in recipe[name].names
    }


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Tensors,
    is_real: Callable[[torch.dtype], bool],
    expected: str,
) -> None:
    """Check foreign tensors before any are stacked or reordered, which would hide a wrong shape.

    Tensors that are missing are left for `load_foreign` to list. Raises CheckpointInvalid, which names every other fault.
    """
    faults = []
    for name, shape in shapes.items():
        if name not in tensors:
            continue
        value = tensors[name]
        if tuple(value.shape) != shape or not is_real(value.dtype):
            kind = str(value.dtype).removeprefix("torch.")
            faults.append(f"{name} is {kind} {list(value.shape)}, not {list(shape)}")
    if faults:
        raise CheckpointInvalid(
            f"{tensors.where}: expected {expected}, found {len(faults)} that do not fit: {'; '.join(faults)}"
        )


def load_foreign(
    module: M,
    recipe: Mapping[str, From],
    tensors: Tensors,
    unused: Iterable[str] = (),
) -> M:
    """Fill `module`, made on the meta device, with `tensors` in the precision that they are stored in.

    Only float8 is widened, to float16. `recipe` has an entry for every tensor of the module's state; `unused` names foreign
    tensors that a known format holds and we do not need. Raises CheckpointInvalid, whose message lists every tensor that is
    missing, unknown, of another shape or no float.
    """
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    assert recipe.keys() == wanted.keys(), sorted(recipe.keys() ^ wanted.keys())
    needed = {name for made in recipe.values() for name in made.names}
    faults = [f"{name} missing" for name in sorted(needed - tensors.keys())]
    faults += [f"{name} unknown" for name in sorted(tensors.keys() - needed - set(unused))]
    state: dict[str, Tensor] = {}
    if not faults:
        for name, made in recipe.items():
            value = made.make(*(tensors[foreign] for foreign in made.names))
            value = value.half() if value.dtype in FLOAT8 else value
            if value.shape != wanted[name]:
                faults.append(f"{made.names[0]} gives {list(value.shape)}, not {list(wanted[name])}")
            elif value.dtype not in STORED:
                faults.append(f"{made.names[0]} is {value.dtype}, not a float of 32 or 16 bits")
            else:
                # Without `data` a buffer may be a view, which torch cannot export once its precision is changed in place.
                state[name] = value.data
    if faults:
        raise CheckpointInvalid(
            f"{tensors.where}: expected the {len(needed)} tensors of this model, found {len(faults)} that do not fit: "
            f"{'; '.join(faults)}"
        )
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)
