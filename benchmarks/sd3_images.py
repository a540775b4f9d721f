"""Times whole images of a Stable Diffusion 3 folder, from prompt to picture, in diffusers and in TPX on the same machine.

    python -m benchmarks.sd3_size OUT --full               # or a real diffusers folder
    tpx-export --base OUT/base --no-t5 --out PLAIN         # the same model, so that the images can be compared
    python -m benchmarks.sd3_images OUT/base PLAIN OUT/bundle [--engine onnxruntime-cuda] [--compile] [--steps 28]

Each row has its own process, because PyTorch and ONNX Runtime keep the memory of a GPU that they once used. All use the same
initial latents, guidance 7, a negative prompt, and T5 if the bundles have it. Bundles are measured at every depth. With an
engine for CPUs, diffusers computes in float32 on the CPU. The memory of a GPU is what a row holds after its images, weights
included. `--compile` adds torch.compile of the transformer and decoder in diffusers. Needs the extra `parity`.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import click
from PIL import Image

from benchmarks.interleave import seconds
from tpx_engines.bench.memory import gpu_bytes, peak_bytes
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import ENGINES
from tpx_runtime.errors import BadInput, TpxError
from tpx_runtime.evaluation.similarity import psnr_db

PROMPT, NEGATIVE, SEED, GUIDANCE = "a red cube on a blue sphere", "blurry", 3, 7.0
CUDA = "onnxruntime-cuda"


@dataclass(frozen=True)
class Task:
    """What a process measures: diffusers, if `depth` is None, else a bundle at this depth."""

    name: str
    folder: Path
    size_px: tuple[int, int]  # height, width
    steps: int
    rounds: int
    engine: str
    t5: bool
    depth: int | None = None
    compiled: bool = False

    @property
    def warm_up(self) -> int:
        """Images before the first that is timed: each CUDA graph is captured in its third call."""
        return 3 if self.engine == CUDA else 1


@dataclass(frozen=True)
class Result:
    """Seconds until the model is loaded, from then until its first image, of each later image, and of their latents.

    `peak_bytes` is the most memory that the process had, without that of a GPU; `gpu_bytes` is what it holds on a GPU.
    """

    load_s: float
    first_s: float
    image_s: list[float]
    latents_s: list[float]
    peak_bytes: int
    gpu_bytes: int
    image: Image.Image


@dataclass(frozen=True)
class Calls:
    """What draws an image, and what stops before its latents are decoded."""

    image: Callable[[], Image.Image]
    latents: Callable[[], object]


def diffusers_calls(task: Task) -> Calls:
    """diffusers, on a GPU if the engine uses one."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    from tpx_runtime.noise import batch_noise

    device, dtype = ("cuda", torch.float16) if task.engine == CUDA else ("cpu", torch.float32)
    left_out: dict[str, Any] = {} if task.t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(task.folder, dtype=dtype, **left_out).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if task.compiled:
        pipeline.transformer.compile(fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, fullgraph=True)
    height, width = task.size_px
    factor, channels = pipeline.vae_scale_factor, pipeline.transformer.config.in_channels
    noise = torch.from_numpy(batch_noise([SEED], (channels, height // factor, width // factor)))
    latents = noise.to(device, dtype)

    def draw(output_type: str) -> Any:
        images = pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            height=height,
            width=width,
            latents=latents,
            num_inference_steps=task.steps,
            guidance_scale=GUIDANCE,
            output_type=output_type,
        ).images
        return images[0] if output_type == "pil" else images.cpu()

    return Calls(lambda: draw("pil"), lambda: draw("latent"))


def bundle_calls(task: Task) -> Calls:
    """A bundle."""
    from tpx_runtime.generator import Generator

    generator = Generator.load(task.folder, task.engine)
    jobs = generator.plan(
        PROMPT,
        negative_prompt=NEGATIVE,
        steps=task.steps,
        guidance=GUIDANCE,
        depth=task.depth,
        seed=SEED,
        sampler="euler",
    )

    def latents() -> object:
        generator.clear_conditions()
        return generator.generate_latents(jobs)

    def image() -> Image.Image:
        generator.clear_conditions()
        return generator.generate(jobs)[0]

    return Calls(image, latents)


def measure(task: Task) -> Result:
    """Load the model, draw the images to warm up, then time `rounds` images."""
    gpu_before, began = gpu_bytes(), time.perf_counter()
    calls = (diffusers_calls if task.depth is None else bundle_calls)(task)
    load_s = time.perf_counter() - began
    images: list[Image.Image] = []
    image_s = [seconds(lambda: images.append(calls.image())) for _ in range(task.warm_up + task.rounds)]
    latents_s = [seconds(calls.latents) for _ in range(task.rounds)]
    held = gpu_bytes() - gpu_before
    return Result(load_s, image_s[0], image_s[task.warm_up :], latents_s, peak_bytes(), held, images[-1])


def tasks(
    base: Path, bundles: tuple[Path, ...], engine: str, steps: int, rounds: int, compiled: bool
) -> list[Task]:
    """diffusers, and each bundle at every depth. Raises BadInput for bundles that draw different images, BundleInvalid."""
    from tpx_runtime.bundle import Bundle

    opened = [Bundle.open(path) for path in bundles]
    kinds = {(bundle.manifest.model.image_size_px, len(bundle.manifest.text_encoders)) for bundle in opened}
    if len(kinds) != 1:
        raise BadInput(
            f"expected bundles of one image size and number of text encoders, found {sorted(kinds)}; export them again"
        )
    [(size_px, text_encoders)] = kinds
    common = (size_px, steps, rounds, engine, text_encoders == 3)
    listed = [Task("diffusers", base, *common)]
    if compiled:
        listed.append(Task("diffusers, torch.compile", base, *common, compiled=True))
    for bundle, path in zip(opened, bundles, strict=True):
        model = bundle.manifest.model
        for depth in model.depths:
            what = f", depth {depth}" if model.thinking_blocks else ""
            listed.append(Task(f"TPX: {path.name}{what}", path, *common, depth=depth))
    return listed


@click.command(cls=TpxCommand)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(list(ENGINES)), default=CUDA, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Add torch.compile.")
@click.option("--steps", type=click.IntRange(1), default=28, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def main(base: Path, bundles: tuple[Path, ...], engine: str, compiled: bool, steps: int, rounds: int) -> None:
    """Print a table of diffusers with the folder BASE, and of BUNDLES."""
    if problem := ENGINES[engine].problem():
        raise click.ClickException(problem)
    try:
        if not (base / "model_index.json").exists():
            raise BadInput(f"expected a diffusers folder at {base}, found none; name another")
        listed = tasks(base, bundles, engine, steps, rounds, compiled)
    except TpxError as error:
        raise click.ClickException(str(error)) from None
    columns = [
        "",
        "s per image",
        "minimum to maximum",
        "without decoding",
        "load, s",
        "first image, s",
        "peak, GiB",
        "GPU, GiB",
    ]
    print(f"| {' | '.join([*columns, 'PSNR to diffusers, dB'])} |\n|{'---|' * 9}", flush=True)
    reference: Image.Image | None = None
    for task in listed:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            result = pool.submit(measure, task).result()
        times = f"{median(result.image_s):.3f} | {min(result.image_s):.3f} to {max(result.image_s):.3f}"
        psnr = f"{psnr_db(result.image, reference):.1f}" if reference else "-"
        reference = reference or result.image
        loading = f"{median(result.latents_s):.3f} | {result.load_s:.1f} | {result.first_s:.1f}"
        memory = f"{result.peak_bytes / 2**30:.1f} | {result.gpu_bytes / 2**30:.1f}"
        print(f"| {task.name} | {times} | {loading} | {memory} | {psnr} |", flush=True)


if __name__ == "__main__":
    main()
