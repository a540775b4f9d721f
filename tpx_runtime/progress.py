"""Progress of a long task on stderr: a bar on a terminal, otherwise one line every 30 seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

LINE_INTERVAL_S = 30.0

Advance = Callable[[int, str], None]  # (number of items done, message)


@contextmanager
def progress(label: str, total: int, first: int = 0) -> Iterator[Advance]:
    """Yield a function to call with the number of items done, of which an earlier run did `first`.

    The remaining time is estimated from this run's speed, as soon as possible without its first item, whose time includes
    loading.
    """
    start_s, start = time.monotonic(), first

    def remaining(done: int) -> str:
        nonlocal start_s, start
        if done <= start or done >= total:
            return ""
        now_s = time.monotonic()
        time_left = f"{_duration((now_s - start_s) / (done - start) * (total - done))} left"
        if start == first:
            start_s, start = now_s, done
        return time_left

    if sys.stderr.isatty():
        with click.progressbar(
            length=total,
            label=label,
            file=sys.stderr,
            show_pos=True,
            show_eta=False,
            item_show_func=_identity,
        ) as bar:

            def update_bar(done: int, message: str) -> None:
                bar.update(done - bar.pos, "  ".join(filter(None, (message, remaining(done)))))
                bar.render_progress()  # `update` draws only when the number changes

            yield update_bar
        return
    last_s, complete = -LINE_INTERVAL_S, False

    def print_line(done: int, message: str) -> None:
        nonlocal last_s, complete
        time_left = remaining(done)
        if (done >= total and not complete) or time.monotonic() - last_s >= LINE_INTERVAL_S:
            last_s, complete = time.monotonic(), done >= total
            click.echo(
                f"{label} {done}/{total}{''.join(f'  {x}' for x in (message, time_left) if x)}", err=True
            )

    yield print_line


def _identity(message: str | None) -> str | None:
    return message


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )
