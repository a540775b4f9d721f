"""Times a bundle's transformer in OpenVINO on the whole batch and on two parallel halves of it, interleaved.

    python -m benchmarks.openvino_halves bundles/shapes [--engine openvino-bf16] [--rows 2] [--turns 60] [--calls 50]

Each turn is printed on its own line, because a virtual machine may change its cores between turns.
"""

from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.interleave import interleaved_rounds, warm_seconds
from tpx_runtime.bundle import Bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import openvino
from tpx_runtime.engine.openvino_graph import StaticGraph
from tpx_runtime.engine.openvino_static import compile_static, model_shapes


@click.command(cls=TpxCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--engine", type=click.Choice(list(openvino.PRECISIONS)), default="openvino-bf16", show_default=True
)
@click.option("--depth", default=3, show_default=True)
@click.option("--rows", default=2, show_default=True)
@click.option("--turns", "num_turns", default=60, show_default=True)
@click.option("--calls", default=50, show_default=True, help="Calls of each kind per turn.")
def main(bundle: Path, engine: str, depth: int, rows: int, num_turns: int, calls: int) -> None:
    path, core = Bundle.open(bundle).transformer(depth, "plain"), openvino.core()
    shapes, config = model_shapes(core, path, rows), openvino.compile_config(engine, path)
    graphs = {
        parts: StaticGraph(compile_static(core, path, config, shapes, parts), parts) for parts in (1, 2)
    }
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes}
    print(
        f"{path.name}, {engine}, {rows} rows\n\n| turn | whole, ms | halves, ms | whole / halves |\n|---|---|---|---|"
    )

    def measure(parts: int) -> float:
        return 1e3 * warm_seconds(lambda: graphs[parts].run(inputs), calls)

    results = []
    for turn in interleaved_rounds(graphs, measure, num_turns):
        results.append(turn)
        whole, halves = turn.values()
        print(f"| {len(results)} | {whole:.2f} | {halves:.2f} | {whole / halves:.2f} |", flush=True)
    ratios = sorted(turn[1] / turn[2] for turn in results)
    whole, halves = (median(turn[parts] for turn in results) for parts in graphs)
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(
        f"| median | {whole:.2f} | {halves:.2f} | {median(ratios):.2f} (80% of turns: {low:.2f} to {high:.2f}) |"
    )


if __name__ == "__main__":
    main()
