"""The command tpx-export."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpx_runtime.cli import TpxCommand

if TYPE_CHECKING:
    from tpx_export.exporter import Summary


@click.command(cls=TpxCommand)
@click.option(
    "--ckpt", required=True, type=click.Path(path_type=Path), help="Checkpoint, .safetensors or .pt."
)
@click.option(
    "--depth", type=int, help="Latent steps; graphs 1..DEPTH are written.  [default: the checkpoint's]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: bundles/<model's name>]"
)
@click.option("--precision", default="fp32", show_default=True, help="fp32 or fp16.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def main(ckpt: Path, depth: int | None, out: Path | None, precision: str, force: bool) -> None:
    """Write an ONNX bundle of a checkpoint, verified against PyTorch, and print its path."""
    from tpx_export import checkpoint
    from tpx_export.exporter import export_bundle

    model = checkpoint.load(ckpt)
    out = out or Path("bundles") / model.spec.name
    with click.progressbar(length=1, label="export", file=sys.stderr) as bar:

        def advance(task: str, done: int, total: int) -> None:
            bar.length, bar.label = total, f"{task:<20}"
            bar.update(done - bar.pos)

        summary = export_bundle(model, out, depth, precision, force, advance)
    click.echo(table(summary), err=True)
    click.echo(out)


def table(summary: "Summary") -> str:
    """The summary as a person reads it."""
    lines = [f"{'graph':<22}{'spelling':<10}{'error':>9}{'allowed':>9}{'same route':>12}"]
    for spelling, parts in summary.reports.items():
        for part in parts:
            route = "" if part.routing_agreement is None else f"{part.routing_agreement:.2%}"
            lines.append(f"{part.part:<22}{spelling:<10}{part.error:>9.1e}{part.tolerance:>9.0e}{route:>12}")
    lines.append("")
    lines += [f"{name:<32}{size / 1e6:>9.2f} MB" for name, size in summary.folder_bytes.items()]
    lines.append("")
    lines += [f"{name:<32}{seconds:>9.1f} s" for name, seconds in summary.seconds.items()]
    return "\n".join(lines)
