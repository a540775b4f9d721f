"""Merges LoRA files of Stable Diffusion 3 into its weights: W + scale * alpha / rank * B A (Hu et al., arXiv 2106.09685).

    Lora.parts: part ─▶ layer ─▶ Pair(A, B, factor)        merged_into(load) ─▶ a function that loads the part and adds them

| names in a file | layers are named as in | written by |
|---|---|---|
| transformer.LAYER.lora_{A,B}.weight, text_encoder{,_2,_3}.LAYER... | diffusers, transformers | diffusers and peft |
| diffusion_model.LAYER.lora_{A,B}.weight | the original file | other trainers |
| lora_unet_LAYER.lora_{down,up}.weight, lora_te{1,2,3}_LAYER..., .alpha | the same, with _ for . | sd-scripts |

A layer is found under its diffusers or original name, whichever of them the file and the base use.
"""

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tpx_export.base.conversion import Conversion
from tpx_export.base.foreign_json import parse_object
from tpx_export.base.tensors import open_tensors
from tpx_export.checkpoint import CheckpointInvalid
from tpx_runtime.errors import BadInput, first_few

M = TypeVar("M", bound=nn.Module)

_PARTS = {
    "transformer.": "transformer",
    "diffusion_model.": "transformer",
    "model.diffusion_model.": "transformer",
    "lora_unet_": "transformer",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_TENSOR = re.compile(
    r"(?P<layer>.+)\.(?:(?P<A>lora_A|lora_down)\.weight|(?P<B>lora_B|lora_up)\.weight|alpha)"
)
_METADATA = "lora_adapter_metadata"  # JSON that diffusers writes: "PART.lora_alpha" and other fields of peft's LoraConfig


class UnusedLoraWarning(UserWarning):
    """A LoRA file also changes a part that the exported model does not have, such as T5 with --no-t5."""


class Pair(NamedTuple):
    """The change of one layer: A [rank, inputs...] and B [outputs, rank...] in their stored type, and a factor for B A."""

    a: Tensor
    b: Tensor
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the layer; a convolution's kernel is flattened into the inputs."""
        return self.b.shape[0], math.prod(self.a.shape[1:])

    def delta(self) -> Tensor:
        """factor * B A, float32 [outputs, inputs]."""
        return self.b.flatten(1).float() @ self.a.flatten(1).float() * self.factor


@dataclass(frozen=True)
class Lora:
    """A LoRA file: its pairs by part of the pipeline and by the layer's name there, with _ for every dot."""

    path: Path
    parts: Mapping[str, Mapping[str, Pair]]


def open_lora(path: Path, scale: float = 1.0) -> Lora:
    """Read a LoRA in .safetensors, whose factors are multiplied by `scale`.

    The factor is alpha / rank, or alpha / sqrt(rank) if the file's metadata say so; without an alpha it is 1. Raises
    CheckpointInvalid for a file that is missing, damaged or of another kind (LoHa, LoKr, DoRA), BadInput for a scale that is
    not finite.
    """
    if not math.isfinite(scale):
        raise BadInput(f"expected a finite scale of {path}, found {scale}")
    if path.suffix != ".safetensors" or not path.is_file():
        raise CheckpointInvalid(
            f"{path}: expected a LoRA file ending in .safetensors, found none; check the path"
        )
    tensors, metadata = open_tensors(path), _metadata(path)
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    faults = []
    for name in tensors:
        match, prefix = _TENSOR.fullmatch(name), next((p for p in _PARTS if name.startswith(p)), None)
        if match is None or prefix is None:
            faults.append(f"{name} unknown")
            continue
        kind = "a" if match["A"] else "b" if match["B"] else "alpha"
        found[_PARTS[prefix], match["layer"].removeprefix(prefix)][kind] = name
    parts: dict[str, dict[str, Pair]] = defaultdict(dict)
    for (part, layer), names in found.items():
        try:
            pair = _pair({kind: tensors[name] for kind, name in names.items()}, metadata, part, layer)
        except ValueError as fault:
            faults.append(f"{part} {layer} {fault}")
            continue
        parts[part][_key(layer)] = pair._replace(factor=scale * pair.factor)
    if faults or not parts:
        raise _invalid(
            path, "expected pairs of lora_A and lora_B, or lora_down and lora_up", faults or ["none"]
        )
    return Lora(path, dict(parts))


def merged_into(
    part: str,
    load: Callable[[], M],
    loras: Sequence[Lora],
    example: Callable[[], nn.Module],
    tables: Sequence[Mapping[str, Conversion]],
) -> Callable[[], M]:
    """A function that loads a part of the pipeline and adds all LoRAs' pairs for it, in float32 and then rounded.

    `example` makes a module like the loaded one, for its shapes; each of `tables` converts to it from one way of naming the
    layers. Raises CheckpointInvalid at once, before anything is loaded, for layers that are unknown or of other shapes.
    """
    used = [lora for lora in loras if part in lora.parts]
    if not used:
        return load
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in example().named_parameters()}
    additions = [addition for lora in used for addition in _additions(lora, part, shapes, tables)]

    def load_and_merge() -> M:
        module = load()
        parameters = dict(module.named_parameters())
        for name, delta in additions:
            weight = parameters[name]
            weight.data = delta().reshape(weight.shape).add_(weight).to(weight.dtype)
        return module

    return load_and_merge


def warn_of_unused(loras: Sequence[Lora], parts: Sequence[str]) -> None:
    """Issue an UnusedLoraWarning for each part that a LoRA changes and the model does not have."""
    for lora in loras:
        if unused := sorted(lora.parts.keys() - set(parts)):
            warnings.warn(
                f"{lora.path} also changes {', '.join(unused)}, which this model is exported without",
                UnusedLoraWarning,
                stacklevel=3,
            )


def _additions(
    lora: Lora, part: str, shapes: Mapping[str, torch.Size], tables: Sequence[Mapping[str, Conversion]]
) -> list[tuple[str, Callable[[], Tensor]]]:
    """Our tensors that a LoRA changes, each with a function that computes the change."""
    left, faults = dict(lora.parts[part]), []
    additions: list[tuple[str, Callable[[], Tensor]]] = []
    for table in tables:
        for ours, conversion in table.items():
            names = [_key(name.removesuffix(".weight")) for name in conversion.names]
            pairs = [left.pop(name, None) for name in names]
            if not any(pairs):
                continue
            shape = (shapes[ours][0] // len(names), math.prod(shapes[ours][1:]))
            for name, pair in zip(names, pairs, strict=True):
                if pair and pair.shape != shape:
                    faults.append(f"{name} changes {list(pair.shape)}, not {list(shape)}")
            additions.append((ours, _Change(conversion, pairs, shape)))
    faults += [f"{name} unknown" for name in left]
    if faults:
        raise _invalid(lora.path, f"expected layers of this model's {part}", faults)
    return additions


@dataclass(frozen=True)
class _Change:
    """The change of one of our tensors; foreign layers without a pair, such as k of q, k and v, do not change."""

    conversion: Conversion
    pairs: Sequence[Pair | None]
    shape: tuple[int, int]

    def __call__(self) -> Tensor:
        deltas = (pair.delta() if pair else torch.zeros(self.shape) for pair in self.pairs)
        return self.conversion.convert(*deltas)


def _key(layer: str) -> str:
    return layer.replace(".", "_")


def _metadata(path: Path) -> dict[str, Any]:
    """The settings that diffusers stored with the LoRA; empty if there are none. Raises CheckpointInvalid."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_METADATA, "{}")
    return parse_object(f"{path}, {_METADATA}", text)


def _pair(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], part: str, layer: str) -> Pair:
    """The pair of a layer from its tensors a, b and alpha. Raises ValueError."""
    if not {"a", "b"} <= tensors.keys():
        raise ValueError(f"has only {' and '.join(tensors)}")
    a, b = tensors["a"], tensors["b"]
    rank = a.shape[0] if a.ndim > 1 else 0
    if not rank or b.ndim < 2 or math.prod(b.shape[1:]) != rank:
        raise ValueError(f"has an A of {list(a.shape)} and a B of {list(b.shape)}")
    alpha = tensors.get("alpha", _stored_alpha(metadata, part, layer, rank))
    try:
        factor = float(alpha) / (math.sqrt(rank) if metadata.get(f"{part}.use_rslora") else rank)
    except (TypeError, ValueError):
        raise ValueError("has an alpha that is no number") from None
    return Pair(a, b, factor)


def _stored_alpha(metadata: Mapping[str, Any], part: str, layer: str, rank: int) -> Any:
    """The alpha of a layer in the settings of peft, whose alpha_pattern has ends of names; the rank if it is not there."""
    pattern = metadata.get(f"{part}.alpha_pattern")
    for name, alpha in pattern.items() if isinstance(pattern, dict) else ():
        if f".{layer}".endswith(f".{name}"):
            return alpha
    return metadata.get(f"{part}.lora_alpha", rank)


def _invalid(path: Path, expected: str, faults: Sequence[str]) -> CheckpointInvalid:
    return CheckpointInvalid(f"{path}: {expected}, found {first_few(faults)}; use a LoRA of this model")
