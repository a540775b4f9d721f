"""Where the parts of a published model are: its own folder or file, and a folder of components for what it lacks."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tpx_export.base.tensors import FLOAT8
from tpx_export.checkpoint import CheckpointInvalid


@dataclass(frozen=True)
class Sources:
    """The model's path, and a diffusers folder with the parts that it lacks."""

    path: Path
    components: Path | None

    def find(self, name: str, file: str) -> Path | None:
        """The first folder `name` that holds `file`; the root itself counts where it is that part alone."""
        for root in self._roots:
            if (root / name / file).exists():
                return root / name
        return None

    def folder(self, name: str, hint: str = "") -> Path:
        """The folder of a part that has a config.json. Raises CheckpointInvalid."""
        if found := self.find(name, "config.json"):
            return found
        own = self.path / "config.json"
        if name == "transformer" and own.exists():
            return self.path
        raise self._missing(f"{name}/config.json", hint)

    def any_folder(self, name: str) -> Path:
        """A folder of that name, whatever it holds. Raises CheckpointInvalid."""
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
            f"expected {name}, found none in {places}; name a diffusers folder that has it with --components"
            f"{' ' * bool(hint)}{hint}"
        )


def name_of(path: Path) -> str:
    """A name for the bundle of the model in that file or folder."""
    # A file in Hugging Face's cache is a link to one that is named by its hash; a folder may be given as ".".
    stem = path.resolve().name if path.is_dir() else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "model"


def precision_of(dtype: torch.dtype) -> str:
    """The bundle's precision for weights that are stored so; bfloat16 keeps its range in float32, float8 fits float16."""
    return "fp16" if dtype in (torch.float16, *FLOAT8) else "fp32"
