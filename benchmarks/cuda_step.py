"""What one call of a transformer's graph costs in ONNX Runtime on a GPU, and how much of that is transfer.

    python -m benchmarks.cuda_step bundles/shapes/transformer/depth-3.onnx [--batch 2] [--rounds 50]

`call` is what the denoising loop does at each step: upload latents and conditions, run the graph, download velocity and
routes. `graph` is the same without the transfers; the difference is the most that keeping latents on the device could
save. Both are measured with the graph captured as a CUDA graph and without, taking turns; the table gives medians.
"""

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnx

from benchmarks.turns import in_turns, seconds
from tpx_runtime.engine import ENGINES, Arrays
from tpx_runtime.engine.environment import CUDA_GRAPHS_VARIABLE
from tpx_runtime.engine.gpu import local_gpu
from tpx_runtime.engine.onnxruntime_bound import BoundSession


def random_inputs(path: Path, batch: int) -> Arrays:
    """Standard normal arrays in the shapes of the graph's inputs, with `batch` as the dynamic dimension."""
    rng = np.random.default_rng(0)
    found = {}
    for given in onnx.load(path, load_external_data=False).graph.input:
        tensor = given.type.tensor_type
        shape = [size.dim_value or batch for size in tensor.shape.dim]
        found[given.name] = rng.standard_normal(shape, np.float32).astype(
            onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        )
    return found


def opened(path: Path, graphs: bool) -> BoundSession:
    os.environ[CUDA_GRAPHS_VARIABLE] = str(int(graphs))
    session = ENGINES["onnxruntime-cuda"].open(path)
    assert isinstance(session, BoundSession)
    return session


def calls(session: BoundSession, inputs: Arrays) -> dict[str, Callable[[], object]]:
    """A whole call with new latents and conditions each time, and the graph alone on the same buffers."""
    changing = [name for name in ("latents", "conditions") if name in inputs]

    def call() -> object:
        return session.run(inputs | {name: -inputs[name] for name in changing})

    for _ in range(3):  # the first finds its outputs' sizes, the second is captured
        found = session.run(inputs)
    if not all(np.isfinite(array).all() for array in found.values()):
        raise click.ClickException("expected finite outputs, found NaN or infinity; measure another graph")
    (buffers,) = session._bound.values()
    return {"call": call, "graph": buffers.launch}


@click.command()
@click.argument("graph", type=click.Path(path_type=Path))
@click.option(
    "--batch", type=click.IntRange(1), default=2, show_default=True, help="Rows: 2 are one guided picture."
)
@click.option("--rounds", type=click.IntRange(1), default=50, show_default=True)
def main(graph: Path, batch: int, rounds: int) -> None:
    """Print the table for GRAPH, a transformer of a bundle."""
    if problem := ENGINES["onnxruntime-cuda"].problem():
        raise click.ClickException(problem)
    if not graph.is_file():
        raise click.ClickException(f"expected a graph at {graph}, found none; take a transformer of a bundle")
    inputs, gpu = random_inputs(graph, batch), local_gpu()
    found = {
        f"{what}{', CUDA graph' if graphs else ', kernel by kernel'}": one
        for graphs in (True, False)
        for what, one in calls(opened(graph, graphs), inputs).items()
    }
    times = in_turns(found, lambda name: seconds(found[name]), rounds)
    up = sum(inputs[name].nbytes for name in ("latents", "conditions") if name in inputs)
    print(
        f"{gpu.name if gpu else 'no GPU'}: {graph.name}, batch {batch}, {up / 1e6:.2f} MB up at each step\n"
    )
    print("| | ms | of the call |\n|---|---|---|")
    for name in times:
        mine, whole = median(times[name]), median(times[name.replace("graph, ", "call, ", 1)])
        print(f"| {name} | {1e3 * mine:.3f} | {mine / whole:.1%} |")


if __name__ == "__main__":
    main()
