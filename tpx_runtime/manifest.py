"""The manifest of a bundle as frozen dataclasses, with the only code that reads and writes it.

The format is described in docs/bundle.md. `tpx_export` builds a `Manifest` and writes `to_json()`; the runtime and the
engines read it with `from_json()`, which rejects unknown and missing fields.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import PurePosixPath

from .errors import BundleInvalid, shorten
from .sampling import SAMPLERS_FOR, TRAIN_TIMESTEPS
from .typed_json import parse

FORMAT = "tpx-bundle"
FORMAT_VERSION = 5
_MAX_SIZE = 2**24  # of any one dimension: a damaged manifest must not ask for all memory
ALL_NOISE_LEVELS = (0.0, 1.0)  # the guidance interval that contains every step


@dataclass(frozen=True)
class ModelSpec:
    """Inputs and outputs of the transformer. Sizes of two are (height, width).

    A model is conditioned on a prompt (`context_tokens`, `context_width`, `pooled_width`) or on one of `classes` (then those
    are 0). `conditions_width` is the width of the precomputed input that depends only on the timestep and the prompt or
    class. `prediction` is a flow's "velocity" or a diffusion's "epsilon", with `out_channels`, of which guidance acts on the
    first `guided_channels`. `experts` is 0 without thinking blocks.
    """

    latent_channels: int
    latent_size: tuple[int, int]
    image_size_px: tuple[int, int]
    context_tokens: int
    context_width: int
    pooled_width: int
    conditions_width: int
    classes: int
    prediction: str
    out_channels: int
    guided_channels: int
    visual_tokens: int
    depths: tuple[int, ...]
    experts: int
    thinking_blocks: tuple[int, ...]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents of one image."""
        return (self.latent_channels, *self.latent_size)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape, without the batch dimension, of every input that a transformer graph may have."""
        return {
            "timestep": (),
            "pooled": (self.pooled_width,),
            "class_id": (),
            "latents": self.latent_shape,
            "conditions": (self.conditions_width,),
            "context": (self.context_tokens, self.context_width),
        }

    @property
    def conditions_inputs(self) -> tuple[str, str]:
        """Input names of the graph that computes `conditions`."""
        return ("timestep", "class_id" if self.classes else "pooled")

    @property
    def transformer_inputs(self) -> tuple[str, ...]:
        """Input names of the transformer graphs."""
        return ("latents", "conditions") if self.classes else ("latents", "conditions", "context")


@dataclass(frozen=True)
class EncoderSpec:
    """A text encoder: the folders of its graph and of its tokenizer, and its sizes.

    `pooled_width` is 0 for an encoder without pooled output, such as T5.
    """

    folder: str
    tokenizer: str
    tokens: int
    context_width: int
    pooled_width: int

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the graph's outputs."""
        return ("context", "pooled") if self.pooled_width else ("context",)


@dataclass(frozen=True)
class LatentSpec:
    """The decoder's input is `latents / scale + shift`; the encoder's output z becomes `(z - shift) * scale`."""

    scale: float
    shift: float

    def __post_init__(self) -> None:
        _make_float(self, "scale", "shift")


@dataclass(frozen=True)
class Defaults:
    """Default settings of a call. `guidance_interval`: see `guidance.is_guided`."""

    sampler: str
    steps: int
    guidance: float
    depth: int
    guidance_interval: tuple[float, float] = ALL_NOISE_LEVELS

    def __post_init__(self) -> None:
        _make_float(self, "guidance")
        object.__setattr__(self, "guidance_interval", tuple(map(float, self.guidance_interval)))


@dataclass(frozen=True)
class Tolerance:
    """Largest relative error of each graph against golden/; smallest share of tokens routed to the same expert."""

    text_encoder: float
    conditions: float
    transformer: float
    vae: float
    routing_agreement: float

    def __post_init__(self) -> None:
        _make_float(self, *(field.name for field in fields(self)))


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 (lower-case hex) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json. `files` maps a path inside the bundle to its size and hash."""

    name: str
    license: str
    producer: str
    precision: str
    model: ModelSpec
    text_encoders: tuple[EncoderSpec, ...]
    latent: LatentSpec
    defaults: Defaults
    tolerance: Tolerance
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        """Check the values; their types are checked by `from_json`. Raises BundleInvalid."""
        model, defaults = self.model, self.defaults
        for key in ("name", "license", "producer"):
            if not (text := getattr(self, key)).isprintable():
                raise BundleInvalid(f"expected printable characters in {key}, found {shorten(text)}")
        self._check_sizes()
        self._check_conditions()
        if not model.depths or model.depths[0] < 1 or list(model.depths) != sorted(set(model.depths)):
            raise BundleInvalid(
                f"expected model.depths to increase from at least 1, found {list(model.depths)}"
            )
        if defaults.depth not in model.depths:
            raise BundleInvalid(f"expected defaults.depth among {list(model.depths)}, found {defaults.depth}")
        if bool(model.experts) != bool(model.thinking_blocks) or model.experts < 0:
            raise BundleInvalid(
                f"expected model.experts to be 0 without thinking blocks and positive with them, "
                f"found {model.experts} with {len(model.thinking_blocks)}"
            )
        if defaults.sampler not in (samplers := SAMPLERS_FOR[model.prediction]):
            raise BundleInvalid(
                f"expected defaults.sampler of {', '.join(samplers)}, found {shorten(defaults.sampler)}"
            )
        if not 1 <= defaults.steps <= TRAIN_TIMESTEPS:
            raise BundleInvalid(f"expected defaults.steps in 1..{TRAIN_TIMESTEPS}, found {defaults.steps}")
        if not 1 <= defaults.guidance < float("inf"):
            raise BundleInvalid(
                f"expected defaults.guidance of at least 1, which is off, found {defaults.guidance}"
            )
        low, high = defaults.guidance_interval
        if not 0 <= low < high <= 1:
            raise BundleInvalid(
                f"expected defaults.guidance_interval to increase within 0..1, found {[low, high]}"
            )
        if self.latent.scale == 0:
            raise BundleInvalid("expected latent.scale other than 0, found 0")
        for path, entry in self.files.items():
            inside = path == str(PurePosixPath(path)) and not path.startswith("/") and ".." not in path
            if not inside or "\\" in path or ":" in path or not path.isprintable():
                raise BundleInvalid(f"expected file paths inside the bundle, found {shorten(path)}")
            if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
                raise BundleInvalid(f"expected a SHA-256 for {path}, found {shorten(entry.sha256)}")

    def _check_sizes(self) -> None:
        model = self.model
        text_sizes = ["context_tokens", "context_width", "pooled_width"]
        sizes = ["latent_channels", "latent_size", "image_size_px", "guided_channels", "visual_tokens"]
        sizes += ["conditions_width"]
        for key in sizes + (text_sizes if not model.classes else []):
            value = getattr(model, key)
            if not all(1 <= size <= _MAX_SIZE for size in (value if isinstance(value, tuple) else (value,))):
                raise BundleInvalid(f"expected model.{key} in 1..{_MAX_SIZE}, found {value}")
        if any(px % latent for px, latent in zip(model.image_size_px, model.latent_size, strict=True)):
            raise BundleInvalid(
                f"expected model.image_size_px to be a multiple of {list(model.latent_size)}, "
                f"found {list(model.image_size_px)}"
            )
        if model.prediction not in SAMPLERS_FOR:
            raise BundleInvalid(
                f"expected model.prediction of {', '.join(SAMPLERS_FOR)}, found {shorten(model.prediction)}"
            )
        # Twice as many channels if a diffusion model also predicts the variance of each step.
        factors = {"velocity": [1], "epsilon": [1, 2]}[model.prediction]
        if model.out_channels not in (allowed := [factor * model.latent_channels for factor in factors]):
            raise BundleInvalid(
                f"expected model.out_channels of {' or '.join(map(str, allowed))}, found {model.out_channels}"
            )
        if model.guided_channels > model.latent_channels:
            raise BundleInvalid(
                f"expected model.guided_channels of at most {model.latent_channels}, found {model.guided_channels}"
            )

    def _check_conditions(self) -> None:
        model, encoders = self.model, self.text_encoders
        if model.classes < 0 or bool(model.classes) == bool(encoders):
            raise BundleInvalid(
                f"expected either text_encoders or model.classes, found {len(encoders)} and {model.classes}"
            )
        if model.classes:
            if size := model.context_tokens or model.context_width or model.pooled_width:
                raise BundleInvalid(f"expected text sizes of 0 in a class-conditional model, found {size}")
            return
        pooling = [encoder for encoder in encoders if encoder.pooled_width]
        others = [encoder for encoder in encoders if not encoder.pooled_width]
        fits = (
            pooling
            and len({encoder.folder for encoder in encoders}) == len(encoders)
            and all(e.tokens > 0 and e.context_width > 0 and e.pooled_width >= 0 for e in encoders)
            and len({encoder.tokens for encoder in pooling}) == 1
            and sum(encoder.context_width for encoder in pooling) <= model.context_width
            and sum(encoder.pooled_width for encoder in pooling) == model.pooled_width
            and all(encoder.context_width == model.context_width for encoder in others)
            and pooling[0].tokens + sum(encoder.tokens for encoder in others) <= model.context_tokens
        )
        if not fits:
            raise BundleInvalid(
                f"expected text_encoders that fill {model.context_tokens} x {model.context_width} and "
                f"{model.pooled_width} pooled, found {len(encoders)} of other sizes"
            )

    @cached_property
    def sha256(self) -> str:
        """Hash of all fields, independent of the JSON layout: the identity of the bundle."""
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
            raise BundleInvalid(f"expected JSON, found other text ({error})") from None
        if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
            raise BundleInvalid(f'expected "format": "{FORMAT}", found another file')
        version = facts.pop("version", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise BundleInvalid(
                f"expected format version {FORMAT_VERSION}, found {shorten(version)}; "
                "export the bundle again with this tpx, or install the tpx that wrote it"
            )
        stated = facts.pop("sha256", None)
        try:
            manifest: Manifest = parse(cls, facts, "", f"version {FORMAT_VERSION}")
        except ValueError as error:
            raise BundleInvalid(str(error)) from None
        if stated != manifest.sha256:
            raise BundleInvalid(
                f"expected sha256 {manifest.sha256[:12]}… for these fields, found {str(stated)[:12]}…; "
                "the file was changed after the export: restore it or export again"
            )
        return manifest


def _make_float(spec: object, *names: str) -> None:
    """Convert fields to float, as `from_json` does: the manifest's hash of 3 and of 3.0 differ."""
    for name in names:
        object.__setattr__(spec, name, float(getattr(spec, name)))
