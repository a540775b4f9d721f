"""The command tpx-build."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpx_runtime.cli import find_bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import AUTO, ENGINES
from tpx_runtime.errors import BadInput, shorten

if TYPE_CHECKING:
    from tpx_engines.build import Result, Watch
    from tpx_runtime.bundle import Bundle

TENSORRT = [engine.name for engine in ENGINES.values() if engine.prebuilt == "required"]
OPENVINO = [engine.name for engine in ENGINES.values() if engine.prebuilt == "optional"]
BUILT_AHEAD = [*TENSORRT, *OPENVINO]
_BAR_STEPS = 1000


@click.command(cls=TpxCommand)
@click.argument("bundle", required=False)
@click.option("--engine", default="tensorrt-rtx", show_default=True, help=f"{', '.join(BUILT_AHEAD)}.")
@click.option(
    "--batch",
    default="1,2",
    show_default=True,
    help="Least and most rows, two for a guided picture. TensorRT takes all between; OpenVINO is compiled for these two.",
)
@click.option(
    "--gpu", help="For tensorrt-rtx: sm75, sm80, sm86, sm89, sm120 or sm121.  [default: this machine's]"
)
@click.option(
    "--cache", "folder", type=click.Path(path_type=Path), help="Folder of engines.  [default: BUNDLE.engines]"
)
def main(bundle: str | None, engine: str, batch: str, gpu: str | None, folder: Path | None) -> None:
    """Build the engines of BUNDLE that its cache lacks, and print the cache's folder.

    TensorRT for RTX builds for any GPU and needs none here; TensorRT builds for the GPU that is here. OpenVINO would
    compile in the first process that draws; built ahead, its transformer is also there for exact batches, which is faster.

    The precision is the bundle's. Without BUNDLE it takes $TPX_BUNDLE, else bundles/shapes.
    """
    check_engine(engine)
    from tpx_runtime.bundle import Bundle

    from .target import parse_batch

    rows, opened = parse_batch(batch), Bundle.open(find_bundle(bundle))
    if engine in OPENVINO:
        refuse(engine, {"--gpu": gpu, "--cache": folder})
        compile_ahead(opened, engine, rows)
    else:
        build_tensorrt(opened, engine, rows, gpu, folder)


def compile_ahead(opened: "Bundle", engine: str, rows: tuple[int, int]) -> None:
    """OpenVINO: every graph, and the transformer's for exactly the least and the most rows."""
    from tpx_runtime.engine.engine_file import default_folder

    from .openvino_build import build_ahead

    with progress_bar() as watch:
        results = build_ahead(opened, engine, rows, watch)
    click.echo(table(results), err=True)
    click.echo(default_folder(opened.root) / "openvino")


def build_tensorrt(
    opened: "Bundle", engine: str, rows: tuple[int, int], gpu: str | None, folder: Path | None
) -> None:
    """TensorRT: every graph for batches from the least to the most rows."""
    from tpx_runtime.engine.tensorrt_flavours import FLAVOURS

    from .build import Abandoned, build_all, plan
    from .cache import EngineCache
    from .routed_lora_choice import plugin_problem
    from .target import choose_gpu

    flavour = FLAVOURS[engine]
    target = choose_gpu(flavour, gpu)
    cache = EngineCache.beside(opened, folder)
    tasks = plan(opened, cache, rows, target, flavour)
    routes = not flavour.ahead and opened.manifest.model.thinking_blocks
    if routes and (reason := plugin_problem(flavour, target.capability, opened)):
        click.echo(f"notice: routing without its plugin: {reason}", err=True)
    for task in tasks:
        if task.stale:
            click.echo(f"building again: {task.stale}", err=True)
    try:
        with progress_bar() as watch:
            results = build_all(tasks, cache, target, watch)
    except Abandoned as error:
        click.echo(f"error: {error}", err=True)
        sys.stderr.flush()
        os._exit(error.exit_code)  # a builder that is still at work would hold up any gentler way out
    click.echo(table(results), err=True)
    click.echo(cache.folder)


@contextmanager
def progress_bar() -> "Iterator[Watch]":
    """A bar on stderr, and what moves it."""
    with click.progressbar(
        length=1, file=sys.stderr, show_eta=False, item_show_func=lambda phase: phase
    ) as bar:

        def watch(graph: str, done: float, total: int, phase: str) -> None:
            bar.length, bar.label = total * _BAR_STEPS, f"{graph:<22}"
            bar.update(round(done * _BAR_STEPS) - bar.pos, phase)
            bar.render_progress()  # a new phase shows, though the bar stands still

        yield watch


def check_engine(name: str) -> None:
    """Raises BadInput for an engine that is not built ahead, or is none."""
    if name in BUILT_AHEAD:
        return
    if name in (*ENGINES, AUTO):
        raise BadInput(
            f"expected an engine that is built ahead ({', '.join(BUILT_AHEAD)}), found {name}, "
            "which reads the bundle as it is: nothing to build"
        )
    raise BadInput(f"expected --engine of {', '.join(BUILT_AHEAD)}, found {shorten(name)}")


def refuse(engine: str, given: dict[str, object]) -> None:
    """Raises BadInput for the first option that was given, which the engine has no use for."""
    for option, value in given.items():
        if value is not None:
            raise BadInput(
                f"expected {option} with {' or '.join(TENSORRT)} alone, found it with {engine}; leave it out"
            )


def table(results: "Sequence[Result]") -> str:
    """The results as a person reads them."""
    lines = [f"{'graph':<22}{'size':>12}{'seconds':>9}  from"]
    for result in results:
        seconds, origin = ("-", "cache") if result.cached else (f"{result.seconds:.1f}", "build")
        lines.append(f"{result.graph:<22}{result.engine_bytes / 1e6:>9.2f} MB{seconds:>9}  {origin}")
    return "\n".join(lines)
