"""What cheaper steps save and change: `--guidance-every`, `--cache-interval`, and fewer steps for comparison.

    python -m benchmarks.cheaper_steps [--bundle bundles/shapes] [--engine onnxruntime] [--sampler euler] [--steps 20]

The settings are interleaved; times are medians, and ratios are medians of the ratios of each round. PSNR is to the image of
all steps in full, by the bundle itself or by `--reference`, on every 24th prompt of ShapesEval, which includes every kind,
or on every class. Below 35 dB an image counts as another one.
"""

import itertools
from statistics import median
from typing import Any

import click
from PIL import Image

from benchmarks.interleave import interleaved, seconds
from samples.shapes.prompt_list import listed_prompts
from tpx_runtime import Generator
from tpx_runtime.command import TpxCommand
from tpx_runtime.evaluation.similarity import psnr_db

PSNR_PROMPTS = [listed.text for listed in listed_prompts()][::24]
PROMPT = "a red cube on a blue sphere"
SAME_DB = 35
FULL = "all in full"


@click.command(cls=TpxCommand)
@click.option("--bundle", default="bundles/shapes", show_default=True)
@click.option("--reference", help="Bundle that generates the images to compare with.  [default: BUNDLE]")
@click.option("--engine", default="auto", show_default=True)
@click.option("--sampler", help="[default: the bundle's]")
@click.option("--steps", type=int, help="[default: the bundle's]")
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8), show_default=True)
@click.option("--guidance-every", "guidance", type=int, multiple=True, default=(2, 4), show_default=True)
@click.option("--cache-interval", "caches", type=int, multiple=True, default=(2, 3, 4), show_default=True)
@click.option("--fewer-steps", "fewer", type=int, multiple=True, help="Numbers of steps to compare with.")
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
def main(
    bundle: str,
    reference: str | None,
    engine: str,
    sampler: str | None,
    steps: int | None,
    batches: tuple[int, ...],
    guidance: tuple[int, ...],
    caches: tuple[int, ...],
    fewer: tuple[int, ...],
    rounds: int,
) -> None:
    """Print the tables of docs/cheaper-steps.md."""
    generator = Generator.load(bundle, engine)
    classes = generator.manifest.model.classes
    timed = {"class_id": 0} if classes else {"prompt": PROMPT}
    full: dict[str, Any] = {"sampler": sampler, "steps": steps}
    settings = {FULL: full}
    settings |= {f"guidance every {n}": {**full, "guidance_every": n} for n in guidance}
    settings |= {f"cache interval {n}": {**full, "cache_interval": n} for n in caches}
    settings |= {f"{n} steps": {**full, "steps": n} for n in fewer}

    def measure(batch_and_name: tuple[int, str]) -> float:
        batch, name = batch_and_name
        return (
            seconds(lambda: generator(**timed, num_images=batch, batch_size=batch, **settings[name])) / batch
        )

    def draw(generator: Generator, setting: dict[str, Any]) -> list[Image.Image]:
        if classes:
            jobs = [job for number in range(classes) for job in generator.plan(class_id=number, **setting)]
            return generator.generate(jobs)
        return generator(PSNR_PROMPTS, **setting)

    # The first round compiles.
    times = interleaved(itertools.product(batches, settings), measure, rounds, warm_up=1)
    expected = draw(Generator.load(reference, engine) if reference else generator, full)
    job = generator.plan(**timed, **full)[0]
    print(f"{generator.engine.name}, {job.steps} steps of {job.sampler}, medians of {rounds} rounds\n")
    head = [f"s per image, batch {batch} | relative to {FULL}" for batch in batches]
    print(f"| steps | {' | '.join(head)} | PSNR, dB: median | minimum | below {SAME_DB} of {len(expected)} |")
    print("|---" * (4 + 2 * len(batches)) + "|")
    for name in settings:
        cells = [name]
        for batch in batches:
            own, whole = times[batch, name], times[batch, FULL]
            ratio = median(a / b for a, b in zip(own, whole, strict=True))
            cells += [f"{median(own):.3f}", f"{ratio:.2f}"]
        if name == FULL and not reference:  # the reference itself
            print(f"| {' | '.join([*cells, '', '', ''])} |")
            continue
        images = draw(generator, settings[name])
        psnrs = [psnr_db(image, other) for image, other in zip(images, expected, strict=True)]
        cells += [f"{median(psnrs):.1f}", f"{min(psnrs):.1f}", str(sum(db < SAME_DB for db in psnrs))]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
