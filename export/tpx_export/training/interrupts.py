"""Ctrl-C, or a polite kill, that waits for the step under way: half of an optimizer's step is no state to go on from."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tpx_runtime.command import polite_kills


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGINT or one of `polite_kills` came; the second raises KeyboardInterrupt at once.

    Outside of the main thread, which alone gets signals, nothing is changed.
    """
    noted = threading.Event()

    def note(number: int, frame: object) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, *polite_kills())}
    try:
        yield noted.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
