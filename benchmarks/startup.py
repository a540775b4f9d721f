"""Times whole processes, from start to PNG on disk: tpx-run and the same model in PyTorch eager.

    python -m benchmarks.startup [--runs 7]

The processes are interleaved (A B A B ...); times are medians, memory is the operating system's peak of each process, and
the PSNR between the images shows that they do the same work.
"""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile

import click
from PIL import Image

from benchmarks.interleave import interleaved
from tpx_runtime.command import TpxCommand
from tpx_runtime.evaluation.similarity import psnr_db

PROMPT, SEED, STEPS = "a red cube on a blue sphere", 0, 20
EAGER = Path(__file__).with_name("pytorch_eager.py")


def run_process(command: list[str]) -> tuple[float, float]:
    """Run a process; returns wall seconds and peak megabytes. Raises ClickException, with its last line, if it fails."""
    # Python caches compiled modules unless this is set, as it is in many containers.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with TemporaryFile() as errors:  # not a pipe, which would have to be read meanwhile
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = code = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        lines = errors.read().decode(errors="replace").splitlines() or ["no message"]
    if code:
        raise click.ClickException(f"expected exit code 0, found {code} ({lines[-1]}): {command}")
    return seconds, usage.ru_maxrss / 1024


@click.command(cls=TpxCommand)
@click.option("--bundle", default="bundles/shapes", show_default=True)
@click.option("--ckpt", default="samples/shapes/shapes.safetensors", show_default=True)
@click.option("--runs", default=7, show_default=True)
@click.option("--engine", "engines", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
def main(bundle: str, ckpt: str, runs: int, engines: tuple[str, ...]) -> None:
    """Print the table of docs/performance.md."""
    with TemporaryDirectory() as folder:
        images = {name: Path(folder) / f"{name}.png" for name in ("pytorch", *engines)}
        common = ["--seed", str(SEED), "--steps", str(STEPS), "--force"]
        program = str(Path(sys.executable).with_name("tpx-run"))
        commands = {
            "pytorch": [sys.executable, str(EAGER), PROMPT, "--ckpt", ckpt, "--out", str(images["pytorch"])]
            + ["--seed", str(SEED), "--steps", str(STEPS)]
        }
        for engine in engines:
            commands[engine] = [program, PROMPT, "--bundle", bundle, "--engine", engine, *common]
            commands[engine] += ["--out", str(images[engine])]
        # The warm-up round fills the disk cache.
        results_by_process = interleaved(commands, lambda name: run_process(commands[name]), runs, warm_up=1)
        print(f"{platform.machine()}, {os.cpu_count()} cores, {STEPS} steps, medians of {runs}\n")
        print(
            "| process | seconds | relative to PyTorch | peak MB | PSNR to PyTorch, dB |\n|---|---|---|---|---|"
        )
        for name, results in results_by_process.items():
            seconds = median(s for s, _ in results)
            ratio = median(
                s / e for (s, _), (e, _) in zip(results, results_by_process["pytorch"], strict=True)
            )
            megabytes = max(m for _, m in results)
            psnr = ""
            if name != "pytorch":
                with Image.open(images[name]) as ours, Image.open(images["pytorch"]) as theirs:
                    psnr = f"{psnr_db(ours, theirs):.1f}"
            print(f"| {name} | {seconds:.2f} | {ratio:.2f} | {megabytes:.0f} | {psnr} |")


if __name__ == "__main__":
    main()
