"""Signals that ask a process to end: Ctrl-C, Ctrl-Break, SIGTERM, and SIGHUP when the terminal closes, handled alike.

Only the main thread can handle signals; in other threads the functions below do nothing.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


def termination_signals() -> list[signal.Signals]:
    """SIGTERM, SIGHUP unless it is ignored (nohup), and SIGBREAK, as far as the system has them."""
    found = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    if hasattr(signal, "SIGBREAK"):
        found.append(signal.SIGBREAK)
    return found


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on each of `termination_signals` too, so that partial output is cleaned up."""
    with _handled(termination_signals(), signal.default_int_handler):
        yield


@contextmanager
def deferred_interrupts(
    second: Callable[[], BaseException] = KeyboardInterrupt,
) -> Iterator[threading.Event]:
    """Yield an event that the first signal sets, instead of raising an exception at an arbitrary line.

    A second signal raises `second()`.
    """
    received = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if received.is_set():
            raise second()
        received.set()

    with _handled([signal.SIGINT, *termination_signals()], handle):
        yield received


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Deliver the signals that arrive inside only at the end, also if an exception is raised.

    For imports of extension modules: an exception raised in their initialisation can be lost, or become an ImportError.
    """
    received: list[int] = []
    try:
        with (
            _handled([signal.SIGINT, *termination_signals()], lambda number, frame: received.append(number)),
            _no_wakeup(),
        ):
            yield
    finally:
        for number in received:
            signal.raise_signal(number)


@contextmanager
def _no_wakeup() -> Iterator[None]:
    """Tell no event loop of signals inside, which would handle them now, and again when they are delivered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)


@contextmanager
def _handled(numbers: list[signal.Signals], handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # None: a handler of the application that was not installed from Python, and could not be restored.
    replaceable = [number for number in numbers if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, handler) for number in replaceable}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
