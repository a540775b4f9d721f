"""Attention as one node or as standard operators, on a CPU: time and peak memory of a small transformer by its tokens.

    python -m benchmarks.attention [--width 1536 --heads 24] [--latent 32 --latent 64 --latent 128] [--engine onnxruntime]

Two MMDiT blocks with random weights, one of which thinks twice, on two rows; a latent of side S has (S / 2)^2 visual tokens.
Each call is in a process of its own, which says its least milliseconds and the peak of its memory; spellings take turns.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
import numpy as np

from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import ENGINES, resolve

SPELLINGS = ("standard", "one node")


def write(made: str, width: int, heads: int, text_tokens: int, latent: int, precision: str) -> None:
    """Both graphs, over the same weights, and their inputs."""
    import torch

    from tpx_export.fused_attention import FLOATS, fused
    from tpx_export.graphs import Graph, TransformerGraph, to_onnx
    from tpx_export.model.mmdit import MMDiT, MMDiTSpec
    from tpx_export.model.thinking import ThinkingSpec
    from tpx_export.precision import at_precision
    from tpx_export.routing import spellings
    from tpx_export.weights import WeightFile

    folder = Path(made)
    torch.manual_seed(0)
    thinking = ThinkingSpec(blocks=(0,), experts=4, rank=32, max_depth=2)
    spec = MMDiTSpec(
        latent_channels=16,
        latent_size=latent,
        width=width,
        heads=heads,
        blocks=2,
        context_tokens=text_tokens,
        thinking=thinking,
    )
    model = MMDiT(spec)
    for weights in model.parameters():
        if not weights.any():  # adaLN-zero would leave nothing to compare
            torch.nn.init.normal_(weights, std=0.02)
    at_precision(model, precision)
    inputs = {
        "latents": torch.randn(2, 16, latent, latent),
        "conditions": torch.randn(2, spec.conditions_width),
        "context": torch.randn(2, text_tokens, spec.context_width),
    }
    with WeightFile(folder) as file, torch.no_grad():
        graph = Graph(TransformerGraph(model, 2, routed=True), inputs, ("velocity", "routes"))
        _, plain = spellings(file.take(to_onnx(graph)), spec.visual_tokens)
        one_node = fused(plain, FLOATS)
        assert one_node
        for name, spelt in zip(SPELLINGS, (plain, one_node), strict=True):
            file.write(spelt, f"{name}.onnx")
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})


def call(graph: str, engine: str, calls: int) -> None:
    """Print what a call takes, and leave its velocity beside the graph."""
    path = Path(graph)
    inputs = dict(np.load(path.with_name("inputs.npz")))
    session, spent = resolve(engine).open(path), []
    for _ in range(calls):
        began = time.perf_counter()
        outputs = session.run(inputs)
        spent.append(1e3 * (time.perf_counter() - began))
    np.save(path.with_suffix(".npy"), outputs["velocity"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"ms": min(spent), "mb": peak}))


def in_a_process(function: str, *values: object) -> str:
    """What a function of this file prints. It stays small itself: a child's peak begins with its parent's."""
    code = f"import benchmarks.attention as these; these.{function}(*{values!r})"
    return subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout


@click.command(cls=TpxCommand)
@click.option("--width", default=1536, show_default=True)
@click.option("--heads", default=24, show_default=True)
@click.option("--text-tokens", default=333, show_default=True)
@click.option("--latent", "latents", multiple=True, default=(32, 64, 128), show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True)
@click.option(
    "--engine",
    "engines",
    type=click.Choice(list(ENGINES)),
    multiple=True,
    default=("onnxruntime", "openvino", "openvino-bf16"),
    show_default=True,
)
@click.option("--rounds", default=5, show_default=True, help="Processes of each kind.")
@click.option("--calls", default=3, show_default=True, help="In each process; the least counts.")
def main(
    width: int,
    heads: int,
    text_tokens: int,
    latents: tuple[int, ...],
    precision: str,
    engines: tuple[str, ...],
    rounds: int,
    calls: int,
) -> None:
    """Print the table of docs/performance.md."""
    print(f"width {width}, {heads} heads, {text_tokens} text tokens, {precision}\n")
    heading = ["visual tokens", "engine", "standard, ms", "one node, ms", "one node / standard"]
    heading += ["standard, MB", "one node, MB", "difference"]
    print(f"| {' | '.join(heading)} |\n{'|---' * len(heading)}|")
    for latent in latents:
        with TemporaryDirectory() as folder:
            in_a_process("write", folder, width, heads, text_tokens, latent, precision)
            graphs = [Path(folder) / f"{name}.onnx" for name in SPELLINGS]
            for engine in engines:
                found: list[list[dict[str, float]]] = [[], []]
                for _ in range(rounds):
                    for graph, results in zip(graphs, found, strict=True):
                        results.append(json.loads(in_a_process("call", str(graph), engine, calls)))
                standard, one = (np.load(graph.with_suffix(".npy")) for graph in graphs)
                difference = np.abs(standard - one).max() / np.abs(standard).max()
                times = [[result["ms"] for result in results] for results in found]
                wide, narrow = (max(result["mb"] for result in results) for results in found)
                ratios = [b / a for a, b in zip(*times, strict=True)]
                print(
                    f"| {(latent // 2) ** 2} | {engine} | {median(times[0]):.0f} | {median(times[1]):.0f} | "
                    f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
                    f"{wide:.0f} | {narrow:.0f} | {difference:.0e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
