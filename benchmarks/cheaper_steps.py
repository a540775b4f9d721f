"""The effect of `--guidance-every`: time per image, alone and in batches, and PSNR to full guidance.

    python -m benchmarks.guidance_every [--bundle bundles/shapes] [--engine onnxruntime] [--sampler euler] [--steps 20]

The settings are interleaved; times are medians, and ratios are medians of the ratios of each round. PSNR is measured on
every 24th prompt of ShapesEval, which includes all of its kinds.
"""

import itertools
from statistics import median
from typing import Any

import click

from benchmarks.interleave import interleaved, seconds
from samples.shapes.prompt_list import listed_prompts
from tpx_runtime import Generator
from tpx_runtime.command import TpxCommand
from tpx_runtime.evaluation.similarity import psnr_db

PSNR_PROMPTS = [listed.text for listed in listed_prompts()][::24]
PROMPT = "a red cube on a blue sphere"


@click.command(cls=TpxCommand)
@click.option("--bundle", default="bundles/shapes", show_default=True)
@click.option("--engine", default="auto", show_default=True)
@click.option("--sampler", help="[default: the bundle's]")
@click.option("--steps", type=int, help="[default: the bundle's]")
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8), show_default=True)
@click.option("--every", type=int, multiple=True, default=(2, 3, 4), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
def main(
    bundle: str,
    engine: str,
    sampler: str | None,
    steps: int | None,
    batches: tuple[int, ...],
    every: tuple[int, ...],
    rounds: int,
) -> None:
    """Print the table of docs/performance.md."""
    generator = Generator.load(bundle, engine)
    settings: dict[str, Any] = {"sampler": sampler, "steps": steps}

    def measure(batch_and_every: tuple[int, int]) -> float:
        batch, nth = batch_and_every
        options = {"num_images": batch, "batch_size": batch, "guidance_every": nth, **settings}
        return seconds(lambda: generator(PROMPT, **options)) / batch

    # The first round compiles.
    times = interleaved(itertools.product(batches, (1, *every)), measure, rounds, warm_up=1)
    images = {nth: generator(PSNR_PROMPTS, guidance_every=nth, **settings) for nth in (1, *every)}
    job = generator.plan(PROMPT, **settings)[0]
    print(f"{generator.engine.name}, {job.steps} steps of {job.sampler}, medians of {rounds} rounds\n")
    head = [f"s per image, batch {batch} | relative to N = 1" for batch in batches]
    print(f"| N | {' | '.join(head)} | PSNR, dB: median | minimum |")
    print("|---" * (3 + 2 * len(batches)) + "|")
    for nth in (1, *every):
        cells = [str(nth)]
        for batch in batches:
            own, full = times[batch, nth], times[batch, 1]
            ratio = median(a / b for a, b in zip(own, full, strict=True))
            cells += [f"{median(own):.3f}", f"{ratio:.2f}"]
        psnrs = [psnr_db(a, b) for a, b in zip(images[nth], images[1], strict=True)]
        cells += ["", ""] if nth == 1 else [f"{median(psnrs):.1f}", f"{min(psnrs):.1f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
