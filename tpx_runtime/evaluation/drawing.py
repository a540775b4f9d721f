"""Draw what a benchmark asks for and is not there yet, say how far it came, and count what lies there."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image

from ..errors import BadInput, TpxError, shorten
from ..generator import Generator
from ..images import grid, save_png
from ..records import write_json
from ..settings import Settings
from .benchmarks import Benchmark, Item, Target
from .record import refuse_others
from .resumable import resumable

SHOWN = 10  # names of missing or strange files


class Incomplete(TpxError):
    """A run ended, but not every picture lies where the evaluator looks for it."""


@dataclass(frozen=True)
class Plan:
    """The items that the model can read, with the settings of each picture, and the others with the reason.

    `noticed`: what was warned of a readable item, such as that the model leaves out the end of its prompt.
    """

    readable: list[tuple[Item, list[Settings]]]
    unreadable: list[tuple[Item, str]]
    noticed: list[tuple[Item, str]]


def run(
    benchmark: Benchmark,
    items: Sequence[Item],
    out: Path,
    generator: Generator,
    *,
    images: int = 4,
    seed: int = 0,
    batch_size: int = 8,
    limit: int | None = None,
    skip_unreadable: bool = False,
    **settings: Any,
) -> None:
    """Draw the first `limit` items (all, without) into `out`, except what lies there whole, and count the files.

    `settings` are those of `Generator.plan`. Raises BadInput before anything is written; Cancelled or the engine's error
    with what is left; Incomplete if the count is short.
    """
    made = plan(generator, items[:limit], images, seed, settings)
    refuse_unreadable(made, skip_unreadable)
    if made.noticed:
        click.echo(f"notice on {len(made.noticed)} prompts, the first: {made.noticed[0][1]}", err=True)
    record, chosen = benchmark.record(out), _settings(benchmark, items, generator, made, images, seed)
    targets = [target for item, jobs in made.readable for target in benchmark.targets(out, item, jobs)]
    facts: dict[str, Any] = {
        "settings": chosen,
        "prompts": {"in the file": len(items), "asked": len(items[:limit]), "drawn": len(made.readable)},
        "unreadable": [_because(*one) for one in made.unreadable],
        "noticed": [_because(*one) for one in made.noticed],
        "complete": False,
    }
    try:
        refuse_others(record, out, chosen, pictures=bool(benchmark.seen(out)))
        out.mkdir(parents=True, exist_ok=True)
        write_json(record, facts)
        for item, _ in made.readable:
            benchmark.prepare(out, item)
    except OSError as error:
        raise BadInput(
            f"expected to write into {out}, found: {error.strerror}; choose another --out"
        ) from None
    left = [target for target in targets if not is_whole(target.path)]
    if len(left) < len(targets):
        click.echo(f"{len(targets) - len(left)} of {len(targets)} files are there already", err=True)
    with resumable(sum(len(target.jobs) for target in left)) as advance:
        draw(generator, left, batch_size, advance)
    missing = [target.path for target in targets if not is_whole(target.path)]
    strange = sorted(benchmark.seen(out) - {target.path for target in targets})
    counts = {"expected": len(targets), "found": len(targets) - len(missing), "strange": len(strange)}
    write_json(record, {**facts, "complete": not missing, "files": counts})
    if strange:
        click.echo(
            f"{len(strange)} more files lie there that the evaluator reads too: {_named(strange)}", err=True
        )
    if missing:
        raise Incomplete(
            f"expected {len(targets)} files in {out}, found {len(targets) - len(missing)}, without {_named(missing)}; "
            "run the same command again"
        )
    click.echo(f"expected {len(targets)} files in {click.format_filename(out)}, found {len(targets)}")


def plan(
    generator: Generator, items: Sequence[Item], images: int, seed: int, settings: dict[str, Any]
) -> Plan:
    """Plan every picture before any is drawn: picture i of each prompt has seed `seed + i`.

    Raises BadInput where all prompts are refused for one reason, which then lies not in a prompt.
    """
    made = Plan([], [], [])
    for item in items:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                jobs = generator.plan(item.prompt, seed=seed, num_images=images, **settings)
            except BadInput as error:
                made.unreadable.append((item, str(error)))
                continue
        made.readable.append((item, jobs))
        made.noticed.extend((item, str(w.message)) for w in caught if issubclass(w.category, UserWarning))
    reasons = {reason for _, reason in made.unreadable}
    if not made.readable and len(reasons) == 1:
        raise BadInput(reasons.pop())
    return made


def refuse_unreadable(made: Plan, skip: bool) -> None:
    """Raise BadInput where prompts cannot be read, unless they are to be skipped: then say what that means."""
    if not made.unreadable:
        return
    (first, reason), asked = made.unreadable[0], len(made.readable) + len(made.unreadable)
    if not skip or not made.readable:
        mend = "take another bundle" + (", or add --skip-unreadable" if made.readable else "")
        raise BadInput(
            f"expected prompts that this model can read, found {len(made.unreadable)} of {asked} that it cannot, the first "
            f"{first.name} {shorten(first.prompt)} ({reason}); {mend}"
        )
    for item, why in made.unreadable:
        click.echo(f"skipped {item.name} {shorten(item.prompt)}: {why}", err=True)
    click.echo(
        f"skipped {len(made.unreadable)} of {asked} prompts; an evaluator does not miss them, so that its score is of the "
        f"other {len(made.readable)} alone",
        err=True,
    )


def draw(
    generator: Generator, targets: Sequence[Target], batch_size: int, advance: Callable[[int], None]
) -> None:
    """Draw and save each target; as many as fit into a batch are drawn together, whatever their prompts."""
    together = max(1, batch_size // len(targets[0].jobs)) if targets else 1
    for start in range(0, len(targets), together):
        group = targets[start : start + together]
        images = iter(generator.draw([job for target in group for job in target.jobs], batch_size))
        for target in group:
            drawn = [next(images) for _ in target.jobs]
            save_png(drawn[0] if len(drawn) == 1 else grid(drawn), target.path)
            advance(len(drawn))


def is_whole(path: Path) -> bool:
    """Whether a PNG lies there with all its chunks, each of its checksum."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _settings(
    benchmark: Benchmark, items: Sequence[Item], generator: Generator, made: Plan, images: int, seed: int
) -> dict[str, Any]:
    """What two runs must share if their pictures are to lie in one folder."""
    digest, job = hashlib.sha256(), made.readable[0][1][0]
    for item in items:
        digest.update(repr((item.name, item.prompt, item.line)).encode())
    return {
        "benchmark": benchmark.name,
        "prompts_sha256": digest.hexdigest(),
        "bundle": generator.manifest.name,
        "bundle_sha256": generator.manifest.sha256,
        "engine": generator.engine.name,
        "sampler": job.sampler,
        "steps": job.steps,
        "guidance": job.guidance,
        "guidance_interval": list(job.guidance_interval),
        "guidance_every": job.guidance_every,
        "depth": job.depth,
        "seed": seed,
        "images": images,
    }


def _because(item: Item, why: str) -> dict[str, str]:
    return {"name": item.name, "prompt": item.prompt, "why": why}


def _named(paths: Sequence[Path]) -> str:
    more = len(paths) - SHOWN
    return ", ".join(map(str, paths[:SHOWN])) + (f" and {more} more" if more > 0 else "")
