"""The command tpx-export."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpx_runtime.command import TpxCommand, warnings_as_notices
from tpx_runtime.errors import BadInput
from tpx_runtime.image_size import parse_size

if TYPE_CHECKING:
    from tpx_export.pipeline import Pipeline
    from tpx_export.summary import Summary

_PATH = click.Path(path_type=Path)


@click.command(cls=TpxCommand, extra="export")
@click.option("--ckpt", type=_PATH, help="TPX checkpoint, .safetensors or .pt.")
@click.option(
    "--base", type=_PATH, help="Instead: a diffusers folder or single file of SD3 or SD3.5, or a DiT file."
)
@click.option("--components", type=_PATH, help="Diffusers folder with the parts that BASE lacks.")
@click.option(
    "--vae", type=_PATH, help="Diffusers folder of an autoencoder to use instead of BASE's, such as TAESD's."
)
@click.option("--adapters", type=_PATH, help="Thinking adapters for BASE, tpx.safetensors.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    help="FILE or FILE:SCALE, a LoRA of SD3 to merge into BASE's weights; may be repeated.",
)
@click.option("--image-size", help="Pixels, WIDTHxHEIGHT or SIDE.  [default: BASE's own]")
@click.option("--no-t5", is_flag=True, help="Leave out BASE's T5 encoder.")
@click.option("--depth", type=int, help="Latent steps; graphs 1..DEPTH are written.  [default: the model's]")
@click.option("--default-steps", type=int, help="The bundle's default steps.  [default: the model's]")
@click.option("--default-guidance", type=float, help="The bundle's default guidance, likewise; 1 is off.")
@click.option("--default-sampler", help="The bundle's default sampler, likewise.")
@click.option(
    "--out", type=_PATH, help="Folder to write.  [default: bundles/<model's name>, with -PRECISION if given]"
)
@click.option(
    "--precision",
    help="fp32, fp16, int8, int8-weights or int4-weights.  [default: as BASE's weights are stored; fp32 for --ckpt]",
)
@click.option(
    "--calibration",
    type=_PATH,
    help="int8, int4-weights: prompts to calibrate with, one per line; - reads standard input.  [default: built-in]",
)
@click.option(
    "--accept-loss",
    is_flag=True,
    help="int8, int4: keep the bundle even if it loses too much or gains nothing.",
)
@click.option(
    "--score-prompts",
    type=int,
    help="int8, int4: prompts of each kind of ShapesEval, 0 for no score.  [default: all 92]",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def main(
    ckpt: Path | None,
    base: Path | None,
    components: Path | None,
    vae: Path | None,
    adapters: Path | None,
    loras: tuple[str, ...],
    image_size: str | None,
    no_t5: bool,
    depth: int | None,
    default_steps: int | None,
    default_guidance: float | None,
    default_sampler: str | None,
    out: Path | None,
    precision: str | None,
    calibration: Path | None,
    accept_loss: bool,
    score_prompts: int | None,
    force: bool,
) -> None:
    """Write an ONNX bundle of a model, verified against PyTorch, and print its path.

    The model is a TPX checkpoint (--ckpt) or a published model (--base), with thinking adapters if --adapters is given.
    """
    from tpx_export.exporter import check_arguments, export_bundle
    from tpx_export.quantise.prompts import PromptFile
    from tpx_export.quantise.quantiser import QuantisationOptions
    from tpx_export.quantise.verdict import Refused

    chosen = _given(
        calibration=PromptFile(calibration) if calibration else None,
        score_prompts=score_prompts,
        accept_loss=accept_loss or None,
    )
    defaults = _given(steps=default_steps, guidance=default_guidance, sampler=default_sampler)
    options = QuantisationOptions(**chosen) if chosen else None
    check_arguments(out, depth, precision, force, options)  # before reading the model, which takes a while
    with warnings_as_notices():
        pipeline = open_model(ckpt, base, components, vae, adapters, loras, image_size, no_t5)
    pipeline = replace(pipeline, defaults=replace(pipeline.defaults, **defaults))
    out = out or Path("bundles") / (f"{pipeline.name}-{precision}" if precision else pipeline.name)
    with click.progressbar(length=1, label="export", file=sys.stderr) as bar:

        def advance(task: str, done: int, total: int) -> None:
            bar.length, bar.label = total, f"{task:<22}"
            bar.update(done - bar.pos)

        try:
            summary = export_bundle(pipeline, out, depth, precision, force, advance, options)
        except Refused as refused:
            bar.finish()
            click.echo(f"\n{table(refused.summary)}", err=True)
            raise
    click.echo(table(summary), err=True)
    if summary.rejection:
        click.echo(f"accepted: {summary.rejection}", err=True)
    click.echo(out)


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def open_model(
    ckpt: Path | None,
    base: Path | None,
    components: Path | None,
    vae: Path | None,
    adapters: Path | None,
    loras: tuple[str, ...],
    image_size: str | None,
    no_t5: bool,
) -> "Pipeline":
    """The model that the options name. Raises BadInput, CheckpointInvalid."""
    from tpx_export import checkpoint
    from tpx_export.base.lora import open_lora
    from tpx_export.base.pipeline import open_base
    from tpx_export.pipeline import Pipeline

    if (ckpt is None) == (base is None):
        raise BadInput(
            f"expected --ckpt or --base, found {'both' if ckpt else 'neither'}; name one model to export"
        )
    if base:
        size = None if image_size is None else parse_size(image_size)
        opened = [open_lora(*parse_lora(text)) for text in loras]
        return open_base(base, components, size, adapters, t5=not no_t5, loras=opened, vae=vae)
    assert ckpt is not None
    extra = {
        "--components": components,
        "--vae": vae,
        "--adapters": adapters,
        "--lora": loras or None,
        "--image-size": image_size,
        "--no-t5": no_t5 or None,
    }
    if given := [name for name, value in extra.items() if value is not None]:
        raise BadInput(f"expected {given[0]} only with --base, found it with --ckpt; leave it out")
    return Pipeline.from_model(checkpoint.load(ckpt))


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE as a path and a scale, 1 by default; a colon before anything but a number is the path's own."""
    path, _, scale = text.rpartition(":")
    try:
        return Path(path), float(scale)
    except ValueError:
        return Path(text), 1.0


def table(summary: "Summary") -> str:
    """The summary as text tables."""
    lines = [f"{'graph':<24}{'variant':<10}{'error':>9}{'allowed':>9}{'same route':>12}"]
    for variant, parts in summary.reports.items():
        for part in parts:
            route = "" if part.routing_agreement is None else f"{part.routing_agreement:.2%}"
            lines.append(f"{part.part:<24}{variant:<10}{part.error:>9.1e}{part.tolerance:>9.0e}{route:>12}")
    lines.append("")
    lines += [f"{name:<32}{size / 1e6:>9.2f} MB" for name, size in summary.folder_bytes.items()]
    lines.append("")
    lines += [f"{name:<32}{seconds:>9.1f} s" for name, seconds in summary.seconds.items()]
    if summary.quantisation:
        from tpx_export.quantise.report import as_text

        lines += ["", as_text(summary.quantisation)]
    return "\n".join(lines)
