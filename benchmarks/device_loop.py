"""The time of a denoising loop with latents kept on the GPU, and with latents copied at every step (TPX_DEVICE_LOOP=0).

    python -m benchmarks.device_loop bundles/shapes [--batch 1 --batch 16] [--steps 20] [--rounds 20]

Both generate the same latents, interleaved; the table gives medians and the maximum difference between the latents.
"""

import os
import time
from dataclasses import dataclass
from statistics import median

import click
import numpy as np

from benchmarks.interleave import interleaved
from tpx_runtime.bundle import Bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import ENGINES
from tpx_runtime.engine.gpu import local_gpu
from tpx_runtime.environment import DEVICE_LOOP_VARIABLE
from tpx_runtime.errors import TpxError
from tpx_runtime.generator import Generator
from tpx_runtime.sampling import Array


@dataclass(frozen=True)
class Row:
    """Milliseconds per step of `batch` images for both loops, and the maximum difference of their latents."""

    batch: int
    host_ms: float
    device_ms: float
    difference: float


def measure(generator: Generator, prompt: str | None, batch: int, steps: int, rounds: int) -> Row:
    """Time both loops; `prompt` is None for a class-conditional model, which then generates its first class."""
    jobs = generator.plan(prompt, class_id=None if prompt else 0, steps=steps, num_images=batch)
    latents: dict[str, Array] = {}

    def draw(loop: str) -> float:
        os.environ[DEVICE_LOOP_VARIABLE] = loop
        generator.clear_conditions()
        began = time.perf_counter()
        latents[loop] = generator.generate_latents(jobs)
        return time.perf_counter() - began

    # The first rounds allocate memory and the third captures graphs.
    times = interleaved(("0", "1"), draw, rounds, warm_up=3)
    host, device = (1e3 * median(seconds) / steps for seconds in times.values())
    return Row(batch, host, device, float(np.abs(latents["0"] - latents["1"]).max()))


def table(rows: list[Row]) -> str:
    lines = [
        "| images | ms per step, host loop | device loop | speed-up | maximum difference |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        speed_up = row.host_ms / row.device_ms
        lines.append(
            f"| {row.batch} | {row.host_ms:.3f} | {row.device_ms:.3f} | {speed_up:.2f} | {row.difference:.1e} |"
        )
    return "\n".join(lines)


@click.command(cls=TpxCommand)
@click.argument("bundle")
@click.option(
    "--prompt",
    default="a red cube on a blue sphere",
    show_default=True,
    help="Ignored by class-conditional models.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 4, 16),
    show_default=True,
    help="Images per batch; may be repeated.",
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
def main(bundle: str, prompt: str, batches: tuple[int, ...], steps: int, rounds: int) -> None:
    """Print the table for BUNDLE."""
    engine, gpu = ENGINES["onnxruntime-cuda"], local_gpu()
    if problem := engine.problem():
        raise click.ClickException(problem)
    try:
        generator = Generator(Bundle.open(bundle), engine)
        if generator.bundle.step is None:
            raise click.ClickException(
                f"expected scheduler/step.onnx in {bundle}, found none; export it again"
            )
        model_prompt = None if generator.classes else prompt
        rows = [measure(generator, model_prompt, batch, steps, rounds) for batch in batches]
    except TpxError as error:
        raise click.ClickException(str(error)) from None
    print(
        f"{gpu.name if gpu else 'no GPU'}: {generator.manifest.name}, {generator.manifest.precision}, {steps} steps\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
