"""A call of a bundle's transformer in OpenVINO, on the whole batch or on two halves of it in parallel, in turns.

    python -m benchmarks.openvino_halves bundles/shapes [--engine openvino-bf16] [--rows 2] [--turns 60] [--calls 50]

Each turn has a line of its own, because a virtual machine may be given other cores between turns.
"""

from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.turns import settled_seconds, turns
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
@click.option("--turns", "many", default=60, show_default=True)
@click.option("--calls", default=50, show_default=True, help="Of each kind in a turn.")
def main(bundle: Path, engine: str, depth: int, rows: int, many: int, calls: int) -> None:
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
        return 1e3 * settled_seconds(lambda: graphs[parts].run(inputs), calls)

    spent = []
    for turn in turns(graphs, measure, many):
        spent.append(turn)
        whole, halves = turn.values()
        print(f"| {len(spent)} | {whole:.2f} | {halves:.2f} | {whole / halves:.2f} |", flush=True)
    ratios = sorted(turn[1] / turn[2] for turn in spent)
    whole, halves = (median(turn[parts] for turn in spent) for parts in graphs)
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(
        f"| median | {whole:.2f} | {halves:.2f} | {median(ratios):.2f} (80% of turns: {low:.2f} to {high:.2f}) |"
    )


if __name__ == "__main__":
    main()
