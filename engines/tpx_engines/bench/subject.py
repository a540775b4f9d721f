"""What is measured: a Generator that draws one fixed prompt, timed from outside and step by step."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tpx_runtime.generator import Generator
from tpx_runtime.manifest import ALL_NOISE_LEVELS
from tpx_runtime.sampling import Array


@dataclass(frozen=True)
class Work:
    """What every configuration is given to do. The sampler is one that calls the model once a step; guidance acts on all of
    them or none, so that one step is as much work as another.

    `class_id` takes the prompt's place where a bundle draws classes. `prepared` is a folder of what was exported before, and
    `tuned` a choice that was made before: both empty where a configuration has none.
    """

    bundle: Path
    depth: int
    prompt: str | None
    class_id: int | None
    seed: int
    steps: int
    guidance: float
    sampler: str
    ckpt: Path | None = None
    prepared: Path | None = None
    tuned: str = ""

    def to_json(self) -> dict[str, Any]:
        """Paths as text."""
        paths = ("bundle", "ckpt", "prepared")
        return {
            name: str(value) if name in paths and value else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Work":
        paths = {name: Path(facts[name]) for name in ("bundle", "ckpt", "prepared") if facts[name]}
        return cls(**{**facts, **paths})


@dataclass
class Subject:
    """A generator at work. `notes` are facts that its maker found out, such as seconds of compiling."""

    generator: Generator
    work: Work
    notes: dict[str, Any] = field(default_factory=dict)

    def draw(self, images: int, steps: int | None = None) -> tuple[list[Image.Image], "Timing"]:
        """So many pictures in one batch, of seeds from the work's own; `steps` other than the work's are for warming up."""
        work, stamps = self.work, list[float]()

        def stamp(step: int, total: int, latents: Array) -> None:
            stamps.append(time.perf_counter())

        jobs = self.generator.plan(
            work.prompt,
            class_id=work.class_id,
            seed=work.seed,
            steps=steps or work.steps,
            guidance=work.guidance,
            guidance_interval=ALL_NOISE_LEVELS,
            sampler=work.sampler,
            depth=work.depth,
            num_images=images,
        )
        self.generator.clear_conditions()
        began = time.perf_counter()
        pictures = self.generator.generate(jobs, batch_size=images, callback=stamp)
        ended = time.perf_counter()
        return pictures, Timing(ended - began, (stamps[-1] - began) / len(stamps))


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: from jobs to pictures, and of one step, the whole loop over its number of steps.

    What a loop prepares for all its steps is in it, shared out among them; the prompt was encoded in a call before.
    """

    seconds: float
    step_seconds: float


def of_engine(work: Work, options: dict[str, Any]) -> Subject:
    """What `Generator.load` gives to everybody, of options["engine"] and the work's bundle, or options["bundle"]."""
    return Subject(Generator.load(options.get("bundle", work.bundle), options["engine"]), work)
