"""The time of one call of a transformer graph in ONNX Runtime on a GPU, and the part of it that is transfer.

    python -m benchmarks.cuda_step bundles/shapes/transformer/depth-3.onnx [--batch 2] [--rounds 50]

`call` is a step of the denoising loop: upload latents and conditions, run the graph, download velocity and routes. `graph`
is the same without the transfers; the difference is an upper bound of what keeping latents on the device can save. Both are
measured with and without a CUDA graph, interleaved; the table gives medians, and the memory that each session holds on the
GPU, weights included.
"""

import os
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnx

from benchmarks.interleave import interleaved, seconds
from tpx_engines.bench.memory import gpu_bytes
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import ENGINES, Arrays
from tpx_runtime.engine.gpu import local_gpu
from tpx_runtime.engine.onnxruntime_bound import BoundSession
from tpx_runtime.environment import CUDA_GRAPHS_VARIABLE


def random_inputs(path: Path, batch: int) -> Arrays:
    """Standard normal arrays with the shapes of the graph's inputs, dynamic dimensions set to `batch`."""
    rng = np.random.default_rng(0)
    inputs = {}
    for value_info in onnx.load(path, load_external_data=False).graph.input:
        tensor = value_info.type.tensor_type
        shape = [size.dim_value or batch for size in tensor.shape.dim]
        inputs[value_info.name] = rng.standard_normal(shape, np.float32).astype(
            onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        )
    return inputs


def open_session(path: Path, graphs: bool) -> BoundSession:
    os.environ[CUDA_GRAPHS_VARIABLE] = str(int(graphs))
    session = ENGINES["onnxruntime-cuda"].open(path)
    assert isinstance(session, BoundSession)
    return session


def timed_calls(session: BoundSession, inputs: Arrays) -> dict[str, Callable[[], object]]:
    """Two functions: `call`, with new latents and conditions each time, and `graph`, on the same device buffers."""
    negated = {name: -inputs[name] for name in ("latents", "conditions") if name in inputs}
    changing = cycle((inputs | negated, inputs))

    def call() -> object:
        return session.run(next(changing))

    for _ in range(3):  # the first calls allocate memory, the third one captures the graph
        outputs = session.run(inputs)
    if not all(np.isfinite(array).all() for array in outputs.values()):
        raise click.ClickException("expected finite outputs, found NaN or infinity; measure another graph")
    (buffers,) = session._bound.values()
    return {"call": call, "graph": buffers.launch}


@click.command(cls=TpxCommand)
@click.argument("graph", type=click.Path(path_type=Path))
@click.option(
    "--batch", type=click.IntRange(1), default=2, show_default=True, help="Rows; a guided image has 2."
)
@click.option("--rounds", type=click.IntRange(1), default=50, show_default=True)
def main(graph: Path, batch: int, rounds: int) -> None:
    """Print the table for GRAPH, the transformer of a bundle."""
    if problem := ENGINES["onnxruntime-cuda"].problem():
        raise click.ClickException(problem)
    if not graph.is_file():
        raise click.ClickException(
            f"expected a graph at {graph}, found none; use the transformer of a bundle"
        )
    inputs, gpu = random_inputs(graph, batch), local_gpu()
    functions, held_bytes = {}, {}
    for graphs in (True, False):
        before = gpu_bytes()
        session = open_session(graph, graphs)
        for what, function in timed_calls(session, inputs).items():
            name = f"{what}{', CUDA graph' if graphs else ', kernel by kernel'}"
            functions[name], held_bytes[name] = function, gpu_bytes() - before
    times = interleaved(functions, lambda name: seconds(functions[name]), rounds)
    upload_bytes = sum(inputs[name].nbytes for name in ("latents", "conditions") if name in inputs)
    print(
        f"{gpu.name if gpu else 'no GPU'}: {graph.name}, batch {batch}, {upload_bytes / 1e6:.2f} MB uploaded per step\n"
    )
    print("| | ms | of the call | GPU, MB |\n|---|---|---|---|")
    for name in times:
        ms, call_ms = median(times[name]), median(times[name.replace("graph, ", "call, ", 1)])
        print(f"| {name} | {1e3 * ms:.3f} | {ms / call_ms:.1%} | {held_bytes[name] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
