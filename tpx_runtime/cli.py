"""The commands tpx-run, tpx-verify and tpx-info. Heavy imports wait until an argument has been read."""

import os
import secrets
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command import TpxCommand, noticing
from .errors import BadInput, EngineFailed, EngineUnavailable, shorten

if TYPE_CHECKING:
    from .bundle import Bundle
    from .engine import Engine
    from .generator import Generator
    from .settings import Settings
    from .verify import PartReport

SAMPLE_BUNDLE = Path("bundles/shapes")
_PATH = click.Path(path_type=Path)
_ENGINE_HELP = (
    "onnxruntime, onnxruntime-cuda, openvino or openvino-bf16, or what tpx-build made for tensorrt-rtx or tensorrt; "
    "auto takes the first that runs here."
)


guidance_interval = click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="LOW HIGH",
    help="Noise levels in 0..1 at which guidance acts; other steps cost half.  [default: the bundle's]",
)
guidance_every = click.option(
    "--guidance-every",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="After two fifths of the steps, compute guidance at every Nth step only; the steps between cost half.",
)


def find_bundle(given: str | None) -> Path:
    """The bundle given, or $TPX_BUNDLE, or the sample's in this folder or this checkout. Raises BadInput."""
    if named := given or os.environ.get("TPX_BUNDLE"):
        return Path(named)
    for root in (Path(), Path(__file__).parent.parent):
        if (root / SAMPLE_BUNDLE).is_dir():
            return root / SAMPLE_BUNDLE
    raise BadInput(
        f"expected a bundle in --bundle, $TPX_BUNDLE or {SAMPLE_BUNDLE}, found none; "
        "make one with `make demo` or `tpx-export`"
    )


def _announce(engine: "Engine", asked: str) -> None:
    """Say on stderr which engine runs, so that nobody wonders what `auto` chose."""
    click.echo(f"engine: {engine.name}{' (chosen by auto)' if asked != engine.name else ''}", err=True)


class Seed(click.ParamType):
    """A whole number, or `random`, which is said on stderr and lies in the picture's metadata."""

    name = "integer|random"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value != "random":
            return int(click.INT.convert(value, param, ctx))
        seed = secrets.randbelow(2**31)
        click.echo(f"seed: {seed}", err=True)
        return seed


LIKE = "tpx.like"  # in a context's meta: the metadata of the picture that --like names


def _draw_like(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Let a picture's settings be the defaults of all options that follow from them."""
    if path is None:
        return
    from .metadata import read_metadata, settings_in

    ctx.meta[LIKE] = facts = read_metadata(path)
    ctx.default_map = {**(ctx.default_map or {}), **settings_in(facts)}


def _notice_other_bundle(facts: dict[str, Any] | None, bundle: "Bundle") -> None:
    """Say so if the picture of --like was drawn by another bundle."""
    if facts and facts.get("bundle_sha256") != bundle.hash:
        warnings.warn(
            f"the picture of --like was drawn by another bundle, {shorten(facts.get('bundle'))}", stacklevel=2
        )


def _plan_lines(
    generator: "Generator", file: Path, lines: dict[int, str], settings: dict[str, Any]
) -> "list[Settings]":
    """The jobs of a file's prompts. Raises BadInput, which names the line unless what is wrong lies in no prompt."""
    jobs, wrong = [], dict[int, BadInput]()
    for number, prompt in lines.items():
        try:
            jobs += generator.plan(prompt, **settings)
        except BadInput as error:
            wrong[number] = error
    if not wrong:
        return jobs
    number, first = next(iter(wrong.items()))
    if len(set(map(str, wrong.values()))) == 1 and len(wrong) == len(lines) > 1:
        raise first
    raise BadInput(f"{file}, line {number}: {first}")


@contextmanager
def _printing() -> Iterator[list[Path]]:
    """A list whose paths are printed in the end, below the bar, whatever that end is."""
    written: list[Path] = []
    try:
        yield written
    finally:
        for path in written:
            click.echo(click.format_filename(path))


@click.command(cls=TpxCommand)
@click.argument("prompt", required=False)
@click.option(
    "--prompts", "prompts_file", type=_PATH, help="File of prompts, one a line, or - for standard input."
)
@click.option(
    "--like",
    type=_PATH,
    is_eager=True,
    expose_value=False,
    callback=_draw_like,
    help="PNG of tpx-run whose settings are taken, but for those given here.",
)
@click.option("--bundle", help="Folder of the bundle.  [default: $TPX_BUNDLE, else bundles/shapes]")
@click.option(
    "--out",
    type=_PATH,
    help="PNG to write, with {seed}, {prompt} and {number} in its name replaced.  [default: after the prompt]",
)
@click.option(
    "--seed",
    type=Seed(),
    default=0,
    show_default=True,
    help="Of the first picture, or random; the next adds 1.",
)
@click.option("--steps", type=int, help="Denoising steps.  [default: the bundle's]")
@click.option("--guidance", type=float, help="Pull of the prompt; 1 is off.  [default: the bundle's]")
@guidance_interval
@guidance_every
@click.option(
    "--sampler", help="euler, heun, dpmpp2m or unipc; ddpm or ddim for class models.  [default: the bundle's]"
)
@click.option("--depth", type=int, help="Latent steps of thinking.  [default: the bundle's]")
@click.option(
    "-n", "num_images", type=int, default=1, show_default=True, help="Pictures; several make a grid."
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Pictures drawn at once."
)
@click.option("--engine", default="auto", show_default=True, help=_ENGINE_HELP)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Of an engine on the CPU.  [default: $TPX_THREADS, else every core]",
)
@click.option("--negative-prompt", "--negative", help="What the picture should not show.")
@click.option("--class", "class_id", type=int, help="Number of the class to draw, instead of PROMPT.")
@click.option("--image", type=_PATH, help="Picture to start from.")
@click.option("--mask", type=_PATH, help="Picture, white where IMAGE is to be painted anew.")
@click.option("--strength", type=float, help="Share of the steps that change IMAGE, 0 to 1.  [default: 0.6]")
@click.option("--no-t5", is_flag=True, help="Leave out T5 of Stable Diffusion 3: less memory, less text.")
@click.option("--no-verify", is_flag=True, help="Trust the bundle: do not read all of it for its hashes.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def run(
    prompt: str | None,
    prompts_file: Path | None,
    bundle: str | None,
    out: Path | None,
    engine: str,
    threads: int | None,
    force: bool,
    seed: int,
    num_images: int,
    batch_size: int,
    class_id: int | None,
    image: Path | None,
    mask: Path | None,
    strength: float | None,
    no_t5: bool,
    no_verify: bool,
    **settings: Any,
) -> None:
    """Draw PROMPT, or each of a file's prompts, or a class, and print the path of each PNG."""
    from .bundle import Bundle
    from .editing import starting_strength
    from .engine import resolve
    from .engine.environment import THREADS_VARIABLE, requested_threads
    from .generator import MAX_IMAGES, Generator
    from .images import grid
    from .outputs import choose_outputs
    from .pictures import open_picture
    from .prompts import prompts_in

    if prompt is not None and prompts_file:
        raise BadInput("expected PROMPT or --prompts, found both; leave out one of them")
    if threads:
        os.environ[THREADS_VARIABLE] = str(threads)
    requested_threads()
    lines = prompts_in(prompts_file) if prompts_file else {}
    named = list(lines.values()) or [prompt or ("" if class_id is None else f"class {class_id}")]
    seeds = range(seed, seed + min(max(num_images, 1), MAX_IMAGES))  # what is beyond, plan refuses
    outputs = choose_outputs(out, named, seeds, force)
    strength = starting_strength(image, mask, strength)
    picture, painted = (open_picture(file) if file else None for file in (image, mask))
    chosen = resolve(engine)
    opened = Bundle.open(find_bundle(bundle), verify=not no_verify)
    several_batches = num_images * len(named) > batch_size
    generator = Generator(opened, chosen, t5=not no_t5, keep=several_batches)
    with noticing():
        _notice_other_bundle(click.get_current_context().meta.get(LIKE), opened)
        settings |= {"class_id": class_id, "strength": strength, "seed": seed, "num_images": num_images}
        planned = prompts_file and _plan_lines(generator, prompts_file, lines, settings)
        jobs = planned or generator.plan(prompt, **settings)
        edit = generator.edit(picture, painted) if picture else None
    _announce(generator.engine, engine)
    with _printing() as written, click.progressbar(length=1, label="denoising", file=sys.stderr) as bar:

        def advance(step: int, total: int, latents: object) -> None:
            bar.length = total
            bar.update(1)

        drawn = generator.stream(jobs, batch_size, callback=advance, edit=edit)
        for output in outputs:
            written.append(output.save(grid(list(islice(drawn, output.images))), force))


@click.command(cls=TpxCommand)
@click.argument("bundle", required=False)
@click.option("--engine", default="auto", show_default=True, help=_ENGINE_HELP)
@click.option("--all-engines", is_flag=True, help="Every engine that runs here, and why the others do not.")
def verify(bundle: str | None, engine: str, all_engines: bool) -> None:
    """Check the hash of every file of BUNDLE, and on an engine every graph against the PyTorch model.

    Without BUNDLE it takes $TPX_BUNDLE, else bundles/shapes.
    """
    from .bundle import Bundle
    from .engine import AUTO, ENGINES, NO_USABLE_ENGINE, resolve

    if all_engines and engine != AUTO:
        raise BadInput(
            f"expected --engine or --all-engines, found both; leave out --engine {shorten(engine)}"
        )
    chosen = None if all_engines else resolve(engine)
    opened = Bundle.open(find_bundle(bundle))
    facts = opened.manifest
    click.echo(f"{facts.name} ({facts.precision}): {len(facts.files)} files, each of its size and SHA-256")
    if chosen:
        _announce(chosen, engine)
        _verify_on(opened, chosen)
        return
    unusable, failed = [], []
    for candidate in ENGINES.values():
        click.echo(f"\n{candidate.name}")
        try:
            if problem := candidate.problem():
                raise EngineUnavailable(problem)
            _verify_on(opened, candidate)
        except EngineUnavailable as error:
            unusable.append(error)
            click.echo(f"not usable: {error}")
        except EngineFailed as error:
            failed.append(error)
            click.echo(f"failed: {error}")
    if failed:
        raise failed[0]
    if len(unusable) == len(ENGINES):
        raise EngineUnavailable(NO_USABLE_ENGINE)


@click.command(cls=TpxCommand)
@click.argument("bundle", required=False)
def info(bundle: str | None) -> None:
    """Which engines run on this machine, and what BUNDLE is; its files are not read.

    Without BUNDLE it takes $TPX_BUNDLE, else bundles/shapes, where there is one.
    """
    from .bundle import Bundle
    from .info import engines, facts, machine

    click.echo(machine() + "\n")
    for line in engines():
        click.echo(line)
    click.echo()
    try:
        path = find_bundle(bundle)
    except BadInput as error:  # none is named, and none lies here
        click.echo(f"no bundle: {error}")
        return
    for line in facts(Bundle.open(path, verify=False)):
        click.echo(line)


def _verify_on(bundle: "Bundle", engine: "Engine") -> None:
    """Print the table of one engine. Raises EngineFailed where a part is out of tolerance."""
    from .verify import require_ok, verify_bundle

    reports = verify_bundle(bundle, engine)
    click.echo(table(reports))
    require_ok(reports, engine.name)


def table(reports: "Sequence[PartReport]") -> str:
    """The reports as lines of text that a person reads."""
    lines = [f"{'part':<22}{'error':>9}{'tolerance':>11}{'same routes':>13}{'at least':>10}  ok"]
    for report in reports:
        routes, least = "-", "-"
        if report.routing_agreement is not None:
            routes, least = f"{report.routing_agreement:.2%}", f"{report.least_agreement:.2%}"
        numbers = f"{report.part:<22}{report.error:>9.1e}{report.tolerance:>11.0e}{routes:>13}{least:>10}"
        lines.append(f"{numbers}  {'yes' if report.ok else 'NO'}")
    return "\n".join(lines)
