"""Attention as one fused node and as standard operators on a CPU: time and peak memory by number of tokens.

    python -m benchmarks.attention [--width 1536 --heads 24] [--latent 32 --latent 64 --latent 128] [--engine onnxruntime]

Two MMDiT blocks with random weights, one of them with two latent steps, on two rows; a latent of side S has (S / 2)^2
visual tokens. Each measurement runs in a new process, which reports its fastest call and its peak memory; the graphs are
interleaved.
"""

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from benchmarks.interleave import interleaved
from tpx_engines.bench.memory import peak_bytes
from tpx_engines.bench.process import WorkerProcess
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import ENGINES, resolve

VARIANTS = ("standard", "one node")


def write_graphs(
    folder: str, width: int, heads: int, text_tokens: int, latent: int, precision: str
) -> dict[str, Any]:
    """Write both graphs, with shared weights, and their inputs into `folder`."""
    import torch

    from tpx_export.fusion import FLOAT_TYPES, fuse_attention
    from tpx_export.graphs import Graph, TransformerGraph
    from tpx_export.model.mmdit import MMDiT, MMDiTSpec
    from tpx_export.model.thinking import ThinkingSpec
    from tpx_export.precision import cast_to_precision
    from tpx_export.routing import routing_variants
    from tpx_export.tracing import to_onnx
    from tpx_export.weights import WeightFile

    torch.manual_seed(0)
    thinking = ThinkingSpec(blocks=(0,), experts=4, rank=32, max_depth=2)
    spec = MMDiTSpec(
        latent_channels=16,
        latent_size=(latent, latent),
        width=width,
        heads=heads,
        blocks=2,
        context_tokens=text_tokens,
        thinking=thinking,
    )
    model = MMDiT(spec)
    for weights in model.parameters():
        if not weights.any():  # with adaLN-zero weights, all outputs would be zero
            torch.nn.init.normal_(weights, std=0.02)
    cast_to_precision(model, precision)
    inputs = {
        "latents": torch.randn(2, 16, latent, latent),
        "conditions": torch.randn(2, spec.conditions_width),
        "context": torch.randn(2, text_tokens, spec.context_width),
    }
    with WeightFile(Path(folder)) as file, torch.no_grad():
        graph = Graph(TransformerGraph(model, 2, routed=True), inputs, ("velocity", "routes"))
        _, standard = routing_variants(file.externalise(to_onnx(graph)), spec.visual_tokens)
        one_node = fuse_attention(standard, FLOAT_TYPES)
        assert one_node
        for name, graph_proto in zip(VARIANTS, (standard, one_node), strict=True):
            file.write(graph_proto, f"{name}.onnx")
    np.savez(Path(folder) / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})  # type: ignore[arg-type]
    return {}


def time_graph(graph: str, engine: str, calls: int) -> dict[str, Any]:
    """Milliseconds of the fastest call and peak memory in MB; saves the velocity beside the graph."""
    path = Path(graph)
    inputs = dict(np.load(path.with_name("inputs.npz")))
    session, times_ms = resolve(engine).open(path), []
    for _ in range(calls):
        began = time.perf_counter()
        outputs = session.run(inputs)
        times_ms.append(1e3 * (time.perf_counter() - began))
    np.save(path.with_suffix(".npy"), outputs["velocity"])
    return {"ms": min(times_ms), "mb": peak_bytes() / 2**20}


def in_subprocess(function: str, **arguments: object) -> dict[str, Any]:
    """Run a function of this module in a new process and return its result."""
    with TemporaryDirectory() as folder, WorkerProcess(Path(folder)) as worker:
        return worker.ask("call", function=f"benchmarks.attention:{function}", arguments=arguments)


def comparison_cells(graphs: list[Path], engine: str, rounds: int, calls: int) -> str:
    """The table cells that compare both graphs on `engine`."""

    def measure(graph: Path) -> dict[str, Any]:
        return in_subprocess("time_graph", graph=str(graph), engine=engine, calls=calls)

    results_by_graph = interleaved(graphs, measure, rounds).values()
    standard, one = (np.load(graph.with_suffix(".npy")) for graph in graphs)
    difference = np.abs(standard - one).max() / np.abs(standard).max()
    times = [[result["ms"] for result in results] for results in results_by_graph]
    standard_mb, one_mb = (max(result["mb"] for result in results) for results in results_by_graph)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return (
        f"{median(times[0]):.0f} | {median(times[1]):.0f} | "
        f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{standard_mb:.0f} | {one_mb:.0f} | {difference:.0e}"
    )


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
@click.option("--rounds", default=5, show_default=True, help="Processes per graph.")
@click.option("--calls", default=3, show_default=True, help="Calls per process; the fastest counts.")
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
    """Print the table of docs/optimisations.md."""
    print(f"width {width}, {heads} heads, {text_tokens} text tokens, {precision}\n")
    heading = ["visual tokens", "engine", "standard, ms", "one node, ms", "one node / standard"]
    heading += ["standard, MB", "one node, MB", "difference"]
    print(f"| {' | '.join(heading)} |\n{'|---' * len(heading)}|")
    for latent in latents:
        with TemporaryDirectory() as folder:
            sizes = {"width": width, "heads": heads, "text_tokens": text_tokens, "latent": latent}
            in_subprocess("write_graphs", folder=folder, precision=precision, **sizes)
            graphs = [Path(folder) / f"{name}.onnx" for name in VARIANTS]
            for engine in engines:
                print(
                    f"| {(latent // 2) ** 2} | {engine} | {comparison_cells(graphs, engine, rounds, calls)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
