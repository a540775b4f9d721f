"""A run that generates images and can be resumed with the same command."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import Cancelled, TpxError
from ..progress import progress


@contextmanager
def resumable(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of newly saved images and updates the progress bar.

    Ctrl-C raises Cancelled; its message, and that of any other TpxError, says how many images are left and how to resume.
    """
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        update(done, "")

    def remaining() -> str:
        return f"{total - done} of {total} images are left; run the same command again to resume"

    try:
        with progress("images", total) as update:
            yield advance
    except KeyboardInterrupt:
        raise Cancelled(f"cancelled; {remaining()}") from None
    except TpxError as error:
        error.args = (f"{error}; {remaining()}",)
        raise
