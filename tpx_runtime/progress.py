"""The progress of a long task, on stderr: a bar on a terminal, elsewhere a line twice a minute."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

LINE_EVERY_S = 30.0

Advance = Callable[[int, str], None]  # (how many are done, what to say of it)


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Yields a function to call with the count of what is done; the time left is estimated from this run's pace."""
    began, first = time.monotonic(), None

    def left(done: int) -> str:
        nonlocal first
        first = done if first is None else first
        taken = time.monotonic() - began
        if done <= first or done >= total:
            return ""
        return f"{_duration(taken / (done - first) * (total - done))} left"

    if sys.stderr.isatty():
        with click.progressbar(
            length=total, label=label, file=sys.stderr, show_pos=True, show_eta=False, item_show_func=_shown
        ) as bar:

            def move(done: int, said: str) -> None:
                bar.update(done - bar.pos, "  ".join(filter(None, (said, left(done)))))

            yield move
        return
    last = -LINE_EVERY_S

    def mention(done: int, said: str) -> None:
        nonlocal last
        remaining = left(done)
        if done >= total or time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            click.echo(f"{label} {done}/{total}{''.join(f'  {x}' for x in (said, remaining) if x)}", err=True)

    yield mention


def _shown(said: str | None) -> str | None:
    return said


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )
