"""What is measured: a Generator with one fixed prompt, timed as a whole and per step."""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from tpx_runtime.generator import Generator
from tpx_runtime.manifest import ALL_NOISE_LEVELS
from tpx_runtime.sampling import Array


@dataclass(frozen=True)
class Workload:
    """The images that every configuration generates. Without a `cache_interval` all steps cost the same: the sampler calls
    the model once per step, and guidance applies to all steps or none.

    `class_id` replaces the prompt in class-conditional bundles. `export_folder` holds the naive export,
    `compile_setting` is the torch.compile setting chosen in an earlier process; both are empty for other configurations.
    """

    bundle: Path
    depth: int
    prompt: str | None
    class_id: int | None
    seed: int
    steps: int
    guidance: float
    sampler: str
    cache_interval: int = 1
    ckpt: Path | None = None
    export_folder: Path | None = None
    compile_setting: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON, with paths as strings."""
        paths = ("bundle", "ckpt", "export_folder")
        return {
            name: str(value) if name in paths and value else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Workload":
        paths = {name: Path(data[name]) for name in ("bundle", "ckpt", "export_folder") if data[name]}
        return cls(**{**data, **paths})


@dataclass
class Runner:
    """A generator with its workload. `notes` are facts from its factory, such as compile times."""

    generator: Generator
    workload: Workload
    notes: dict[str, Any] = field(default_factory=dict)

    def draw(self, images: int, steps: int | None = None) -> tuple[list[Image.Image], "Timing"]:
        """Generate a batch of images with consecutive seeds, and time it. `steps` overrides the workload's, for warm-up."""
        workload, stamps = self.workload, list[float]()

        def stamp(step: int, total: int, latents: Array) -> None:
            stamps.append(time.perf_counter())

        jobs = self.generator.plan(
            workload.prompt,
            class_id=workload.class_id,
            seed=workload.seed,
            steps=steps or workload.steps,
            guidance=workload.guidance,
            guidance_interval=ALL_NOISE_LEVELS,
            cache_interval=workload.cache_interval,
            sampler=workload.sampler,
            depth=workload.depth,
            num_images=images,
        )
        self.generator.clear_conditions()
        began = time.perf_counter()
        results = self.generator.generate(jobs, batch_size=images, callback=stamp)
        ended = time.perf_counter()
        return results, Timing(ended - began, (stamps[-1] - began) / len(stamps))


@dataclass(frozen=True)
class Timing:
    """Seconds of a whole call, and of one step: the time of the loop divided by its number of steps.

    Work that the loop does once for all its steps is included; the prompt was already encoded by an earlier call.
    """

    seconds: float
    step_seconds: float


def engine_runner(workload: Workload, options: dict[str, Any]) -> Runner:
    """`Generator.load` with options["engine"]; options["bundle"] and ["cache_interval"] replace those of the workload."""
    generator = Generator.load(options.get("bundle", workload.bundle), options["engine"])
    interval = options.get("cache_interval", workload.cache_interval)
    return Runner(generator, replace(workload, cache_interval=interval))
