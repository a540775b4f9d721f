"""Ctrl-C, or a polite kill, waits for the current step to end: half of an optimizer's step cannot be resumed."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tpx_runtime.command import polite_kills


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGINT or one of `polite_kills` came; a second one raises KeyboardInterrupt.

    Outside of the main thread, the only one that gets signals, nothing is changed.
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
