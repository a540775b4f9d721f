"""Finds the parts of a published model in its own folder or file, and in a folder of components."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tpx_export.base.foreign_json import read_object
from tpx_export.base.tensors import FLOAT8
from tpx_export.checkpoint import CheckpointInvalid

INDEX = "model_index.json"  # of a diffusers pipeline


@dataclass(frozen=True)
class ModelFiles:
    """The model's path, a diffusers folder with its missing parts, and that of an autoencoder to use instead of its own."""

    path: Path
    components: Path | None
    vae: Path | None = None

    def find(self, name: str, file: str) -> Path | None:
        """The first folder `name` that contains `file`, or None."""
        for root in self._roots:
            if (root / name / file).exists():
                return root / name
        return None

    def component_folder(self, name: str, hint: str = "") -> Path:
        """The folder of a part with a config.json; for "transformer" the model's own folder may be it.

        Raises CheckpointInvalid.
        """
        if found := self.find(name, "config.json"):
            return found
        if name == "transformer" and (self.path / "config.json").exists():
            return self.path
        raise self._missing(f"{name}/config.json", hint)

    def saved_without(self, name: str) -> bool:
        """Whether a pipeline's index says that it has no part of that name, and no other folder has it.

        Raises CheckpointInvalid for an index that is not JSON.
        """
        indices = {root: root / INDEX for root in self._roots}
        without = [
            root
            for root, index in indices.items()
            if index.exists() and read_object(index).get(name) == [None, None]
        ]
        others = (root for root in self._roots if root not in without)
        return bool(without) and not any((root / name).exists() for root in others)

    def any_folder(self, name: str) -> Path:
        """The first folder of that name, whatever it contains. Raises CheckpointInvalid."""
        for root in self._roots:
            if (root / name).is_dir():
                return root / name
        raise self._missing(f"{name}/", "")

    @property
    def _roots(self) -> list[Path]:
        return [root for root in (self.path, self.components) if root is not None and root.is_dir()]

    def _missing(self, name: str, hint: str) -> CheckpointInvalid:
        places = ", nor in ".join(str(root) for root in (self.path, self.components) if root is not None)
        return CheckpointInvalid(
            f"expected {name}, found none in {places}; give a diffusers folder that has it with --components"
            f"{' ' * bool(hint)}{hint}"
        )


def name_of(path: Path) -> str:
    """A bundle name for the model in that file or folder."""
    # A file in Hugging Face's cache is a link to a file named by its hash; a folder may be ".".
    folder = path.resolve()
    stem = folder.name if path.is_dir() else path.stem
    # A snapshot in that cache is models--OWNER--NAME/snapshots/HASH.
    if path.is_dir() and folder.parent.name == "snapshots" and folder.parts[-3].startswith("models--"):
        stem = folder.parts[-3].split("--")[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "model"


def precision_of(dtype: torch.dtype) -> str:
    """The bundle's precision for weights of that type: bfloat16 needs float32 for its range, float8 fits in float16."""
    return "fp16" if dtype in (torch.float16, *FLOAT8) else "fp32"
