"""Compares groups for int4 weights: the error of the weights, of the model's predictions, and milliseconds.

    python -m benchmarks.int4_groups [BUNDLE] [--ckpt samples/shapes/shapes.safetensors] [--rounds 9]

BUNDLE is an export of the checkpoint; its golden inputs are used. Errors are root mean squares relative to those of the
exact values, for all weights that int4-weights stores in int4 (float activations). Times are of one product with the size
of Stable Diffusion 3's MLP, 2,048 tokens, in each engine on this machine, in turn.
"""

from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from benchmarks.interleave import interleaved, seconds
from tpx_export import checkpoint
from tpx_export.graphs import Graph
from tpx_export.pipeline import Pipeline
from tpx_export.quantise.layers import block_linears, modulations
from tpx_export.quantise.linear import QuantisedLinear
from tpx_export.quantise.weight_grid import dequantise_weight, int4, quantise_weight
from tpx_export.tracing import to_onnx
from tpx_runtime.bundle import Bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import ENGINES
from tpx_runtime.verify import load_golden

GROUPS = (32, 64, 128)
TOKENS, WIDTH, OUT = 2048, 1536, 6144
CPU_ENGINES = ("onnxruntime", "openvino", "openvino-bf16")

Floats = npt.NDArray[np.floating]


def relative_rms(found: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@torch.no_grad()
def errors(pipeline: Pipeline, golden: dict[str, Floats], group: int) -> tuple[float, float]:
    """The error of the weights, and that of the prediction at the default depth."""
    transformer, model, depth = pipeline.transformer(), pipeline.model, pipeline.defaults.depth
    weights, rounded = [], []
    for layer in (block_linears(transformer) | modulations(transformer)).values():
        weights.append(layer.weight.detach().clone())
        layer.weight.copy_(dequantise_weight(*quantise_weight(layer.weight, int4(group))).t())
        rounded.append(layer.weight.detach())
    conditions = transformer.conditions(*(torch.from_numpy(golden[name]) for name in model.conditions_inputs))  # type: ignore[operator]
    given: dict[str, Tensor] = {name: torch.from_numpy(golden[name]) for name in model.transformer_inputs}
    prediction = transformer.denoise(*(given | {"conditions": conditions}).values(), depth)[0]  # type: ignore[operator]
    of_weights = relative_rms(
        *(torch.cat([one.flatten() for one in all_]).numpy() for all_ in (rounded, weights))
    )
    return of_weights, relative_rms(prediction.numpy(), golden[f"{model.prediction}_{depth}"])


def write_product(path: Path, group: int | None) -> None:
    """A graph of one product with an int4 weight, or with an int8 one for group None."""
    linear = nn.Linear(WIDTH, OUT, bias=False)
    layer = QuantisedLinear(linear, None)
    if group is not None:
        layer.weight, layer.steps = quantise_weight(linear.weight.detach(), int4(group))
    ir.save(to_onnx(Graph(layer, {"x": torch.zeros(2, WIDTH)}, ("y",))), path)


def milliseconds(folder: Path, rounds: int) -> dict[tuple[int | None, str], float]:
    """Medians by group, None for int8, and engine."""
    x = np.random.default_rng(1).standard_normal((TOKENS, WIDTH)).astype(np.float32)
    sessions = {}
    for group in (None, *GROUPS):
        path = folder / f"{group}.onnx"
        write_product(path, group)
        for name in CPU_ENGINES:
            if ENGINES[name].problem() is None:
                sessions[group, name] = ENGINES[name].open(path)
    runs = {key: partial(session.run, {"x": x}) for key, session in sessions.items()}
    times = interleaved(runs, lambda key: seconds(runs[key]), rounds, warm_up=2)
    return {key: 1e3 * median(values) for key, values in times.items()}


@click.command(cls=TpxCommand, extra="export")
@click.argument("bundle", type=click.Path(path_type=Path), default=Path("bundles/shapes"))
@click.option("--ckpt", type=click.Path(path_type=Path), default=Path("samples/shapes/shapes.safetensors"))
@click.option("--rounds", default=9, type=click.IntRange(1))
def main(bundle: Path, ckpt: Path, rounds: int) -> None:
    """Print two tables as Markdown."""
    golden, pipeline = load_golden(Bundle.open(bundle)), Pipeline.from_model(checkpoint.load(ckpt))
    click.echo("| group | bits per weight | error of weights | of the prediction |\n|---|---|---|---|")
    for group in GROUPS:
        cells = " | ".join(f"{error:.3f}" for error in errors(pipeline, golden, group))
        click.echo(f"| {group} | {4 + 32 / group:.2f} | {cells} |")
    with TemporaryDirectory() as folder:
        times = milliseconds(Path(folder), rounds)
    names = [name for name in CPU_ENGINES if (None, name) in times]
    click.echo(f"\n| weights | {' | '.join(f'{name}, ms' for name in names)} |\n|---|{'---|' * len(names)}")
    for label, key in (("int8", None), *((f"int4, group {group}", group) for group in GROUPS)):
        click.echo(f"| {label} | {' | '.join(f'{times[key, name]:.0f}' for name in names)} |")


if __name__ == "__main__":
    main()
