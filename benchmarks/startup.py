"""From process start to PNG on disk: tpx-run against the same model in PyTorch eager, both as whole processes.

    python -m benchmarks.startup [--runs 7]

The two take turns (A B A B ...); times are medians, memory is the operating system's peak of each process, and the PSNR
between the two pictures shows that it is the same work.
"""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
from PIL import Image

from benchmarks.turns import in_turns
from tpx_runtime.evaluation.similarity import psnr_db

PROMPT, SEED, STEPS = "a red cube on a blue sphere", 0, 20
EAGER = Path(__file__).with_name("pytorch_eager.py")


def spent(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak megabytes of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise click.ClickException(
            f"expected exit code 0, found {os.waitstatus_to_exitcode(status)}: {command}"
        )
    return seconds, usage.ru_maxrss / 1024


@click.command()
@click.option("--bundle", default="bundles/shapes", show_default=True)
@click.option("--ckpt", default="samples/shapes/shapes.safetensors", show_default=True)
@click.option("--runs", default=7, show_default=True)
@click.option("--engine", "engines", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
def main(bundle: str, ckpt: str, runs: int, engines: tuple[str, ...]) -> None:
    """Print the table of docs/performance.md."""
    with TemporaryDirectory() as folder:
        pictures = {name: Path(folder) / f"{name}.png" for name in ("pytorch", *engines)}
        common = ["--seed", str(SEED), "--steps", str(STEPS), "--force"]
        program = str(Path(sys.executable).with_name("tpx-run"))
        commands = {
            "pytorch": [sys.executable, str(EAGER), PROMPT, "--ckpt", ckpt, "--out", str(pictures["pytorch"])]
            + ["--seed", str(SEED), "--steps", str(STEPS)]
        }
        for engine in engines:
            commands[engine] = [program, PROMPT, "--bundle", bundle, "--engine", engine, *common]
            commands[engine] += ["--out", str(pictures[engine])]
        # The first round fills the disk cache.
        found = in_turns(commands, lambda name: spent(commands[name]), runs, warm_up=1)
        print(f"{platform.machine()}, {os.cpu_count()} cores, {STEPS} steps, medians of {runs}\n")
        print("| process | seconds | of PyTorch's | peak MB | PSNR to PyTorch's, dB |\n|---|---|---|---|---|")
        for name, results in found.items():
            seconds = median(s for s, _ in results)
            ratio = median(s / e for (s, _), (e, _) in zip(results, found["pytorch"], strict=True))
            megabytes = max(m for _, m in results)
            same = ""
            if name != "pytorch":
                with Image.open(pictures[name]) as mine, Image.open(pictures["pytorch"]) as theirs:
                    same = f"{psnr_db(mine, theirs):.1f}"
            print(f"| {name} | {seconds:.2f} | {ratio:.2f} | {megabytes:.0f} | {same} |")


if __name__ == "__main__":
    main()
