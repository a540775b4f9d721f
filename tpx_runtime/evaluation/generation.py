"""Generates the missing images of a benchmark, shows progress, and counts the files at the end."""

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
from ..image_files import save_image
from ..images import grid
from ..records import write_json
from ..settings import Settings
from .benchmarks import Benchmark, Item, Target
from .record import require_same_run
from .resumable import resumable

MAX_LISTED = 10  # file names in a message


class Incomplete(TpxError):
    """A run ended, but some images that the evaluator needs are missing."""


@dataclass(frozen=True)
class Plan:
    """The readable items with the settings of each image, and the unreadable ones with the reason.

    `warnings` are those of readable items, for example about a truncated prompt.
    """

    readable: list[tuple[Item, list[Settings]]]
    unreadable: list[tuple[Item, str]]
    warnings: list[tuple[Item, str]]


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
    """Generate the first `limit` items (default: all) in `out`, except files that are complete, and count the files.

    `settings` are those of `Generator.plan`. Raises BadInput before anything is written; Cancelled, or the engine's error,
    with the number of images left; Incomplete if files are missing at the end.
    """
    planned = plan(generator, items[:limit], images, seed, settings)
    reject_unreadable(planned, skip_unreadable)
    if planned.warnings:
        click.echo(
            f"notice: {len(planned.warnings)} prompts with warnings, first: {planned.warnings[0][1]}",
            err=True,
        )
    record = benchmark.record_path(out)
    run_settings = _run_settings(benchmark, items, generator, planned, images, seed)
    targets = [target for item, jobs in planned.readable for target in benchmark.targets(out, item, jobs)]
    facts: dict[str, Any] = {
        "settings": run_settings,
        "prompts": {"in the file": len(items), "asked": len(items[:limit]), "drawn": len(planned.readable)},
        "unreadable": [_with_reason(*entry) for entry in planned.unreadable],
        "noticed": [_with_reason(*entry) for entry in planned.warnings],
        "complete": False,
    }
    try:
        require_same_run(record, out, run_settings, has_images=bool(benchmark.scored_files(out)))
        out.mkdir(parents=True, exist_ok=True)
        write_json(record, facts)
        for item, _ in planned.readable:
            benchmark.prepare(out, item)
    except OSError as error:
        raise BadInput(
            f"expected to write into {out}, found: {error.strerror}; choose another --out"
        ) from None
    remaining = [target for target in targets if not is_complete_png(target.path)]
    if len(remaining) < len(targets):
        click.echo(f"{len(targets) - len(remaining)} of {len(targets)} files exist already", err=True)
    with resumable(sum(len(target.jobs) for target in remaining)) as advance:
        generate(generator, remaining, batch_size, advance)
    missing = [target.path for target in targets if not is_complete_png(target.path)]
    unexpected = sorted(benchmark.scored_files(out) - {target.path for target in targets})
    counts = {"expected": len(targets), "found": len(targets) - len(missing), "strange": len(unexpected)}
    write_json(record, {**facts, "complete": not missing, "files": counts})
    if unexpected:
        click.echo(
            f"{len(unexpected)} unexpected files in the folder would be scored too: {_file_list(unexpected)}",
            err=True,
        )
    if missing:
        raise Incomplete(
            f"expected {len(targets)} files in {out}, found {len(targets) - len(missing)}, missing {_file_list(missing)}; "
            "run the same command again"
        )
    click.echo(f"complete: all {len(targets)} files are in {click.format_filename(out)}")


def plan(
    generator: Generator, items: Sequence[Item], images: int, seed: int, settings: dict[str, Any]
) -> Plan:
    """Plan all images in advance; image i of each prompt has seed `seed + i`.

    Raises BadInput if all prompts are rejected for the same reason, because then the prompts are not the cause.
    """
    planned = Plan([], [], [])
    for item in items:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                jobs = generator.plan(item.prompt, seed=seed, num_images=images, **settings)
            except BadInput as error:
                planned.unreadable.append((item, str(error)))
                continue
        planned.readable.append((item, jobs))
        planned.warnings.extend((item, str(w.message)) for w in caught if issubclass(w.category, UserWarning))
    reasons = {reason for _, reason in planned.unreadable}
    if not planned.readable and len(reasons) == 1:
        raise BadInput(reasons.pop())
    return planned


def reject_unreadable(planned: Plan, skip: bool) -> None:
    """Raise BadInput if prompts cannot be read; with `skip`, list them on stderr instead if others can."""
    if not planned.unreadable:
        return
    (first, reason), total = planned.unreadable[0], len(planned.readable) + len(planned.unreadable)
    if not skip or not planned.readable:
        advice = "use another bundle" + (", or add --skip-unreadable" if planned.readable else "")
        raise BadInput(
            f"expected prompts that this model can read, found {len(planned.unreadable)} of {total} that it cannot, first "
            f"{first.name} {shorten(first.prompt)} ({reason}); {advice}"
        )
    for item, why in planned.unreadable:
        click.echo(f"skipped {item.name} {shorten(item.prompt)}: {why}", err=True)
    click.echo(
        f"skipped {len(planned.unreadable)} of {total} prompts; the evaluator does not report this, and its score covers "
        f"only the other {len(planned.readable)}",
        err=True,
    )


def generate(
    generator: Generator, targets: Sequence[Target], batch_size: int, advance: Callable[[int], None]
) -> None:
    """Generate and save each target; a batch holds as many targets as fit, with any prompts."""
    targets_per_batch = max(1, batch_size // len(targets[0].jobs)) if targets else 1
    for start in range(0, len(targets), targets_per_batch):
        group = targets[start : start + targets_per_batch]
        images = iter(generator.generate([job for target in group for job in target.jobs], batch_size))
        for target in group:
            target_images = [next(images) for _ in target.jobs]
            save_image(grid(target_images), target.path)
            advance(len(target_images))


def is_complete_png(path: Path) -> bool:
    """Whether the file is a PNG with all chunks and valid checksums."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _run_settings(
    benchmark: Benchmark, items: Sequence[Item], generator: Generator, planned: Plan, images: int, seed: int
) -> dict[str, Any]:
    """The settings that two runs must share to write into the same folder."""
    digest, job = hashlib.sha256(), planned.readable[0][1][0]
    for item in items:
        digest.update(repr((item.name, item.prompt, item.line)).encode())
    return {
        "benchmark": benchmark.name,
        "prompts_sha256": digest.hexdigest(),
        "bundle": generator.manifest.name,
        "bundle_sha256": generator.manifest.sha256,
        "engine": generator.engine.name,
        **job.loop_settings,
        "seed": seed,
        "images": images,
    }


def _with_reason(item: Item, why: str) -> dict[str, str]:
    return {"name": item.name, "prompt": item.prompt, "why": why}


def _file_list(paths: Sequence[Path]) -> str:
    more = len(paths) - MAX_LISTED
    return ", ".join(map(str, paths[:MAX_LISTED])) + (f" and {more} more" if more > 0 else "")
