"""The command tpx-bench. Heavy imports wait until an argument has been read."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpx_runtime.cli import find_bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.errors import BadInput, Cancelled, EngineUnavailable, TpxError

if TYPE_CHECKING:
    from tpx_runtime.bundle import Bundle
    from tpx_runtime.manifest import Manifest

    from .configurations import Configuration
    from .measure import Plan
    from .record import Record

PROMPT = "a red cube on a blue sphere"
_SAMPLERS = {"velocity": "euler", "epsilon": "ddim"}  # those that call the model once a step
_PATH = click.Path(path_type=Path)
CHECKPOINTS = (".safetensors", ".pt")  # tpx_export.checkpoint.SUFFIXES, which would bring torch


@click.command(cls=TpxCommand)
@click.argument("bundle", required=False)
@click.option(
    "--ckpt", type=_PATH, help="The bundle's checkpoint: its baselines in PyTorch are measured too."
)
@click.option(
    "--also",
    type=_PATH,
    multiple=True,
    help="Bundle of the same model in another precision; may be repeated.",
)
@click.option("--engine", "engines", multiple=True, help="Only this engine; may be repeated.  [default: all]")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    help='Only this one of CKPT, such as "PyTorch eager fp32"; may be repeated.',
)
@click.option("--depth", "depths", type=int, multiple=True, help="May be repeated.  [default: the bundle's]")
@click.option("--batch", default="1,4", show_default=True, help="Pictures at once; 1 is always measured.")
@click.option("--prompt", help=f"What to draw.  [default: {PROMPT}; class 0]")
@click.option("--steps", type=int, default=20, show_default=True, help="Denoising steps of a picture.")
@click.option(
    "--rounds", type=click.IntRange(1), default=7, show_default=True, help="Samples of each figure."
)
@click.option("--json", "json_path", type=_PATH, help="File of results; a stopped run goes on from it.")
@click.option("--plot", type=_PATH, help="PNG to draw of them; needs matplotlib.")
def main(
    bundle: str | None,
    ckpt: Path | None,
    also: tuple[Path, ...],
    engines: tuple[str, ...],
    baselines: tuple[str, ...],
    depths: tuple[int, ...],
    batch: str,
    prompt: str | None,
    steps: int,
    rounds: int,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Measure how fast BUNDLE is on this machine with every engine, and print a table.

    Without BUNDLE it takes $TPX_BUNDLE, else bundles/shapes.
    """
    from tpx_runtime.bundle import Bundle

    from . import plot as plotting
    from .measure import run
    from .report import as_text

    sizes = parse_batches(batch)
    if plot:
        plotting.check(plot)
    opened = Bundle.open(find_bundle(bundle))
    planned, record = prepare(
        opened, ckpt, also, (engines, baselines), depths, sizes, prompt, steps, rounds, json_path
    )
    total = planned.units(record)
    try:
        with click.progressbar(length=max(total, 1), label="bench", file=sys.stderr) as bar:

            def advance(label: str, done: int) -> None:
                bar.label = f"{label:<38}"
                bar.update(done)
                bar.render_progress()

            run(planned, record, advance)
            bar.update(max(total, 1) - bar.pos)
    except KeyboardInterrupt:
        kept = f"the same command goes on from {json_path}" if json_path else "add --json to keep results"
        raise Cancelled(f"cancelled; {kept}") from None
    click.echo(as_text(record.facts))
    if plot:
        plotting.draw(record.facts, plot)
    require_measured(planned, record)


def parse_batches(text: str) -> tuple[int, ...]:
    """ "1,4" -> (1, 4), always with 1. Raises BadInput."""
    try:
        sizes = {int(part) for part in text.split(",")}
    except ValueError:
        sizes = {0}
    if min(sizes) < 1 or max(sizes) > 256:
        raise BadInput(f"expected --batch to be whole numbers in 1..256 with commas between, found {text!r}")
    return tuple(sorted({1, *sizes}))


def prepare(
    bundle: "Bundle",
    ckpt: Path | None,
    also: tuple[Path, ...],
    names: tuple[tuple[str, ...], tuple[str, ...]],
    depths: tuple[int, ...],
    batches: tuple[int, ...],
    prompt: str | None,
    steps: int,
    rounds: int,
    json_path: Path | None,
) -> "tuple[Plan, Record]":
    """What is to measure, checked before anything runs, and the record that it is added to. `names`: engines, baselines.

    Raises BadInput, BundleInvalid, CheckpointInvalid, and EngineUnavailable for a checkpoint without PyTorch.
    """
    from tpx_runtime.bundle import hash_file
    from tpx_runtime.engine import ENGINES
    from tpx_runtime.engine.threads import THREADS_VARIABLE, threads_wanted
    from tpx_runtime.generator import Generator

    from .configurations import REFERENCE, baselines, engines
    from .machine import describe
    from .measure import Plan
    from .record import Record
    from .subject import Work

    manifest, classes = bundle.manifest, bool(bundle.manifest.model.classes)
    depths = tuple(sorted(set(depths))) or (manifest.defaults.depth,)
    if names[1] and ckpt is None:
        raise BadInput("expected --ckpt with --baseline, found none; name the bundle's checkpoint")
    if threads_wanted():
        raise BadInput(
            f"expected every core for all that is compared, found {THREADS_VARIABLE} set; unset it"
        )
    if ckpt is not None and not ckpt.is_file():
        raise BadInput(f"expected a checkpoint in --ckpt, found no file {ckpt}; check the path")
    if ckpt is not None and ckpt.suffix not in CHECKPOINTS:
        raise BadInput(
            f"expected a checkpoint ending in {' or '.join(CHECKPOINTS)} in --ckpt, found {ckpt.name}"
        )
    work = Work(
        bundle=bundle.root.resolve(),
        depth=depths[0],
        prompt=PROMPT if prompt is None and not classes else prompt,
        class_id=0 if classes else None,
        seed=0,
        steps=steps,
        guidance=manifest.defaults.guidance,
        sampler=_SAMPLERS[manifest.model.prediction],
        ckpt=ckpt.resolve() if ckpt else None,
    )
    checker = Generator(bundle, next(iter(ENGINES.values())))  # which opens no graph
    for depth in depths:
        checker.plan(
            work.prompt,
            class_id=work.class_id,
            steps=steps,
            guidance=work.guidance,
            sampler=work.sampler,
            depth=depth,
        )
    chosen = baselines(names[1], depths) if ckpt else []
    chosen += engines(names[0], depths, manifest.precision)
    if ckpt:
        _require_fits(ckpt, manifest)
    others = [_same_model(path, bundle, depths) for path in also]
    for other in others:
        chosen += engines(names[0], depths, other.manifest.precision, other.root.resolve())
    settings = {
        "bundle": manifest.name,
        "bundle_sha256": bundle.hash,
        "precision": manifest.precision,
        "also": {other.manifest.precision: other.hash for other in others},
        "image_size_px": list(manifest.model.image_size_px),
        "ckpt_sha256": hash_file(ckpt) if ckpt else None,
        **{
            name: getattr(work, name)
            for name in ("prompt", "class_id", "seed", "steps", "guidance", "sampler")
        },
        "machine": describe(),
    }
    record = Record.begin(json_path, settings)
    _count(bundle, depths, 1 if work.guidance == 1 else 2, record)
    able = [
        c for c in chosen if c.problem is None and c.device == "cpu" and c.precision == manifest.precision
    ]
    reference = REFERENCE if any(c.name == REFERENCE for c in chosen) else able[0].name if able else None
    return Plan(work, tuple(chosen), reference, rounds, batches), record


def _require_fits(ckpt: Path, manifest: "Manifest") -> None:
    """Raises BadInput for a checkpoint of another model than the bundle's, EngineUnavailable without PyTorch."""
    try:
        from .baselines import require_fits
    except ImportError:
        raise EngineUnavailable(
            "expected PyTorch for --ckpt, found none; pip install 'tpx[export]', or leave --ckpt out"
        ) from None
    require_fits(ckpt, manifest)


def _same_model(path: Path, bundle: "Bundle", depths: tuple[int, ...]) -> "Bundle":
    """The bundle at `path`. Raises BadInput unless it is `bundle`'s model in another precision, with all of `depths`."""
    from tpx_runtime.bundle import Bundle

    other = Bundle.open(path)
    wanted, found = bundle.manifest, other.manifest
    same = (found.name, found.precision != wanted.precision, set(depths) <= set(found.model.depths))
    if same != (wanted.name, True, True):
        raise BadInput(
            f"expected in --also {wanted.name} in another precision than {wanted.precision} with depth "
            f"{', '.join(map(str, depths))}, found {found.name} in {found.precision} with depth "
            f"{', '.join(map(str, found.model.depths))}; export it with `tpx-export --precision`"
        )
    return other


def _count(bundle: "Bundle", depths: tuple[int, ...], rows: int, record: "Record") -> None:
    """Operations of a step at batch 1, or why they could not be counted."""
    from .flops import transformer_flops

    for depth in depths:
        try:
            counted: Any = transformer_flops(bundle, depth, rows)
        except TpxError as error:
            counted = str(error)
        record.facts["flops"][str(depth)] = counted


def require_measured(plan: "Plan", record: "Record") -> None:
    """Raise EngineUnavailable where nothing at all could be measured."""
    failed: list[Configuration] = [c for c in plan.configurations if record.entry(c)["problem"]]
    if len(failed) == len(plan.configurations):
        raise EngineUnavailable(
            f"expected at least one of {len(failed)} configurations to run here, found none; the reasons are above"
        )


if __name__ == "__main__":
    main()
