"""Checkpoints: a model and its specification in one file, `.safetensors` or `.pt`.

Both hold a header {"format": "tpx-model", "version": 1, "model": "text-to-image", "spec": {...}} and the tensors by name;
tensors may be float16 on disk and are float32 in memory. Reading runs no code: `.pt` is read with weights_only=True, and
what is not ours is refused.
"""

import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tpx_export.model.class_to_image import ClassToImage, ClassToImageSpec
from tpx_export.model.text_to_image import TextToImage, TextToImageSpec
from tpx_runtime.errors import TpxError, shorten
from tpx_runtime.files import atomic_file
from tpx_runtime.typed_json import parse

FORMAT, VERSION = "tpx-model", 1
SUFFIXES = (".safetensors", ".pt")
Model = TextToImage | ClassToImage
MODELS: dict[str, tuple[type[Any], type[Model]]] = {  # a header that names none is of the first
    "text-to-image": (TextToImageSpec, TextToImage),
    "class-to-image": (ClassToImageSpec, ClassToImage),
}


class CheckpointInvalid(TpxError):
    """A file that is not a checkpoint of ours, is damaged, or is of another version."""

    exit_code = 6


def save(model: Model, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint whole or not at all; `dtype` is the tensors' on disk. Raises ValueError for another suffix."""
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    (kind,) = (name for name, (_, made) in MODELS.items() if isinstance(model, made))
    header = {"format": FORMAT, "version": VERSION, "model": kind, "spec": dataclasses.asdict(model.spec)}
    with atomic_file(path) as part:
        if path.suffix == ".safetensors":
            save_file(state, part, metadata={"tpx": json.dumps(header)})
        elif path.suffix == ".pt":
            torch.save({"header": json.dumps(header), "state": state}, part)
        else:
            raise ValueError(f"expected a file name ending in {' or '.join(SUFFIXES)}, got {path.name}")


def load(path: Path) -> Model:
    """Read a checkpoint into a model in evaluation mode. Raises CheckpointInvalid."""
    if not path.is_file():
        raise CheckpointInvalid(f"{path}: expected a checkpoint file, found none; check the path")
    if path.suffix not in SUFFIXES:
        raise CheckpointInvalid(
            f"{path}: expected a file ending in {' or '.join(SUFFIXES)}, found {path.suffix or 'none'}"
        )
    header, state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    model = _fresh(path, header)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        first = odd[0]
        raise CheckpointInvalid(
            f"{path}: expected the {len(wanted)} tensors of its specification, found {len(odd)} missing, unknown or of "
            f"another shape, first {first} (expected {_shape(wanted.get(first))}, found {_shape(found.get(first))})"
        )
    if bad := sorted(name for name, value in state.items() if not torch.isfinite(value).all()):
        raise CheckpointInvalid(
            f"{path}: expected finite weights, found NaN or infinity in {bad[0]}; train it again"
        )
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval().requires_grad_(False)


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("tpx")
            if header is None:
                raise CheckpointInvalid(_foreign(path, "safetensors of another project"))
            return json.loads(header), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointInvalid(_broken(path, error)) from None


def _read_pt(path: Path) -> tuple[Any, dict[str, Tensor]]:
    try:
        # torch warns about foreign pickles before it refuses them; one line is enough.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointInvalid(
            f"{path}: expected tensors alone, found a pickle that is damaged or would run code; it was not run, "
            "convert it to .safetensors where you trust it"
        ) from None
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything, IndexError too
        raise CheckpointInvalid(_broken(path, error)) from None
    if (
        not isinstance(saved, dict)
        or set(saved) != {"header", "state"}
        or not isinstance(saved["header"], str)
    ):
        raise CheckpointInvalid(_foreign(path, "a .pt file of another project"))
    try:
        header = json.loads(saved["header"])
    except ValueError as error:
        raise CheckpointInvalid(_broken(path, error)) from None
    state = saved["state"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointInvalid(_foreign(path, "a state that is not tensors by name"))
    return header, state


def _foreign(path: Path, found: str) -> str:
    return (
        f"{path}: expected a checkpoint written by tpx_export.checkpoint.save, found {found}; "
        "see docs/checkpoint.md for what it holds"
    )


def _broken(path: Path, error: Exception) -> str:
    said = " ".join(str(error).split())[:120]
    return f"{path}: expected a whole {path.suffix} file, found one that is truncated or damaged ({said}); copy it again"


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))


def _fresh(path: Path, header: Any) -> Model:
    """The model that a header describes, before its weights are loaded."""
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointInvalid(_foreign(path, "another header"))
    if header.get("version") != VERSION:
        raise CheckpointInvalid(
            f"{path}: expected checkpoint version {VERSION}, found {header.get('version')!r}; install the tpx that wrote it"
        )
    kind = header.get("model", "text-to-image")
    if not isinstance(kind, str) or kind not in MODELS:
        raise CheckpointInvalid(f"{path}: expected a model of {', '.join(MODELS)}, found {shorten(kind)}")
    spec, made = MODELS[kind]
    try:
        return made(parse(spec, header["spec"], "spec.", "this tpx", defaults=True))
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointInvalid(
            f"{path}: expected a model specification, found one that does not fit ({error})"
        ) from None
