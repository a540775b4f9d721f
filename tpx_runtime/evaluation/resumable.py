"""A run of pictures that the same command goes on with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import Cancelled, TpxError
from ..progress import progress


@contextmanager
def resumable(total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of pictures saved since; it shows how far the run is.

    Whatever stops the run says how many are left, and how to go on: raises Cancelled for Ctrl-C, and any other TpxError with
    that added.
    """
    done = 0

    def advance(pictures: int) -> None:
        nonlocal done
        done += pictures
        move(done, "")

    def left() -> str:
        return f"{total - done} of {total} pictures are left, which the same command draws"

    try:
        with progress("pictures", total) as move:
            yield advance
    except KeyboardInterrupt:
        raise Cancelled(f"cancelled; {left()}") from None
    except TpxError as error:
        error.args = (f"{error}; {left()}",)
        raise
