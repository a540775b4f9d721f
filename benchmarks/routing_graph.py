"""Times the two routing variants for CPUs in the whole transformer of a bundle.

    python -m benchmarks.routing_graph bundles/shapes [--rounds 25]

The deepest graph is run in each variant, interleaved (A B A B ...), on the golden inputs repeated to more rows; the table
gives median milliseconds of a forward pass.
"""

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
import numpy as np
import onnx
import onnx.inliner

from benchmarks.interleave import interleaved, seconds
from tpx_export.operator import register_schema
from tpx_export.routing import masked, permuted
from tpx_runtime.bundle import Bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import Session, resolve
from tpx_runtime.verify import load_golden

ROWS = (2, 16)


def with_body(graph: onnx.ModelProto, body: onnx.FunctionProto, path: Path) -> Path:
    """Save the graph with `body` inlined for routing and its weights inside; returns `path`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    del copy.functions[:]
    copy.functions.append(body)
    onnx.save(onnx.inliner.inline_local_functions(copy), path)
    return path


def medians(sessions: list[Session], inputs: dict[str, np.ndarray], rounds: int) -> list[float]:
    """Median milliseconds of each session on the same inputs."""

    def measure(which: int) -> float:
        return 1e3 * seconds(lambda: sessions[which].run(inputs))

    # The first two rounds are slower.
    times = interleaved(range(len(sessions)), measure, rounds, warm_up=2)
    return [median(session_times) for session_times in times.values()]


@click.command(cls=TpxCommand)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--rounds", default=25, show_default=True, help="Timed runs of each variant.")
@click.option("--engine", "engines", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
def main(path: Path, rounds: int, engines: tuple[str, ...]) -> None:
    """Print the table of docs/routing.md."""
    register_schema()
    bundle = Bundle.open(path, verify=False)
    model, golden = bundle.manifest.model, load_golden(bundle)
    graph = onnx.load(bundle.transformer(model.depths[-1]))
    print("| engine | rows x tokens | masked, ms | permuted, ms |\n|---|---|---|---|")
    with TemporaryDirectory() as folder:
        bodies = {"masked": masked(), "permuted": permuted(model.experts)}
        paths = [with_body(graph, body, Path(folder) / f"{name}.onnx") for name, body in bodies.items()]
        for name in engines:
            sessions = [resolve(name).open(variant_path) for variant_path in paths]
            for rows in ROWS:
                inputs = {
                    n: np.resize(golden[n], (rows, *golden[n].shape[1:])) for n in model.transformer_inputs
                }
                masked_ms, permuted_ms = medians(sessions, inputs, rounds)
                print(
                    f"| {name} | {rows} x {model.visual_tokens} | {masked_ms:.2f} | {permuted_ms:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
