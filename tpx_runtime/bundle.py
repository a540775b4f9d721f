"""A bundle on disk: opening it, verifying its files, and locating its parts (see docs/bundle.md)."""

import hashlib
import json
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from .errors import BundleInvalid, shorten
from .files import read_small_file
from .manifest import EncoderSpec, FileEntry, Manifest

# Variants of a transformer graph: tpx::RoutedLora as one node; this in float16, attention fused too; standard operators.
GraphVariant = Literal["operator", "fused", "plain"]

MANIFEST = "manifest.json"
VOCABULARY = "vocab.json"  # in the folder of a tokenizer
MODEL = "model.onnx"  # in the folder of a text encoder
CONDITIONS = "transformer/conditions.onnx"
VAE_ENCODER = "vae_encoder/model.onnx"  # optional
VAE_DECODER = "vae_decoder/model.onnx"
SCHEDULER = "scheduler/scheduler_config.json"
STEP = "scheduler/step.onnx"  # optional
GOLDEN = "golden/golden.npz"
_REQUIRED_VARIANTS: tuple[GraphVariant, ...] = ("operator", "plain")  # "fused" always computes in float16
SHIFT_RANGE = (0.01, 100.0)  # outside of it, neighbouring sigmas of a long schedule are equal in float32


def transformer_name(depth: int, variant: GraphVariant = "operator") -> str:
    """Path inside the bundle of the transformer with `depth` latent steps."""
    return f"transformer/depth-{depth}{'' if variant == 'operator' else f'.{variant}'}.onnx"


def hash_file(path: Path) -> str:
    """SHA-256 of a file's contents, in lower-case hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(root: Path) -> dict[str, FileEntry]:
    """Size and hash of every file of the bundle at `root` except the manifest, sorted by name."""
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {
        name: FileEntry(bytes=path.stat().st_size, sha256=hash_file(path))
        for name, path in sorted(paths.items())
        if name != MANIFEST
    }


def _wrong_size(path: Path, entry: FileEntry) -> str | None:
    try:
        status = path.stat()
    except OSError as error:
        return f"expected a file of {entry.bytes} bytes, found: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"expected a file of {entry.bytes} bytes, found something else"
    return None if status.st_size == entry.bytes else f"expected {entry.bytes} bytes, found {status.st_size}"


def _wrong_hash(path: Path, entry: FileEntry) -> str | None:
    try:
        found = hash_file(path)
    except OSError as error:
        return f"expected a file to read, found: {error.strerror}"
    return None if found == entry.sha256 else f"expected SHA-256 {entry.sha256[:12]}…, found {found[:12]}…"


@dataclass(frozen=True)
class GraphFile:
    """A graph of a bundle: its name in reports, its file, and the shapes of its inputs without the batch dimension."""

    name: str
    path: Path
    inputs: dict[str, tuple[int, ...]]
    depth: int | None = None  # of a transformer graph


def _check_files(root: Path, manifest: Manifest, check: Callable[[Path, FileEntry], str | None]) -> None:
    for name, entry in manifest.files.items():
        if message := check(root / name, entry):
            raise BundleInvalid(f"{root / name}: {message}; copy the bundle again or export it again")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "Bundle":
        """Read the manifest at `path` and check the size of every file, with `verify` also its SHA-256.

        All sizes are checked before any file is read. Raises BundleInvalid, whose message names the invalid file.
        """
        root = Path(path)
        try:
            text = read_small_file(root / MANIFEST).decode()
        except (FileNotFoundError, NotADirectoryError):
            raise BundleInvalid(
                f"expected a bundle (a folder with {MANIFEST}) at {root}, found none; "
                "make one with `make demo` or `tpx-export`"
            ) from None
        except UnicodeDecodeError:
            raise BundleInvalid(f"{root / MANIFEST}: expected UTF-8 text, found other bytes") from None
        except OSError as error:
            raise BundleInvalid(
                f"{root / MANIFEST}: expected a file to read, found: {error.strerror}"
            ) from None
        except ValueError as error:  # a null character, or one that the file system cannot encode
            raise BundleInvalid(
                f"expected the path of a bundle, found {shorten(str(path))}: {error}"
            ) from None
        try:
            # Resolved, because graphs are loaded later: perhaps from another working directory, or after a link was changed.
            bundle = cls(root.resolve(), Manifest.from_json(text))
        except BundleInvalid as error:
            raise BundleInvalid(f"{root / MANIFEST}: {error}") from None
        depths = bundle.manifest.model.depths
        transformers = [
            transformer_name(depth, variant) for depth in depths for variant in _REQUIRED_VARIANTS
        ]
        for encoder in bundle.manifest.text_encoders:
            bundle.vocabulary(encoder)
            bundle.text_encoder(encoder)
        for name in (CONDITIONS, *transformers, VAE_DECODER, SCHEDULER, GOLDEN):
            bundle.path(name)
        _check_files(root, bundle.manifest, _wrong_size)
        if verify:
            _check_files(root, bundle.manifest, _wrong_hash)
        return bundle

    def verify_files(self) -> None:
        """Check the SHA-256 of every file. Raises BundleInvalid, whose message names the invalid file."""
        _check_files(self.root, self.manifest, _wrong_hash)

    @property
    def hash(self) -> str:
        """Identity of the bundle: SHA-256 of the manifest, which includes the hash of every file."""
        return self.manifest.sha256

    def graphs(self, variant: GraphVariant = "operator") -> list[GraphFile]:
        """All graphs that are used to generate images; the transformers in that variant."""
        model, shapes = self.manifest.model, self.manifest.model.input_shapes
        graphs = [
            GraphFile(encoder.folder, self.text_encoder(encoder), {"ids": (encoder.tokens,)})
            for encoder in self.manifest.text_encoders
        ]
        inputs = {name: shapes[name] for name in model.conditions_inputs}
        graphs.append(GraphFile("transformer conditions", self.conditions, inputs))
        inputs = {name: shapes[name] for name in model.transformer_inputs}
        graphs += [
            GraphFile(f"transformer depth {depth}", self.transformer(depth, variant), inputs, depth)
            for depth in model.depths
        ]
        graphs.append(GraphFile("vae_decoder", self.vae_decoder, {"latents": model.latent_shape}))
        if self.vae_encoder:
            graphs.append(GraphFile("vae_encoder", self.vae_encoder, {"image": (3, *model.image_size_px)}))
        return graphs

    def path(self, name: str) -> Path:
        """Path of the file `name`. Raises BundleInvalid if the manifest does not list it."""
        if name not in self.manifest.files:
            raise BundleInvalid(
                f"{self.root}: expected the file {name}, found no such entry; export it again"
            )
        return self.root / name

    def vocabulary(self, encoder: EncoderSpec) -> Path:
        return self.path(f"{encoder.tokenizer}/{VOCABULARY}")

    def text_encoder(self, encoder: EncoderSpec) -> Path:
        return self.path(f"{encoder.folder}/{MODEL}")

    @property
    def conditions(self) -> Path:
        """The graph that computes what depends only on the timestep and the prompt or class."""
        return self.path(CONDITIONS)

    def transformer(self, depth: int, variant: GraphVariant = "operator") -> Path:
        """The transformer with `depth` latent steps; a missing fused variant is replaced by the operator variant."""
        name = transformer_name(depth, variant)
        return self.path(
            name if name in self.manifest.files or variant in _REQUIRED_VARIANTS else transformer_name(depth)
        )

    @property
    def vae_decoder(self) -> Path:
        return self.path(VAE_DECODER)

    @property
    def vae_encoder(self) -> Path | None:
        """None if the bundle has no image encoder."""
        return self.path(VAE_ENCODER) if VAE_ENCODER in self.manifest.files else None

    @property
    def step(self) -> Path | None:
        """The graph of the work between two transformer calls; None if only the host can do it."""
        return self.path(STEP) if STEP in self.manifest.files else None

    @property
    def supports_image_to_image(self) -> bool:
        """Whether images can be generated from an input image: needs an image encoder and a flow model."""
        return self.vae_encoder is not None and self.manifest.model.prediction == "velocity"

    @property
    def has_t5(self) -> bool:
        """Whether a text encoder can be left out: T5, which has no pooled output."""
        return any(not encoder.pooled_width for encoder in self.manifest.text_encoders)

    def folder_bytes(self, folder: str) -> int:
        """Size of all files in a folder of the bundle: about the memory that its graph needs."""
        files = self.manifest.files.items()
        return sum(entry.bytes for name, entry in files if name.startswith(f"{folder}/"))

    @property
    def golden(self) -> Path:
        return self.path(GOLDEN)

    @cached_property
    def schedule_shift(self) -> float:
        """Shift s of flow matching, sigma -> s sigma / (1 + (s - 1) sigma); 1 for diffusion models. Raises BundleInvalid."""
        if self.manifest.model.prediction != "velocity":
            return 1.0
        path = self.path(SCHEDULER)
        try:
            shift = float(json.loads(path.read_text(encoding="utf-8"))["shift"])
        except OSError as error:
            raise BundleInvalid(f"{path}: expected a file to read, found: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise BundleInvalid(f'{path}: expected JSON with a number "shift", found none') from None
        if not SHIFT_RANGE[0] <= shift <= SHIFT_RANGE[1]:
            raise BundleInvalid(
                f"{path}: expected a shift in {SHIFT_RANGE[0]:g}..{SHIFT_RANGE[1]:g}, found {shift:g}"
            )
        return shift
