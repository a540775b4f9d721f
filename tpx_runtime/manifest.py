"""The manifest of a bundle: its facts as frozen dataclasses, read and written here and nowhere else.

The format is described in docs/bundle.md. `tpx_export` builds a `Manifest` and writes `to_json()`; the
runtime and the engines read it with `from_json()`, which refuses whatever it does not understand.
"""

import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from types import GenericAlias
from typing import Any, TypeVar, get_args, get_type_hints

from .errors import BundleInvalid, shorten
from .samplers import SAMPLERS, TRAIN_TIMESTEPS

FORMAT = "tpx-bundle"
FORMAT_VERSION = 1
PARTS = ("text_encoder", "transformer", "vae_decoder")

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSpec:
    """Sizes that the graphs fix. Sizes of two are (height, width); `experts` is 0 without thinking blocks."""

    latent_channels: int
    latent_size: tuple[int, int]
    image_size_px: tuple[int, int]
    text_tokens: int
    context_width: int
    pooled_width: int
    visual_tokens: int
    depths: tuple[int, ...]
    experts: int
    thinking_blocks: tuple[int, ...]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture's latents."""
        return (self.latent_channels, *self.latent_size)


@dataclass(frozen=True)
class LatentSpec:
    """The decoder is fed `latents / scale + shift`."""

    scale: float
    shift: float


@dataclass(frozen=True)
class Defaults:
    """What a call that names no value uses."""

    sampler: str
    steps: int
    guidance: float
    depth: int


@dataclass(frozen=True)
class Tolerance:
    """Greatest relative error of each graph against golden/; least share of equally routed tokens."""

    text_encoder: float
    transformer: float
    vae_decoder: float
    routing_agreement: float


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 (lower-case hex) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that manifest.json says. `files` maps a path inside the bundle to its size and hash."""

    name: str
    license: str
    producer: str
    precision: str
    model: ModelSpec
    latent: LatentSpec
    defaults: Defaults
    tolerance: Tolerance
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        """Check what types alone cannot say. Raises BundleInvalid."""
        model, defaults = self.model, self.defaults
        sizes = {k: v for k, v in asdict(model).items() if k not in ("depths", "experts", "thinking_blocks")}
        for key, value in sizes.items():
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise _invalid(f"expected model.{key} of at least 1, found {value}")
        if not model.depths or model.depths[0] < 1 or list(model.depths) != sorted(set(model.depths)):
            raise _invalid(f"expected model.depths to rise from at least 1, found {list(model.depths)}")
        if defaults.depth not in model.depths:
            raise _invalid(f"expected defaults.depth among {list(model.depths)}, found {defaults.depth}")
        if bool(model.experts) != bool(model.thinking_blocks) or model.experts < 0:
            raise _invalid(
                f"expected model.experts of 0 without thinking blocks and more with them, "
                f"found {model.experts} with {len(model.thinking_blocks)}"
            )
        if defaults.sampler not in SAMPLERS:
            raise _invalid(
                f"expected defaults.sampler of {', '.join(SAMPLERS)}, found {shorten(defaults.sampler)}"
            )
        if not 1 <= defaults.steps <= TRAIN_TIMESTEPS:
            raise _invalid(f"expected defaults.steps in 1..{TRAIN_TIMESTEPS}, found {defaults.steps}")
        if self.latent.scale == 0:
            raise _invalid("expected latent.scale other than 0, found 0")
        for path, entry in self.files.items():
            inside = path == str(PurePosixPath(path)) and not path.startswith("/") and ".." not in path
            if not inside or "\\" in path or ":" in path or not path.isprintable():
                raise _invalid(f"expected file paths inside the bundle, found {shorten(path)}")
            if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
                raise _invalid(f"expected a SHA-256 for {path}, found {shorten(entry.sha256)}")

    @property
    def sha256(self) -> str:
        """Hash of every fact above, whatever the layout of the text: the identity of the bundle."""
        facts = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json."""
        facts = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self), "sha256": self.sha256}
        return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse and check the text of manifest.json. Raises BundleInvalid."""
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _invalid(f"expected JSON, found text that is not ({error})") from None
        if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
            raise _invalid(f'expected "format": "{FORMAT}", found another file')
        version = facts.pop("version", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise _invalid(
                f"expected format version {FORMAT_VERSION}, found {shorten(version)}; "
                "export the bundle again with this tpx, or install the tpx that wrote it"
            )
        promised = facts.pop("sha256", None)
        manifest = _parse(cls, facts, "")
        if promised != manifest.sha256:
            raise _invalid(
                f"expected its facts to have SHA-256 {manifest.sha256[:12]}…, found {str(promised)[:12]}…; "
                "it was changed after the export: restore it or export again"
            )
        return manifest


def _invalid(message: str) -> BundleInvalid:
    return BundleInvalid(f"manifest.json: {message}")


def _parse(kind: type[T], value: Any, where: str) -> T:
    """`value` (from JSON) as `kind`: a dataclass, dict of dataclasses, tuple of ints, int, float or str."""
    hints = get_type_hints(kind) if hasattr(kind, "__dataclass_fields__") else {}
    if hints and isinstance(value, dict):
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        if odd := sorted(set(names) ^ set(value)):
            found = "missing" if odd[0] in names else "unknown"
            raise _invalid(
                f"expected the fields of version {FORMAT_VERSION}, found {shorten(where + odd[0])} {found}"
            )
        return kind(**{name: _parse(hints[name], value[name], f"{where}{name}.") for name in names})
    if isinstance(kind, GenericAlias) and kind.__origin__ is dict and isinstance(value, dict):
        return {key: _parse(get_args(kind)[1], item, f"{where}{key}.") for key, item in value.items()}
    if isinstance(kind, GenericAlias) and kind.__origin__ is tuple and isinstance(value, list):
        length_fits = Ellipsis in get_args(kind) or len(value) == len(get_args(kind))
        if length_fits and all(type(item) is int for item in value):
            return tuple(value)
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)  # type: ignore[return-value]
    if kind in (int, str) and type(value) is kind:
        return value
    expected = kind.__name__ if isinstance(kind, type) and not isinstance(kind, GenericAlias) else str(kind)
    raise _invalid(f"expected {shorten(where[:-1])} to be {expected}, found {shorten(value)}")
