"""The command tpx-build."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpx_runtime.cli import TpxCommand, find_bundle
from tpx_runtime.errors import BadInput, shorten

if TYPE_CHECKING:
    from tpx_engines.build import Result

BUILT_AHEAD = "tensorrt-rtx"
_BAR_STEPS = 1000


@click.command(cls=TpxCommand)
@click.argument("bundle", required=False)
@click.option("--engine", default=BUILT_AHEAD, show_default=True, help="The engine to build for.")
@click.option("--batch", default="1,2", show_default=True, help="Least and most rows; tuned for the most.")
@click.option("--gpu", help="sm75, sm80, sm86, sm89, sm120 or sm121.  [default: this machine's]")
@click.option(
    "--cache", "folder", type=click.Path(path_type=Path), help="Folder of engines.  [default: BUNDLE.engines]"
)
def main(bundle: str | None, engine: str, batch: str, gpu: str | None, folder: Path | None) -> None:
    """Build the engines of BUNDLE that its cache lacks, and print the cache's folder. Needs no GPU.

    Without BUNDLE it takes $TPX_BUNDLE, else bundles/shapes.
    """
    check_engine(engine)
    from tpx_runtime.bundle import Bundle

    from .build import Abandoned, build_all, choose_gpu, parse_batch, plan
    from .cache import EngineCache

    rows, target = parse_batch(batch), choose_gpu(gpu)
    opened = Bundle.open(find_bundle(bundle))
    cache = EngineCache.beside(opened, folder)
    tasks = plan(opened, cache, rows, target)
    for task in tasks:
        if task.stale:
            click.echo(f"building again: {task.stale}", err=True)
    try:
        with click.progressbar(
            length=len(tasks) * _BAR_STEPS,
            label=f"{len(tasks)} engines",
            file=sys.stderr,
            show_eta=False,
            item_show_func=lambda phase: phase,
        ) as bar:

            def watch(graph: str, done: float, total: int, phase: str) -> None:
                bar.label = f"{graph:<20}"
                bar.update(round(done * _BAR_STEPS) - bar.pos, phase)
                bar.render_progress()  # a new phase shows, though the bar stands still

            results = build_all(tasks, cache, target, watch)
    except Abandoned as error:
        click.echo(f"error: {error}", err=True)
        sys.stderr.flush()
        os._exit(error.exit_code)  # a builder that is still at work would hold up any gentler way out
    click.echo(table(results), err=True)
    click.echo(cache.folder)


def check_engine(name: str) -> None:
    """Raises BadInput for an engine that is not built ahead, or is none."""
    from tpx_runtime.engine import AUTO, ENGINES

    if name in (*ENGINES, AUTO):
        raise BadInput(
            f"expected an engine that is built ahead ({BUILT_AHEAD}), found {name}, "
            "which reads the bundle as it is: nothing to build"
        )
    if name != BUILT_AHEAD:
        raise BadInput(f"expected --engine {BUILT_AHEAD}, found {shorten(name)}")


def table(results: "Sequence[Result]") -> str:
    """The results as a person reads them."""
    lines = [f"{'graph':<22}{'size':>12}{'seconds':>9}  from"]
    for result in results:
        seconds, origin = ("-", "cache") if result.cached else (f"{result.seconds:.1f}", "build")
        lines.append(f"{result.graph:<22}{result.engine_bytes / 1e6:>9.2f} MB{seconds:>9}  {origin}")
    return "\n".join(lines)
