"""The commands tpx-run, tpx-verify and tpx-info. Heavy imports are deferred until the arguments have been parsed."""

import os
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from . import options
from .command import TpxCommand, warnings_as_notices
from .errors import BadInput, EngineFailed, EngineUnavailable, shorten
from .options import find_bundle

if TYPE_CHECKING:
    from .bundle import Bundle
    from .editing import Edit
    from .engine import Engine, GraphEngine
    from .generator import Generator
    from .settings import Settings
    from .verify import PartReport

_PATH = click.Path(path_type=Path)


def _print_engine(engine: "GraphEngine", requested: str) -> None:
    """Print on stderr which engine is used, and whether `auto` selected it."""
    click.echo(f"engine: {engine.name}{' (chosen by auto)' if requested != engine.name else ''}", err=True)


class Seed(click.ParamType):
    """An integer, or `random`, in which case the chosen seed is printed on stderr."""

    name = "integer or random"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if str(value).lower() != "random":
            try:
                return int(value)
            except ValueError:
                self.fail(f"expected a whole number or random, found {shorten(value)}", param, ctx)
        seed = secrets.randbelow(2**31)
        click.echo(f"seed: {seed}", err=True)
        return seed


LIKE_METADATA = "tpx.like"  # key in the click context's `meta`: the metadata of the image named by --like


def _apply_like(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Use the settings of an image as the defaults of the other options."""
    if path is None:
        return
    from .metadata import read_metadata, settings_in

    ctx.meta[LIKE_METADATA] = facts = read_metadata(path)
    no_t5 = {"no_t5": True} if facts.get("left_out") else {}
    ctx.default_map = {**(ctx.default_map or {}), **settings_in(facts), **no_t5}


def _require_image_of_like(facts: dict[str, Any], image: Path | None) -> None:
    """Raise BadInput if the image of --like started from an image and none is given."""
    if facts.get("strength") is not None and image is None:
        raise BadInput(
            "expected the image that the image of --like was generated from, found none; give it with --image"
        )


def _warn_unlike(facts: dict[str, Any], bundle: "Bundle", edit: "Edit | None") -> None:
    """Warn if the image of --like, whose metadata is `facts`, was generated with another bundle, image or mask."""
    if not facts:
        return
    differing = []
    if facts.get("bundle_sha256") != bundle.hash:
        differing.append(f"another bundle, {shorten(facts.get('bundle'))}")
    for name in ("image", "mask"):
        then, now = facts.get(f"{name}_sha256"), edit.sources.get(f"{name}_sha256") if edit else None
        if then != now:
            differing.append(f"{'no' if not then else 'another' if now else 'a'} {name}")
    for what in differing:
        warnings.warn(f"the image of --like was generated with {what}", stacklevel=2)


def _plan_lines(
    generator: "Generator", file: Path, lines: dict[int, str], settings: dict[str, Any]
) -> "list[Settings]":
    """The jobs of a file's prompts. Raises BadInput, which names the line unless every prompt fails for the same reason."""
    jobs, failed = [], dict[int, BadInput]()
    for number, prompt in lines.items():
        try:
            jobs += generator.plan(prompt, **settings)
        except BadInput as error:
            failed[number] = error
    if not failed:
        return jobs
    number, first = next(iter(failed.items()))
    if len(set(map(str, failed.values()))) == 1 and len(failed) == len(lines) > 1:
        raise first
    raise BadInput(f"{file}, line {number}: {first}")


def _reject_size(_: click.Context, __: click.Parameter, size: str | None) -> None:
    if size is not None:
        raise BadInput(
            "expected no --width or --height: images have the size that the bundle was exported for (tpx-info BUNDLE); "
            "for another, export one with tpx-export --image-size"
        )


@contextmanager
def _print_paths_on_exit() -> Iterator[list[Path]]:
    """Yield a list; its paths are printed on exit, below the progress bar, even after an error."""
    written: list[Path] = []
    try:
        yield written
    finally:
        for path in written:
            click.echo(click.format_filename(path))


@click.command(cls=TpxCommand)
@click.argument("prompt", required=False)
@click.option(
    "--prompts", "prompts_file", type=_PATH, help="File of prompts, one per line, or - for standard input."
)
@click.option(
    "--like",
    type=_PATH,
    is_eager=True,
    expose_value=False,
    callback=_apply_like,
    help="Image written by tpx-run whose settings become the defaults of the other options; not its prompt with --prompts.",
)
@options.bundle
@click.option(
    "--out",
    type=_PATH,
    help=".png, .jpg or .webp to write; {seed}, {prompt} and {number} (the prompt's) are replaced.  [default: by PROMPT]",
)
@click.option(
    "--seed",
    type=Seed(),
    default=0,
    show_default=True,
    help="Seed of the first image, or random; each further image adds 1.",
)
@options.steps
@options.guidance
@options.guidance_interval
@options.guidance_every
@options.cache_interval
@options.sampler
@options.depth
@click.option(
    "-n",
    "--num-images",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of images; a grid, or with {seed} in --out a file each.",
)
@options.batch_size
@options.engine
@options.threads
@click.option("--negative-prompt", "--negative", help="What the image should not show.")
@click.option("--class", "class_id", type=int, help="Number of the class to generate, instead of PROMPT.")
@click.option("--image", type=_PATH, help="Image to start from.")
@click.option("--mask", type=_PATH, help="Mask image, white where IMAGE is to be repainted.")
@click.option("--strength", type=float, help="Fraction of the steps to run on IMAGE, 0 to 1.  [default: 0.6]")
@click.option(
    "--no-t5/--t5",
    default=False,
    help="Leave out T5 of Stable Diffusion 3: saves memory, long prompts work less well.",
)
@click.option(
    "--no-verify",
    is_flag=True,
    help="Skip the hash check of the bundle's files, which is done once after each change of one.",
)
@click.option(
    "--width",
    "--height",
    "-W",
    "-H",
    hidden=True,
    expose_value=False,
    callback=_reject_size,
)
@click.option("--force", is_flag=True, help="Replace existing files.")
@click.option(
    "--skip-existing",
    is_flag=True,
    help="Keep files of these names, whatever is in them, and generate the others.",
)
def run(
    prompt: str | None,
    prompts_file: Path | None,
    bundle: str | None,
    out: Path | None,
    engine: str,
    force: bool,
    skip_existing: bool,
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
    """Generate images of PROMPT, of each prompt in a file, or of a class, and print the path of each file."""
    from .bundle import Bundle
    from .editing import resolve_strength
    from .engine import resolve
    from .generator import Generator
    from .images import grid
    from .input_images import load_image
    from .output_files import choose_output_files, remaining_jobs
    from .planning import MAX_IMAGES
    from .progress import progress
    from .prompts import read_prompt_lines
    from .verified import verify_once

    source = click.get_current_context().get_parameter_source("prompt")
    if prompts_file and source is ParameterSource.DEFAULT_MAP:  # the prompt of the image of --like
        prompt = None
    if prompt is not None and prompts_file:
        raise BadInput("expected PROMPT or --prompts, found both; leave out one of them")
    if prompt is None and not prompts_file and class_id is None:
        raise BadInput("expected PROMPT, --prompts or --class, found none; describe the image to generate")
    if force and skip_existing:
        raise BadInput("expected --force or --skip-existing, found both; leave out one of them")
    lines = read_prompt_lines(prompts_file) if prompts_file else {}
    subjects = list(lines.values()) or [prompt or ("" if class_id is None else f"class {class_id}")]
    seeds = range(seed, seed + min(num_images, MAX_IMAGES))  # `plan` rejects other values
    outputs = choose_output_files(out, subjects, seeds, force, skip_existing)
    like = click.get_current_context().meta.get(LIKE_METADATA, {})
    _require_image_of_like(like, image)
    strength = resolve_strength(image, mask, strength)
    input_image, input_mask = (load_image(file) if file else None for file in (image, mask))
    opened = Bundle.open(find_bundle(bundle), verify=False)
    chosen = resolve(engine, opened.manifest.precision)
    if not no_verify:
        verify_once(opened, lambda line: click.echo(line, err=True))
    if no_t5 and click.get_current_context().get_parameter_source("no_t5") is ParameterSource.DEFAULT_MAP:
        no_t5 = opened.has_t5  # --like of an image of another bundle
    several_batches = num_images * len(subjects) > batch_size
    generator = Generator(opened, chosen, t5=not no_t5, keep=several_batches)
    with warnings_as_notices():
        settings |= {"class_id": class_id, "strength": strength, "seed": seed, "num_images": num_images}
        planned = prompts_file and _plan_lines(generator, prompts_file, lines, settings)
        jobs = remaining_jobs(planned or generator.plan(prompt, **settings), outputs)
        edit = generator.edit(input_image, input_mask) if input_image else None
        _warn_unlike(like, opened, edit)
    if skipped := sum(output.skipped for output in outputs):
        click.echo(f"{skipped} of {len(outputs)} files are there already", err=True)
    if not jobs:
        return
    _print_engine(generator.engine, engine)
    batch_steps, steps = (generator.count_steps(part, batch_size) for part in (jobs[:1], jobs))
    with (
        warnings_as_notices(),
        _print_paths_on_exit() as written,
        progress("denoising", steps) as advance,
    ):

        def on_step(step: int, total: int, latents: object) -> None:
            advance(step, "" if step % batch_steps else "decoding")

        advance(0, "loading")
        images = generator.stream(jobs, batch_size, callback=on_step, edit=edit)
        for output in outputs:
            if not output.skipped:
                written.append(output.save(grid(list(islice(images, output.images))), force))
        advance(steps, "")


@click.command(cls=TpxCommand)
@click.argument("bundle", required=False)
@options.engine
@options.threads
@click.option(
    "--all-engines", is_flag=True, help="Verify on every engine that runs here; print why the others do not."
)
def verify(bundle: str | None, engine: str, all_engines: bool) -> None:
    """Check the hash of every file of BUNDLE, then compare every graph with the PyTorch model on an engine.

    BUNDLE defaults to $TPX_BUNDLE, else bundles/shapes.
    """
    from .bundle import Bundle
    from .engine import AUTO, ENGINES, NO_USABLE_ENGINE, resolve

    if all_engines and engine != AUTO:
        raise BadInput(
            f"expected --engine or --all-engines, found both; leave out --engine {shorten(engine)}"
        )
    opened = Bundle.open(find_bundle(bundle), verify=False)
    facts = opened.manifest
    chosen = None if all_engines else resolve(engine, facts.precision)
    opened.verify_files()
    click.echo(
        f"{facts.name} ({facts.precision}): {len(facts.files)} files, sizes and SHA-256 as in the manifest"
    )
    if chosen:
        _print_engine(chosen, engine)
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
@click.argument("bundle", required=False, metavar="[BUNDLE|IMAGE]")
def info(bundle: str | None) -> None:
    """Show which engines run on this machine and what BUNDLE is, or the settings of an IMAGE that tpx-run wrote.

    BUNDLE defaults to $TPX_BUNDLE, else bundles/shapes if it exists; only its manifest is read.
    """
    from .bundle import Bundle
    from .info import describe_bundle, describe_image, engines, machine

    if bundle and os.path.isfile(bundle):
        for line in describe_image(Path(bundle)):
            click.echo(line)
        return
    click.echo(machine() + "\n")
    for line in engines():
        click.echo(line)
    click.echo()
    try:
        path = find_bundle(bundle)
    except BadInput as error:
        if bundle is not None:
            raise
        click.echo(f"no bundle: {error}")
        return
    for line in describe_bundle(Bundle.open(path, verify=False)):
        click.echo(line)


def _verify_on(bundle: "Bundle", engine: "Engine") -> None:
    """Print the reports of one engine as a table. Raises EngineFailed if a part is out of tolerance."""
    from .verify import require_ok, verify_bundle

    with warnings_as_notices():
        reports = verify_bundle(bundle, engine)
    click.echo(table(reports))
    require_ok(reports, engine.name)


def table(reports: "Sequence[PartReport]") -> str:
    """The reports as a text table."""
    lines = [f"{'part':<22}{'error':>9}{'tolerance':>11}{'same routes':>13}{'at least':>10}  ok"]
    for report in reports:
        routes, minimum = "-", "-"
        if report.routing_agreement is not None:
            routes, minimum = f"{report.routing_agreement:.2%}", f"{report.min_agreement:.2%}"
        numbers = f"{report.part:<22}{report.error:>9.1e}{report.tolerance:>11.0e}{routes:>13}{minimum:>10}"
        lines.append(f"{numbers}  {'yes' if report.ok else 'NO'}")
    return "\n".join(lines)
