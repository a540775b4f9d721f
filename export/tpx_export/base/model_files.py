"""Finds the parts of a published model in its own folder or file, and in a folder of components."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tpx_export.base.tensors import FLOAT8
from tpx_export.checkpoint import CheckpointInvalid


@dataclass(frozen=True)
class ModelFiles:
    """The model's path, and a diffusers folder with its missing parts."""

    path: Path
    components: Path | None

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
    stem = path.resolve().name if path.is_dir() else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "model"


def precision_of(dtype: torch.dtype) -> str:
    """The bundle's precision for weights of that type: bfloat16 needs float32 for its range, float8 fits in float16."""
    return "fp16" if dtype in (torch.float16, *FLOAT8) else "fp32"
