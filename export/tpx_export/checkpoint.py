"""Checkpoints: a model and its specification in one file, `.safetensors` or `.pt`.

Both hold a header {"format": "tpx-model", "version": 2, "model": "text-to-image", "spec": {...}} and the tensors by name.
Tensors may be float16 or bfloat16 on disk and are float32 in memory. Reading executes no code: `.pt` is read with
weights_only=True, and files of other formats are rejected.
"""

import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpx_export.model.class_to_image import ClassToImage, ClassToImageSpec
from tpx_export.model.text_to_image import TextToImage, TextToImageSpec
from tpx_export.precision import STORED_DTYPES
from tpx_export.tensor_files import write_safetensors, write_torch
from tpx_runtime.errors import TpxError, one_line, shorten
from tpx_runtime.typed_json import parse

FORMAT, VERSION = "tpx-model", 2
SUFFIXES = (".safetensors", ".pt")
Model = TextToImage | ClassToImage
# The first is that of a header without "model".
MODELS: dict[str, tuple[type[Any], type[Model]]] = {
    "text-to-image": (TextToImageSpec, TextToImage),
    "class-to-image": (ClassToImageSpec, ClassToImage),
}


class CheckpointInvalid(TpxError):
    """A file that is not a valid TPX checkpoint, is damaged, or has another version."""

    exit_code = 6


def save(model: Model, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint atomically, its tensors as `dtype`. Raises BadInput, and ValueError for another suffix."""
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    (kind,) = (name for name, (_, model_class) in MODELS.items() if isinstance(model, model_class))
    header = {"format": FORMAT, "version": VERSION, "model": kind, "spec": dataclasses.asdict(model.spec)}
    if path.suffix == ".safetensors":
        write_safetensors(state, path, {"tpx": json.dumps(header)})
    elif path.suffix == ".pt":
        write_torch({"header": json.dumps(header), "state": state}, path)
    else:
        raise ValueError(f"expected a file name ending in {' or '.join(SUFFIXES)}, got {path.name}")


def load(path: Path) -> Model:
    """Read a checkpoint into a model in evaluation mode. Raises CheckpointInvalid."""
    if path.is_dir():
        raise CheckpointInvalid(
            f"{path}: expected a checkpoint file, found a folder; export a diffusers model with tpx-export --base"
        )
    if not path.is_file():
        raise CheckpointInvalid(f"{path}: expected a checkpoint file, found none; check the path")
    if path.suffix not in SUFFIXES:
        raise CheckpointInvalid(
            f"{path}: expected a file ending in {' or '.join(SUFFIXES)}, found {path.suffix or 'none'}"
        )
    header, state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    model = _build_model(path, header)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    if expected != found:
        names = expected.keys() | found.keys()
        different = sorted(name for name in names if expected.get(name) != found.get(name))
        first = different[0]
        raise CheckpointInvalid(
            f"{path}: expected the {len(expected)} tensors of its specification, found {len(different)} missing, unknown or "
            f"of another shape, first {first} (expected {_shape(expected.get(first))}, found {_shape(found.get(first))})"
        )
    if other := sorted(name for name, value in state.items() if value.dtype not in STORED_DTYPES):
        raise CheckpointInvalid(
            f"{path}: expected weights in float32, float16 or bfloat16, found {state[other[0]].dtype} in {other[0]}; save "
            "it again with tpx_export.checkpoint.save"
        )
    if not_finite := sorted(name for name, value in state.items() if not torch.isfinite(value).all()):
        raise CheckpointInvalid(
            f"{path}: expected finite weights, found NaN or infinity in {not_finite[0]}; train it again"
        )
    try:
        model = type(model)(model.spec)  # type: ignore[arg-type]
    except RuntimeError as error:  # the tables of positions, which are not in the file, may be of any size
        raise CheckpointInvalid(_invalid_spec(path, error)) from None
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval().requires_grad_(False)


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("tpx")
            if header is None:
                raise CheckpointInvalid(_foreign(path, "safetensors of another project"))
            return json.loads(header), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise CheckpointInvalid(_damaged(path, error)) from None


def _read_pt(path: Path) -> tuple[Any, dict[str, Tensor]]:
    try:
        # torch warns about unknown pickles before it rejects them; one message is enough.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointInvalid(
            f"{path}: expected only tensors, found a pickle that is damaged or would execute code; nothing was executed, "
            "convert it to .safetensors on a machine where you trust it"
        ) from None
    except (
        Exception
    ) as error:  # for bytes that are not a pickle the unpickler may raise anything, even IndexError
        raise CheckpointInvalid(_damaged(path, error)) from None
    if (
        not isinstance(saved, dict)
        or set(saved) != {"header", "state"}
        or not isinstance(saved["header"], str)
    ):
        raise CheckpointInvalid(_foreign(path, "a .pt file of another project"))
    try:
        header = json.loads(saved["header"])
    except (ValueError, RecursionError) as error:
        raise CheckpointInvalid(_damaged(path, error)) from None
    state = saved["state"]
    if not is_state(state):
        raise CheckpointInvalid(_foreign(path, "a state that is not dense tensors by name"))
    return header, state


def is_header(text: object) -> bool:
    """Whether `text`, from the header of any file, is the JSON of a TPX checkpoint's, of any version."""
    try:
        header = json.loads(text)  # type: ignore[arg-type]
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(header, dict) and header.get("format") == FORMAT


def is_state(value: object) -> TypeGuard[dict[str, Tensor]]:
    """Whether `value` is tensors by name that have values to compute with: not sparse, nested or meta tensors."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(part, Tensor) and _is_dense(part) for name, part in value.items()
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"


def _foreign(path: Path, found: str) -> str:
    return (
        f"{path}: expected a checkpoint written by tpx_export.checkpoint.save, found {found}; "
        "see docs/checkpoint.md for the format"
    )


def _damaged(path: Path, error: Exception) -> str:
    reason = one_line(error, 120)
    return f"{path}: expected a complete {path.suffix} file, found a truncated or damaged one ({reason}); copy it again"


def _invalid_spec(path: Path, error: Exception) -> str:
    return f"{path}: expected a model specification, found an invalid one ({one_line(error, 120)})"


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))


def _build_model(path: Path, header: Any) -> Model:
    """The model that a header describes, with meta tensors: a damaged specification may ask for any amount of memory.

    Raises CheckpointInvalid.
    """
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointInvalid(_foreign(path, "another header"))
    version = header.get("version")
    if version not in (1, VERSION):
        raise CheckpointInvalid(
            f"{path}: expected checkpoint version {VERSION}, found {version!r}; install the tpx that wrote it"
        )
    kind = header.get("model", "text-to-image")
    if not isinstance(kind, str) or kind not in MODELS:
        raise CheckpointInvalid(f"{path}: expected a model of {', '.join(MODELS)}, found {shorten(kind)}")
    spec_class, model_class = MODELS[kind]
    try:
        if version == 1:
            _upgrade(header["spec"])
        spec = parse(spec_class, header["spec"], "spec.", "this tpx", defaults=True)
        with torch.device("meta"):
            return model_class(spec)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointInvalid(_invalid_spec(path, error)) from None


def _upgrade(spec: dict[str, Any]) -> None:
    """Convert in place the specification of version 1, where sizes were one number and the autoencoder had one too.

    Raises ValueError if the two do not agree.
    """
    pixels, transformer = spec["autoencoder"].pop("image_size_px", None), spec["transformer"]
    if "latent_size" in transformer:
        side = transformer["latent_size"]
        if pixels not in (None, 8 * side):
            raise ValueError(f"expected image_size_px {8 * side}, found {shorten(pixels)}")
        transformer["latent_size"] = [side, side]
