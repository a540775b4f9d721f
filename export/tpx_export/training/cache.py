"""A cache of latents and text embeddings on disk: one .safetensors file per entry, named by a hash of its source."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tpx_export.tensor_files import write_safetensors
from tpx_runtime.errors import BadInput
from tpx_runtime.files import make_folder

_VERSION = 1  # increase it when the content of entries or its computation changes


def key(*parts: object) -> str:
    """The name of an entry whose content depends only on `parts`."""
    text = "\0".join(map(str, (_VERSION, *parts)))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:40]


@dataclass(frozen=True)
class Cache:
    """Entries by key in a folder, which is created with the first entry. It can be deleted at any time."""

    folder: Path

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def get(self, name: str) -> dict[str, Tensor]:
        """The tensors of an entry as float32. Raises BadInput for an entry that is missing or damaged."""
        try:
            return {part: value.float() for part, value in load_file(self._path(name)).items()}
        except (SafetensorError, OSError):
            raise BadInput(
                f"expected a cached encoding in {self._path(name)}, found it missing or damaged; delete the folder "
                f"{self.folder} and run the same command"
            ) from None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors atomically, as float16 if no value overflows it. Raises BadInput."""
        path = self._path(name)
        if not path.parent.is_dir():
            make_folder(path.parent)
        write_safetensors({part: _to_half(value) for part, value in tensors.items()}, path)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"


def _to_half(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    half = value.half()
    return half if torch.isfinite(half).all() else value
