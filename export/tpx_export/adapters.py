"""Files of thinking adapters, `tpx.safetensors`, which turn a base model into a thinking model.

The file's metadata holds, under `tpx`, the JSON text {"format": "tpx-adapters", "version": 1, "spec": {ThinkingSpec},
"width": D, "base": name, "training": {...}}; its tensors are `blocks.N.thinking.*`. A base is an MMDiT, a DiT, or any other
module with a `spec` that has `width` and `thinking`, and with `blocks` that each have a `thinking`.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model.thinking import Thinking, ThinkingSpec
from tpx_export.precision import STORED_DTYPES, cast_weights
from tpx_export.tensor_files import write_safetensors
from tpx_runtime.errors import first_few, one_line, shorten
from tpx_runtime.typed_json import parse

FORMAT, VERSION = "tpx-adapters", 1
FILE = "tpx.safetensors"

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class AdapterInfo:
    """The header of an adapter file besides its specification: the base's width and name, and how it was trained."""

    width: int
    base: str
    training: dict[str, Any] = field(default_factory=dict)


class Adapters(NamedTuple):
    """The contents of an adapter file; `state` is keyed by the names in the file."""

    thinking: ThinkingSpec
    state: dict[str, Tensor]
    info: AdapterInfo


def attach(
    model: M,
    thinking: ThinkingSpec,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> M:
    """Attach thinking adapters to `model`, replacing any that it has, and return it.

    Other parameters do not change. Without a state the adapters are newly initialised, and the model's output is exactly the
    base's. They are of type `dtype`, or that of the blocks if None; gates are float32. New parameters require gradients
    according to ThinkingSpec. Raises CheckpointInvalid for blocks that the model does not have, and for a state that does
    not fit its width or the spec.
    """
    base: Any = model
    blocks, width = base.blocks, base.spec.width
    if thinking.blocks[-1] >= len(blocks):
        raise CheckpointInvalid(
            f"expected thinking blocks within 0..{len(blocks) - 1}, found {list(thinking.blocks)}; "
            "these adapters are for another base"
        )
    if state is not None:
        _check(state, thinking, width, f"thinking adapters for a base of width {width}")
    example = next(value for name, value in blocks[0].named_parameters() if not name.startswith("thinking."))
    for index, block in enumerate(blocks):
        block.thinking = None
        if index not in thinking.blocks:
            continue
        adapter = Thinking(width, thinking)
        if state is not None:
            prefix = _prefix(index)
            adapter.load_state_dict(
                {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            )
        cast_weights(adapter.to(example.device), dtype or example.dtype)
        block.thinking = adapter.train(model.training)
    base.spec = dataclasses.replace(base.spec, thinking=thinking)
    return model


def state_path(out: Path) -> Path:
    """The state of the training that writes its adapters to `out`."""
    return out.with_name(f"{out.name}.state.pt")


def save_adapters(model: nn.Module, path: Path, base: str, training: Mapping[str, Any] | None = None) -> None:
    """Write the thinking adapters of `model` atomically; `base` is the name of the model that they were trained on.

    Raises ValueError for a model without thinking blocks, BadInput for a path that cannot be written to.
    """
    spec: Any = model.spec
    if spec.thinking is None:
        raise ValueError("expected a model with thinking blocks, got one without")
    state = {name: value for name, value in model.state_dict().items() if ".thinking." in name}
    write_adapters(path, spec.thinking, state, AdapterInfo(spec.width, base, dict(training or {})))


def write_adapters(
    path: Path, thinking: ThinkingSpec, state: Mapping[str, Tensor], info: AdapterInfo
) -> None:
    """Like `save_adapters`, from a state dict instead of a model."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    spec = dataclasses.asdict(thinking)
    header = {"format": FORMAT, "version": VERSION, "spec": spec, **dataclasses.asdict(info)}
    write_safetensors(tensors, path, {"tpx": json.dumps(header)})


def load_adapters(path: Path) -> Adapters:
    """Read an adapter file, or `tpx.safetensors` in a folder. Raises CheckpointInvalid."""
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise CheckpointInvalid(f"{path}: expected thinking adapters, found none; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("tpx", "{}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = one_line(error, 120)
        raise CheckpointInvalid(
            f"{path}: expected a complete .safetensors file, found a truncated or damaged one ({reason}); copy it again"
        ) from None
    thinking, info = _parse_header(path, text)
    _check(state, thinking, info.width, str(path))
    return Adapters(thinking, state, info)


def _parse_header(path: Path, text: str) -> tuple[ThinkingSpec, AdapterInfo]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        kind = header.get("format") if isinstance(header, dict) else None
        found = f"a file of format {shorten(kind)}" if kind else "a file of another project"
        raise CheckpointInvalid(
            f"{path}: expected thinking adapters written by tpx_export.adapters, found {found}; check the path"
        )
    if header.get("version") != VERSION:
        raise CheckpointInvalid(
            f"{path}: expected adapters of version {VERSION}, found {shorten(header.get('version'))}; install the tpx that "
            "wrote them"
        )
    rest = {name: value for name, value in header.items() if name not in ("format", "version", "spec")}
    try:
        thinking = parse(ThinkingSpec, header.get("spec"), "spec.", "this tpx", defaults=True)
        info = parse(AdapterInfo, rest, "", "this tpx", defaults=True)
        if info.width < 1:
            raise ValueError(f"expected a width of 1 or more, found {info.width}")
    except (TypeError, ValueError) as error:
        raise CheckpointInvalid(
            f"{path}: expected a thinking specification, found an invalid one ({error})"
        ) from None
    return thinking, info


def _prefix(block: int) -> str:
    return f"blocks.{block}.thinking."


def _check(state: Mapping[str, Tensor], thinking: ThinkingSpec, width: int, where: str) -> None:
    """Check names, shapes and values of a state dict. Raises CheckpointInvalid, whose message has the first few faults."""
    try:
        with torch.device("meta"):
            example = Thinking(width, thinking).state_dict()
    except (RuntimeError, TypeError, OverflowError):  # larger than any tensor can be
        raise CheckpointInvalid(f"{where}: expected a thinking specification, found one too large") from None
    expected = {_prefix(block) + name: v.shape for block in thinking.blocks for name, v in example.items()}
    faults = [f"{name} missing" for name in sorted(expected.keys() - state.keys())]
    faults += [f"{name} unknown" for name in sorted(state.keys() - expected.keys())]
    for name in sorted(expected.keys() & state.keys()):
        value = state[name]
        if value.shape != expected[name]:
            faults.append(f"{name} is {list(value.shape)}, not {list(expected[name])}")
        elif value.dtype not in STORED_DTYPES:
            faults.append(
                f"{name} is {str(value.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
            )
        elif not torch.isfinite(value).all():
            faults.append(f"{name} has NaN or infinity")
    if faults:
        raise CheckpointInvalid(
            f"{where}: expected the {len(expected)} tensors of its specification, found {len(faults)} that do not fit: "
            f"{first_few(faults)}"
        )
