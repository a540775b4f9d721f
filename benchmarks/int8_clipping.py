"""Compares the rules for clipping int8 activations with each other and with int8 weights only, in PyTorch.

    python benchmarks/int8_clipping.py [--ckpt samples/shapes/shapes.safetensors]

All rules use the same calibration. Errors are measured on the golden inputs of an export: the maximum error relative to the
maximum golden value, and the root mean square error relative to the root mean square of the golden values.
"""

from pathlib import Path

import click
import numpy as np
import torch

from tpx_export import checkpoint
from tpx_export.golden import Golden, conditioning_inputs, text_golden, transformer_golden
from tpx_export.pipeline import Pipeline
from tpx_export.quantise.calibration import CalibrationInputs, collect_activations
from tpx_export.quantise.grid import CLIPPING, MagnitudeHistogram
from tpx_export.quantise.layers import block_linears, modulations
from tpx_export.quantise.linear import replace_layers
from tpx_export.quantise.prompts import choose_subjects
from tpx_runtime.command import TpxCommand


def calibrate(pipeline: Pipeline) -> tuple[dict[str, MagnitudeHistogram], Golden]:
    """Histograms by layer over every depth, and the golden tensors of the transformer."""
    calibration, golden = CalibrationInputs(choose_subjects(pipeline).calibration), Golden()
    for part in pipeline.text:
        encoder = part.load()
        golden |= text_golden(part, encoder)
        calibration.add_text_encoder(part, encoder)
    transformer, rows = pipeline.transformer(), calibration.rows(pipeline)
    layers = block_linears(transformer)
    histograms = {name: MagnitudeHistogram() for name in layers}
    for depth in pipeline.model.depths:
        collect_activations(transformer, layers, histograms, pipeline, rows, depth)
    given = conditioning_inputs(pipeline.text, golden, pipeline.model)
    return histograms, transformer_golden(
        transformer, pipeline.model, given, pipeline.schedule_shift, pipeline.model.depths
    )


@torch.no_grad()
def errors_by_depth(
    pipeline: Pipeline, golden: Golden, rule: str | None, histograms: dict[str, MagnitudeHistogram]
) -> list[str]:
    """For each depth: maximum error, RMS error and share of equal routes; `rule` None quantises only the weights."""
    model, transformer = pipeline.model, pipeline.transformer()
    layers, steps = block_linears(transformer), None
    if rule is None:
        layers |= modulations(transformer)
    else:
        steps = {name: histogram.step_size(rule) for name, histogram in histograms.items()}
    replace_layers(transformer, layers, steps)
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
    histograms, golden = calibrate(pipeline)
    depths = pipeline.model.depths
    click.echo(f"| clipping | {' | '.join(f'depth {depth}' for depth in depths)} |")
    click.echo("|---|" + "---|" * len(depths))
    for rule in (*CLIPPING, None):
        click.echo(
            f"| {rule or 'weights alone'} | {' | '.join(errors_by_depth(pipeline, golden, rule, histograms))} |"
        )


if __name__ == "__main__":
    main()
