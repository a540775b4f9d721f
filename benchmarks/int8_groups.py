"""How OpenVINO's groups of activations change a bundle with int8 weights: milliseconds of a transformer call, and its error.

    python -m benchmarks.int8_groups BUNDLE [--engine openvino] [--rounds 9]

OpenVINO rounds the other factor of a product with int8 weights to int8 too, with a step for each group of so many values of
a row; group 0 keeps it in float. All candidates run in one process, in turn, on the golden inputs. Errors are those of
tpx-verify.
"""

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.interleave import interleaved, seconds
from tpx_runtime.bundle import Bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.verify import load_golden, relative_error

GROUPS = (0, 32, 64, 128, 256)


@click.command(cls=TpxCommand, extra="openvino")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--engine", default="openvino", type=click.Choice(["openvino", "openvino-bf16"]))
@click.option("--rounds", default=9, type=click.IntRange(1))
def main(bundle: Path, engine: str, rounds: int) -> None:
    """Print the table as Markdown."""
    from tpx_runtime.engine.openvino import compile_config, compile_dynamic
    from tpx_runtime.engine.openvino_graph import Graph

    opened = Bundle.open(bundle)
    model, golden = opened.manifest.model, load_golden(opened)
    depth = opened.manifest.defaults.depth
    path = opened.transformer(depth, "plain")
    inputs = {name: golden[name] for name in model.transformer_inputs}

    def compiled(group: int) -> Graph:
        config: dict[str, Any] = compile_config(engine, path)
        return Graph(compile_dynamic(path, config | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)}))

    graphs = {group: compiled(group) for group in GROUPS}
    expected = golden[f"{model.prediction}_{depth}"]
    errors = {
        group: relative_error(graph.run(inputs)[model.prediction], expected)
        for group, graph in graphs.items()
    }
    times = interleaved(GROUPS, lambda group: seconds(partial(graphs[group].run, inputs)), rounds)
    click.echo(f"{opened.root.name} in {engine}, {len(expected)} rows, depth {depth}\n")
    click.echo("| group | ms | error |\n|---|---|---|")
    for group in GROUPS:
        click.echo(f"| {group or 'float'} | {1e3 * median(times[group]):.1f} | {errors[group]:.1e} |")


if __name__ == "__main__":
    main()
