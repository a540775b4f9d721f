"""How far a long run is, and how it goes on when it is stopped."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click

from ..errors import Cancelled, TpxError

LINE_EVERY_S = 30.0  # where stderr is no terminal


@dataclass
class Count:
    """Pictures to draw, and how many of them are saved by now."""

    total: int
    done: int = 0

    @property
    def left(self) -> int:
        return self.total - self.done


@contextmanager
def resumable(total: int) -> Iterator[Count]:
    """Count the pictures of a run; whatever stops it says how many are left, and how to go on.

    Raises Cancelled for Ctrl-C, and any other TpxError with that added.
    """
    count = Count(total)
    try:
        yield count
    except KeyboardInterrupt:
        raise Cancelled(f"cancelled; {_left(count)}") from None
    except TpxError as error:
        error.args = (f"{error}; {_left(count)}",)
        raise


def _left(count: Count) -> str:
    return f"{count.left} of {count.total} pictures are left, which the same command draws"


@contextmanager
def progress(count: Count) -> Iterator[Callable[[int], None]]:
    """Show pictures drawn and left on stderr: a bar on a terminal, elsewhere a line twice a minute.

    Yields a function to call with the number of pictures that were saved since.
    """
    if sys.stderr.isatty():
        with click.progressbar(
            length=count.total, label="drawing", file=sys.stderr, show_pos=True, item_show_func=_shown
        ) as bar:

            def advance(pictures: int) -> None:
                count.done += pictures
                bar.update(pictures, count.left)

            yield advance
        return
    said = time.monotonic()

    def mention(pictures: int) -> None:
        nonlocal said
        count.done += pictures
        if not count.left or time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            click.echo(f"drew {count.done} of {count.total} pictures, {count.left} left", err=True)

    yield mention


def _shown(left: int | None) -> str | None:
    return None if left is None else f"{left} left"
