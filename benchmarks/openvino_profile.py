"""Where a forward pass of a bundle's transformer spends its time in OpenVINO, by its own counters.

    python benchmarks/openvino_profile.py bundles/shapes [--precision bf16] [--depth 3] [--rows 2] [--runs 60]

Exact shapes, random inputs; the table gives each kind of operation, how often it runs and its share.
"""

from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import openvino

from tpx_runtime.bundle import Bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine.openvino import core
from tpx_runtime.engine.openvino_static import compile_static, model_shapes


@click.command(cls=TpxCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--precision", type=click.Choice(["f32", "bf16"]), default="bf16", show_default=True)
@click.option("--depth", default=3, show_default=True)
@click.option("--rows", default=2, show_default=True)
@click.option("--runs", default=60, show_default=True)
def main(bundle: Path, precision: str, depth: int, rows: int, runs: int) -> None:
    path = Bundle.open(bundle).transformer(depth, "plain")
    shapes = model_shapes(core(), path, rows)
    counting = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": "YES"}
    request = compile_static(core(), path, counting, shapes, parts=1).create_infer_request()
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes}
    spent: dict[str, float] = defaultdict(float)
    ran: dict[str, int] = defaultdict(int)
    for number in range(2 * runs):
        request.infer(inputs)
        if number < runs:  # warming up
            continue
        for step in request.profiling_info:
            if step.status == openvino.ProfilingInfo.Status.EXECUTED and step.real_time:
                spent[step.node_type] += step.real_time.total_seconds()
                ran[step.node_type] += 1
    whole = sum(spent.values())
    print(f"{path.name}, {precision}, {rows} rows: {1e3 * whole / runs:.2f} ms with counters on\n")
    print("| operation | of them | share |\n|---|---|---|")
    for name, seconds in sorted(spent.items(), key=lambda pair: -pair[1]):
        print(f"| {name} | {ran[name] / runs:.0f} | {seconds / whole:.0%} |")


if __name__ == "__main__":
    main()
