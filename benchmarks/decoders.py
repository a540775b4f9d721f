"""Times the image decoders of bundles, as of one model with its own autoencoder and with TAESD.

    tpx-export --base BASE --image-size 512 --out OUT/own
    tpx-export --base BASE --image-size 512 --vae TAESD3 --out OUT/taesd3
    python -m benchmarks.decoders OUT/own OUT/taesd3 [--engine openvino] [--rounds 5]

Each bundle has its own process, which decodes the golden latents once to warm up.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import click

from benchmarks.interleave import seconds
from tpx_engines.bench.memory import peak_bytes
from tpx_runtime.bundle import Bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import ENGINES, resolve
from tpx_runtime.verify import load_golden


def measure(bundle: Path, engine: str, rounds: int) -> tuple[float, list[float], int]:
    """Seconds to load the decoder and decode the first image, seconds of each later one, and the peak of memory in bytes."""
    opened, chosen = Bundle.open(bundle, verify=False), resolve(engine)
    inputs = {"latents": load_golden(opened)["decoder_latents"][:1]}
    began = time.perf_counter()
    session = chosen.open(opened.vae_decoder)
    session.run(inputs)
    first_s = time.perf_counter() - began
    return first_s, [seconds(lambda: session.run(inputs)) for _ in range(rounds)], peak_bytes()


@click.command(cls=TpxCommand)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(list(ENGINES)), default="onnxruntime", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def main(bundles: tuple[Path, ...], engine: str, rounds: int) -> None:
    """Print a table with a row for the decoder of each of BUNDLES."""
    columns = ("bundle", "pixels", "ms per image", "min to max", "load and first image, s", "peak, MiB")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for path in bundles:
        height, width = Bundle.open(path).manifest.model.image_size_px
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            first_s, image_s, peak = pool.submit(measure, path, engine, rounds).result()
        middle, least, most = (1e3 * value for value in (median(image_s), min(image_s), max(image_s)))
        times = f"{middle:.1f} | {least:.1f} to {most:.1f} | {first_s:.1f}"
        print(f"| {path.name} | {width}x{height} | {times} | {peak / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    main()
