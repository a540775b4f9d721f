"""The command tpx-build."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpx_runtime import options
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import ENGINES
from tpx_runtime.environment import ENGINES_VARIABLE, openvino_folder
from tpx_runtime.errors import BadInput, shorten
from tpx_runtime.options import find_bundle

if TYPE_CHECKING:
    from tpx_engines.build import BuildResult, ProgressCallback
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
    help="Minimum and maximum rows (2 per guided image). TensorRT accepts this range, OpenVINO is compiled for both ends.",
)
@click.option(
    "--gpu", help="For tensorrt-rtx: sm75, sm80, sm86, sm89, sm120 or sm121.  [default: this machine's]"
)
@click.option(
    "--precision", help="Precision that BUNDLE must have, such as fp16 or int8.  [default: any of a bundle]"
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="TensorRT: folder for engines of several bundles.  [default: $TPX_ENGINES, else BUNDLE.engines]",
)
@options.threads
def main(
    bundle: str | None, engine: str, batch: str, gpu: str | None, precision: str | None, cache: Path | None
) -> None:
    """Build the engines of BUNDLE that are not in its cache yet, and print the folder of the cache.

    TensorRT for RTX builds for any of its GPUs, without one in this machine; TensorRT builds for the GPU in this machine.
    OpenVINO otherwise compiles in the first process; built ahead of time, its transformer also gets exact batches, which
    run faster.

    TensorRT's engines have the precision of the bundle; openvino computes what is not int8 in fp32, openvino-bf16 in bf16.
    ONNX Runtime needs no build. BUNDLE defaults to $TPX_BUNDLE, else bundles/shapes.
    """
    check_engine(engine)
    from tpx_runtime.bundle import Bundle

    from .target import parse_batch

    rows, opened = parse_batch(batch), Bundle.open(find_bundle(bundle))
    check_precision(opened, precision)
    if engine not in TENSORRT:
        reject_options(engine, {"--gpu": gpu, "--cache": cache})
    if engine not in BUILT_AHEAD:
        click.echo(f"notice: {engine} needs no build; it runs the bundle as it is", err=True)
    elif engine in OPENVINO:
        build_openvino(opened, engine, rows)
    else:
        build_tensorrt(opened, engine, rows, gpu, cache)
    if cache and os.environ.get(ENGINES_VARIABLE) != str(cache):
        setting = f"{ENGINES_VARIABLE}={shlex.quote(str(cache.resolve()))}"
        click.echo(f"notice: set {setting} for tpx-run to find them", err=True)


def build_openvino(opened: "Bundle", engine: str, rows: tuple[int, int]) -> None:
    """OpenVINO: all graphs with dynamic shapes, and the transformer also for exactly these two numbers of rows."""
    from tpx_runtime.engine import resolve

    from .openvino_build import build_ahead

    resolve(engine)  # raises before the progress bar has a line
    with progress_bar() as on_progress:
        results = build_ahead(opened, engine, rows, on_progress)
    click.echo(format_table(results), err=True)
    click.echo(openvino_folder(opened.root))


def build_tensorrt(
    opened: "Bundle", engine: str, rows: tuple[int, int], gpu: str | None, shared: Path | None
) -> None:
    """TensorRT: all graphs, for batches from the first to the second number of rows."""
    from tpx_runtime.engine.tensorrt_flavours import FLAVOURS

    from .build import ForcedExit, build_all, plan
    from .cache import EngineCache
    from .routed_lora_choice import plugin_hash, plugin_problem
    from .target import choose_gpu

    flavour = FLAVOURS[engine]
    target = choose_gpu(flavour, gpu)
    cache = EngineCache.for_bundle(opened, shared)
    plugin = ""
    if opened.manifest.model.thinking_blocks and not flavour.ahead_of_time:
        if reason := plugin_problem(flavour, target.capability, opened):
            click.echo(f"notice: building without the routing plugin: {reason}", err=True)
        else:
            plugin = plugin_hash()
    tasks = plan(opened, cache, rows, target, flavour, plugin)
    for task in tasks:
        if task.stale_reason:
            click.echo(f"building again: {task.stale_reason}", err=True)
    try:
        with progress_bar() as on_progress:
            results = build_all(tasks, cache, target, on_progress)
    except ForcedExit as error:
        click.echo(f"error: {error}", err=True)
        sys.stderr.flush()
        os._exit(error.exit_code)  # a normal exit would wait for the builder thread
    click.echo(format_table(results), err=True)
    click.echo(cache.folder)


@contextmanager
def progress_bar() -> "Iterator[ProgressCallback]":
    """A progress bar on stderr; yields the callback that updates it."""
    with click.progressbar(
        length=1, file=sys.stderr, show_eta=False, item_show_func=lambda phase: phase
    ) as bar:

        def on_progress(graph: str, done: float, total: int, phase: str) -> None:
            bar.length, bar.label = total * _BAR_STEPS, f"{graph:<22}"
            bar.update(round(done * _BAR_STEPS) - bar.pos, phase)
            bar.render_progress()  # show a new phase even if the bar did not move

        yield on_progress


def check_engine(name: str) -> None:
    """Raise BadInput for an unknown engine."""
    if name not in ENGINES:
        raise BadInput(f"expected --engine of {', '.join(BUILT_AHEAD)}, found {shorten(name)}")


def check_precision(bundle: "Bundle", requested: str | None) -> None:
    """Raise BadInput if the bundle has another precision than the requested one."""
    found = bundle.manifest.precision
    if requested not in (None, found):
        raise BadInput(
            f"expected --precision {found}, that of {bundle.root}, found {shorten(requested)}; "
            "export another bundle with `tpx-export --precision`"
        )


def reject_options(engine: str, given: dict[str, object]) -> None:
    """Raise BadInput for the first option that was given, because the engine does not support it."""
    for option, value in given.items():
        if value is not None:
            raise BadInput(
                f"expected {option} only with {' or '.join(TENSORRT)}, found it with {engine}; leave it out"
            )


def format_table(results: "Sequence[BuildResult]") -> str:
    """The results as a text table."""
    lines = [f"{'graph':<22}{'size':>12}{'seconds':>9}  from"]
    for result in results:
        seconds, origin = ("-", "cache") if result.cached else (f"{result.seconds:.1f}", "build")
        lines.append(f"{result.graph:<22}{result.engine_bytes / 1e6:>9.2f} MB{seconds:>9}  {origin}")
    return "\n".join(lines)
