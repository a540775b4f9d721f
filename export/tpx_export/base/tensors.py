"""Tensors of foreign checkpoints by name, each read on access."""

import argparse
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpx_export.base.foreign_json import read_object
from tpx_export.checkpoint import CheckpointInvalid, is_header, is_state
from tpx_runtime.errors import one_line

Reader = Callable[[], Tensor]

_SHARD = re.compile(r"-\d+-of-\d+")
_STEMS = ("diffusion_pytorch_model.", "model.")

# Types that are not computed in here; float16 represents them exactly.
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Tensors(Mapping[str, Tensor]):
    """Name -> tensor; a tensor is read (or mapped into memory) on access, and not cached. `path` is for error messages."""

    def __init__(self, path: Path, readers: Mapping[str, Reader]) -> None:
        self.path = path
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def with_prefix(self, prefix: str) -> "Tensors":
        """The tensors whose names start with `prefix`, under their names without it."""
        found = {name: reader for name, reader in self._readers.items() if name.startswith(prefix)}
        return Tensors(self.path, {name.removeprefix(prefix): reader for name, reader in found.items()})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor."""
        dtypes = (self[name].dtype for name in self)
        return next(dtype for dtype in dtypes if dtype.is_floating_point)


def open_tensors(path: Path) -> Tensors:
    """Open a .safetensors file, a .pt or .pth file that holds only tensors, or a folder of one model in .safetensors.

    A folder may be sharded (*.safetensors.index.json). If it has several files, one with a name of diffusers or transformers
    is used; if it has several variants (model.safetensors and model.fp16.safetensors), the one without a variant; of sharded
    ones, the first that is complete. Raises CheckpointInvalid.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise CheckpointInvalid(f"{path}: expected a checkpoint, found none; check the path")
    if path.suffix == ".safetensors":
        return Tensors(path, _safetensors(path))
    if path.suffix in (".pt", ".pth"):
        return Tensors(path, _pickled(path))
    raise CheckpointInvalid(
        f"{path}: expected a folder or a file ending in .safetensors, .pt or .pth, found {path.suffix or 'none'}"
    )


def _folder(path: Path) -> Tensors:
    files, error = _sharded(path)
    # Without an index, even the names of shards are taken for those of variants.
    whole = [p.name for p in path.glob("*.safetensors") if error is None or not _SHARD.search(p.name)]
    files = files or sorted(whole, key=lambda name: (not name.startswith(_STEMS), len(name), name))[:1]
    if not files:
        raise error or CheckpointInvalid(
            f"{path}: expected .safetensors files, found none; save the model with safe_serialization=True"
        )
    readers: dict[str, Reader] = {}
    for name in files:
        readers |= _safetensors(path / name)
    return Tensors(path, readers)


def _sharded(path: Path) -> tuple[list[str], CheckpointInvalid | None]:
    """The files of the first index whose files are all there; if there is none, the error of the first index, if any."""
    error = None
    for index in sorted(path.glob("*.safetensors.index*.json"), key=lambda p: (len(p.name), p.name)):
        try:
            return _files_of(index), None
        except CheckpointInvalid as invalid:
            error = error or invalid
    return [], error


def _files_of(index: Path) -> list[str]:
    """The files that an index names. Raises CheckpointInvalid if it is damaged or one of them is missing."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointInvalid(f"{index}: expected JSON with a weight_map, found none; copy it again")
    files = sorted(set(names.values()))
    if absent := [name for name in files if not (index.parent / name).is_file()]:
        raise CheckpointInvalid(
            f"{index.parent}: expected the {len(files)} files of {index.name}, found {absent[0]} missing; copy it again"
        )
    return files


def _safetensors(path: Path) -> dict[str, Reader]:
    try:
        file = safe_open(path, framework="pt")
        _reject_tpx_checkpoint(path, (file.metadata() or {}).get("tpx"))
        return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, struct.error) as error:
        raise CheckpointInvalid(
            f"{path}: expected a complete .safetensors file, found a truncated or damaged one ({error}); copy it again"
        ) from None


def _reject_tpx_checkpoint(path: Path, header: object) -> None:
    if is_header(header):
        raise CheckpointInvalid(
            f"{path}: expected a published model, found a checkpoint of TPX; export it with tpx-export --ckpt"
        )


def _pickled(path: Path) -> dict[str, Reader]:
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # DiT's training script saves its arguments
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle may raise anything
        reason = one_line(re.sub(r"\x1b\[[0-9;]*m", "", str(error)), 120)
        raise CheckpointInvalid(
            f"{path}: expected a file that holds only tensors, found another ({reason})"
        ) from None
    if isinstance(state, dict):
        _reject_tpx_checkpoint(path, state.get("header"))
    for key in ("ema", "model", "state_dict"):  # keys of training scripts; sampling uses the EMA
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not is_state(state):
        raise CheckpointInvalid(
            f"{path}: expected dense tensors by name, found something else; save the model's state_dict"
        )

    def reader(value: Tensor) -> Reader:
        return lambda: value

    return {name: reader(value) for name, value in state.items()}
