"""The settings of an image: validated once, passed through the pipeline, and written into the file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any

import numpy as np

from . import __version__
from .errors import BadInput, shorten
from .image_size import format_size
from .manifest import ALL_NOISE_LEVELS, Manifest
from .noise import MAX_SEED
from .sampling import SAMPLERS_FOR, TRAIN_TIMESTEPS

MAX_GUIDANCE = 1000.0  # far above useful values, far below overflow in float32
# The fields of Settings that all images of a batch share.
LOOP_SETTINGS = (
    "sampler",
    "steps",
    "guidance",
    "guidance_interval",
    "guidance_every",
    "cache_interval",
    "depth",
    "strength",
)


@dataclass(frozen=True)
class Settings:
    """Everything that determines an image, except the bundle and an input image.

    `class_id` is None for text-to-image models. `strength`, the fraction of the steps to run, is None without an input
    image. `guidance_interval`: see `guidance.is_guided`; `guidance_every`: see `guidance.reused_timesteps`;
    `cache_interval`: see `step_cache.cached_timesteps`.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    sampler: str
    depth: int
    class_id: int | None = None
    strength: float | None = None
    guidance_interval: tuple[float, float] = ALL_NOISE_LEVELS
    guidance_every: int = 1
    cache_interval: int = 1

    def __post_init__(self) -> None:
        """Convert numpy values and JSON lists to Python numbers and tuples, so that settings compare and serialise."""
        for field in fields(self):
            object.__setattr__(self, field.name, to_python(getattr(self, field.name)))
        if isinstance(self.guidance_interval, list | tuple):
            object.__setattr__(self, "guidance_interval", tuple(map(to_python, self.guidance_interval)))

    def check(self, manifest: Manifest) -> "Settings":
        """Return these settings if they are valid for the model of `manifest`. Raises BadInput."""
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise BadInput(f"expected {name} to be text, found {type(getattr(self, name)).__name__}")
        samplers = SAMPLERS_FOR[manifest.model.prediction]
        if not isinstance(self.sampler, str) or self.sampler not in samplers:
            raise BadInput(f"expected a sampler of {', '.join(samplers)}, found {shorten(self.sampler)}")
        check_int("seed", self.seed, 0, MAX_SEED)
        check_int("steps", self.steps, 1, TRAIN_TIMESTEPS)
        check_int("guidance_every", self.guidance_every, 1)
        check_int("cache_interval", self.cache_interval, 1)
        if type(self.depth) is not int or self.depth not in manifest.model.depths:
            depths = ", ".join(map(str, manifest.model.depths))
            raise BadInput(f"expected a depth of {depths} (this bundle's), found {shorten(self.depth)}")
        if type(self.guidance) not in (int, float) or not 1 <= self.guidance <= MAX_GUIDANCE:
            raise BadInput(
                f"expected guidance to be a number in 1..{MAX_GUIDANCE:g} (1 is off), found {shorten(self.guidance)}"
            )
        self._check_interval()
        if self.guidance == 1 and self.negative_prompt:
            raise BadInput(
                "expected no negative prompt at guidance 1, which ignores it, found one; raise the guidance"
            )
        if self.strength is not None and (
            type(self.strength) not in (int, float) or not 0 < self.strength <= 1
        ):
            raise BadInput(f"expected strength above 0 and at most 1, found {shorten(self.strength)}")
        if manifest.model.classes and (self.prompt or self.negative_prompt):
            raise BadInput(
                "expected a class and no prompt (this bundle is class-conditional), found a prompt; leave it out and name "
                "a class with --class or class_id"
            )
        last = manifest.model.classes - 1
        if manifest.model.classes and (type(self.class_id) is not int or not 0 <= self.class_id <= last):
            raise BadInput(
                f"expected a class in 0..{last} (this bundle is class-conditional), found "
                f"{'none' if self.class_id is None else shorten(self.class_id)}; name one with --class or class_id"
            )
        if not manifest.model.classes and self.class_id is not None:
            raise BadInput(
                f"expected a prompt and no class (this bundle takes prompts), found class {shorten(self.class_id)}; "
                "leave it out"
            )
        return self

    @property
    def loop_settings(self) -> dict[str, Any]:
        """The LOOP_SETTINGS as JSON values."""
        values = {name: getattr(self, name) for name in LOOP_SETTINGS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def _check_interval(self) -> None:
        interval = self.guidance_interval
        fits = isinstance(interval, tuple) and [type(end) in (int, float) for end in interval] == [True, True]
        if not fits or not 0 <= interval[0] < interval[1] <= 1:
            raise BadInput(
                f"expected guidance_interval to be two increasing numbers in 0..1, found {shorten(interval)}"
            )

    def metadata(
        self,
        manifest: Manifest,
        engine_name: str,
        left_out: Sequence[str] = (),
        sources: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """PNG metadata: `tpx` is JSON, `parameters` the text that other programs write too.

        `left_out` lists the text encoders that were left out, `sources` holds the hashes of an edit's inputs.
        """
        facts = {
            **{name: value for name, value in asdict(self).items() if value is not None},
            "bundle": manifest.name,
            "bundle_sha256": manifest.sha256,
            "precision": manifest.precision,
            "engine": engine_name,
            **({"left_out": list(left_out)} if left_out else {}),
            **(sources or {}),
            "version": __version__,
        }
        negative = f"Negative prompt: {self.negative_prompt}\n" if self.negative_prompt else ""
        extra = f", Denoising strength: {self.strength}" if self.strength is not None else ""
        if self.guidance_interval != ALL_NOISE_LEVELS:
            extra += ", CFG interval: {:g}-{:g}".format(*self.guidance_interval)
        if self.guidance_every != 1:
            extra += f", CFG every: {self.guidance_every}"
        if self.cache_interval != 1:
            extra += f", Cache interval: {self.cache_interval}"
        subject = self.prompt if self.class_id is None else f"class {self.class_id}"
        line = (
            f"{subject}\n{negative}Steps: {self.steps}, Sampler: {self.sampler}, "
            f"CFG scale: {self.guidance}, Seed: {self.seed}, Size: {format_size(manifest.model.image_size_px)}, "
            f"Model: {manifest.name}, Depth: {self.depth}{extra}, Version: tpx {__version__}"
        )
        return {"tpx": json.dumps(facts), "parameters": line}


def to_python(value: Any) -> Any:
    """A numpy value as Python numbers, text or a list of them; any other value as it is."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """`value` as a Python int, which unlike numpy's cannot overflow. Raises BadInput unless it is in minimum..maximum."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if minimum <= number and (maximum is None or number <= maximum):
            return number
    limits = f"of at least {minimum}" if maximum is None else f"in {minimum}..{maximum}"
    raise BadInput(f"expected {name} to be a whole number {limits}, found {shorten(value)}")
