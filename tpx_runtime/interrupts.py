"""Signals that ask a process to end: Ctrl-C, SIGTERM, and SIGHUP of a terminal that closes. All are heard alike.

Only the main thread hears signals: in any other one, nothing here changes anything.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


def termination_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP unless nohup has it ignored."""
    found = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt for each of `termination_signals` too, so that whatever is half-written is cleaned up."""
    with _handled(termination_signals(), signal.default_int_handler):
        yield


@contextmanager
def deferred(second: Callable[[], BaseException] = KeyboardInterrupt) -> Iterator[threading.Event]:
    """Yields an event that the first signal sets, in the place of an exception between any two lines.

    The next one raises what `second` makes.
    """
    heard = threading.Event()

    def hear(number: int, frame: FrameType | None) -> None:
        if heard.is_set():
            raise second()
        heard.set()

    with _handled([signal.SIGINT, *termination_signals()], hear):
        yield heard


@contextmanager
def _handled(numbers: list[signal.Signals], handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
