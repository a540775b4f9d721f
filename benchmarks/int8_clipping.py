"""Compares the rules for clipping int8 activations and for rounding the weights that they are multiplied by, in PyTorch.

    python benchmarks/int8_clipping.py [--ckpt samples/shapes/shapes.safetensors]

All rules use the same calibration. Errors are measured on the golden inputs of an export: the maximum error relative to the
maximum golden value, and the root mean square error relative to the root mean square of the golden values. Weights are at
most 64 steps and rounded with GPTQ, as in an export, if a row does not say otherwise.
"""

from pathlib import Path

import click
import numpy as np
import torch

from tpx_export import checkpoint
from tpx_export.golden import Golden, conditioning_inputs, text_golden, transformer_golden
from tpx_export.pipeline import Pipeline
from tpx_export.quantise.activation_grid import CLIPPING
from tpx_export.quantise.calibration import CalibrationInputs, HistogramAndGram, collect_activations
from tpx_export.quantise.gptq import quantise_with_gram
from tpx_export.quantise.layers import block_linears
from tpx_export.quantise.linear import replace_layers
from tpx_export.quantise.prompts import choose_subjects
from tpx_export.quantise.weight_grid import INT8, INT8_BY_INT8, WeightGrid, quantise_weight
from tpx_runtime.command import TpxCommand

Records = dict[str, HistogramAndGram]
# A row of the table: its name, the clipping (None for float activations), the weights' grid, and whether to use GPTQ.
Row = tuple[str, str | None, WeightGrid, bool]
ROWS: tuple[Row, ...] = (
    *((rule, rule, INT8_BY_INT8, True) for rule in CLIPPING),
    ("mse, weights plainly rounded", "mse", INT8_BY_INT8, False),
    ("mse, weights to 127 steps and plainly rounded", "mse", INT8, False),
    ("weights alone", None, INT8_BY_INT8, True),
    ("weights alone, plainly rounded", None, INT8_BY_INT8, False),
    ("weights alone, to 127 steps and plainly rounded", None, INT8, False),
)


def calibrate(pipeline: Pipeline) -> tuple[Records, Golden]:
    """A record of the inputs of each layer over every depth, and the golden tensors of the transformer."""
    calibration, golden = CalibrationInputs(choose_subjects(pipeline).calibration), Golden()
    for part in pipeline.text:
        encoder = part.load()
        golden |= text_golden(part, encoder)
        calibration.add_text_encoder(part, encoder)
    transformer, rows = pipeline.transformer(), calibration.rows(pipeline)
    layers = block_linears(transformer)
    records = {name: HistogramAndGram() for name in layers}
    for depth in pipeline.model.depths:
        collect_activations(transformer, layers, records, pipeline, rows, depth)
    given = conditioning_inputs(pipeline.text, golden, pipeline.model)
    return records, transformer_golden(
        transformer, pipeline.model, given, pipeline.schedule_shift, pipeline.model.depths
    )


@torch.no_grad()
def errors_by_depth(pipeline: Pipeline, golden: Golden, records: Records, row: Row) -> list[str]:
    """For each depth: maximum error, RMS error and share of equal routes."""
    _, rule, grid, gptq = row
    model, transformer = pipeline.model, pipeline.transformer()
    layers, steps = block_linears(transformer), None
    if rule is not None:
        steps = {name: record.histogram.step_size(rule) for name, record in records.items()}
    replace_layers(transformer, layers, steps)
    for name, layer in layers.items():
        quantised, weight = transformer.get_submodule(name), layer.weight.detach()
        quantised.weight, quantised.steps = (
            quantise_with_gram(weight, grid, records[name].gram) if gptq else quantise_weight(weight, grid)
        )
    known = [torch.from_numpy(golden[name]) for name in model.conditions_inputs]
    given = {name: torch.from_numpy(golden[name]) for name in model.transformer_inputs}
    given["conditions"] = transformer.conditions(*known)  # type: ignore[operator]
    cells = []
    for depth in model.depths:
        outputs, routes = transformer.denoise(*given.values(), depth)  # type: ignore[operator]
        expected = golden[f"{model.prediction}_{depth}"]
        error = outputs.numpy() - expected
        max_error = np.abs(error).max() / np.abs(expected).max()
        rms_error = np.sqrt(np.square(error).mean() / np.square(expected).mean())
        equal_routes = (routes.numpy() == golden[f"routes_{depth}"]).mean() if model.thinking_blocks else 1.0
        cells.append(f"{max_error:.1e}, {rms_error:.1e}, {equal_routes:.2%}")
    return cells


@click.command(cls=TpxCommand)
@click.option("--ckpt", type=click.Path(path_type=Path), default=Path("samples/shapes/shapes.safetensors"))
def main(ckpt: Path) -> None:
    """Print the table as Markdown."""
    pipeline = Pipeline.from_model(checkpoint.load(ckpt))
    records, golden = calibrate(pipeline)
    depths = pipeline.model.depths
    click.echo(f"| clipping | {' | '.join(f'depth {depth}' for depth in depths)} |")
    click.echo("|---|" + "---|" * len(depths))
    for row in ROWS:
        click.echo(f"| {row[0]} | {' | '.join(errors_by_depth(pipeline, golden, records, row))} |")


if __name__ == "__main__":
    main()
