"""Profiles a forward pass of a bundle's transformer with OpenVINO's counters, by operation type.

    python benchmarks/openvino_profile.py bundles/shapes [--precision bf16] [--depth 3] [--rows 2] [--runs 60]

Static shapes, random inputs; the table gives the number of executions and the share of the time of each type.
"""

from collections import defaultdict
from pathlib import Path

import click
import numpy as np

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
    config = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": "YES"}
    request = compile_static(core(), path, config, shapes, parts=1).create_infer_request()
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes}
    seconds_by_type: dict[str, float] = defaultdict(float)
    count_by_type: dict[str, int] = defaultdict(int)
    for number in range(2 * runs):
        request.infer(inputs)
        if number < runs:  # warm-up
            continue
        for step in request.profiling_info:
            if step.status.name == "EXECUTED" and step.real_time:
                seconds_by_type[step.node_type] += step.real_time.total_seconds()
                count_by_type[step.node_type] += 1
    total = sum(seconds_by_type.values())
    print(f"{path.name}, {precision}, {rows} rows: {1e3 * total / runs:.2f} ms with counters on\n")
    print("| operation | count | share |\n|---|---|---|")
    for name, seconds in sorted(seconds_by_type.items(), key=lambda pair: -pair[1]):
        print(f"| {name} | {count_by_type[name] / runs:.0f} | {seconds / total:.0%} |")


if __name__ == "__main__":
    main()
