"""Signals that are delayed until an import is over."""

import asyncio
import signal
import threading
from types import FrameType
from typing import Any

import pytest

from tpx_runtime.interrupts import termination_as_interrupt, uninterrupted


def test_a_delayed_interrupt_is_raised_at_the_end_and_replaces_an_exception() -> None:
    log: list[str] = []

    @uninterrupted()
    def interrupted_import() -> None:
        signal.raise_signal(signal.SIGINT)
        log.append("went on")
        raise ImportError("half imported")

    with pytest.raises(KeyboardInterrupt):
        interrupted_import()
    assert log == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_delayed_signal_reaches_the_handler_that_was_installed_before() -> None:
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            assert received == []
        assert received == [signal.SIGTERM]
        with uninterrupted():
            pass
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_event_loop_hears_of_a_delayed_signal_once() -> None:
    calls: list[int] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: calls.append(1))
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
        for _ in range(5):
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert calls == [1]


def test_a_handler_that_was_not_installed_from_python_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[int] = []
    get, install = signal.getsignal, signal.signal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else get(number))

    def record(number: int, handler: Any) -> Any:
        installed.append(number)
        return install(number, handler)

    monkeypatch.setattr(signal, "signal", record)
    with uninterrupted():
        assert signal.SIGINT in installed
    assert signal.SIGTERM not in installed


def test_other_threads_leave_the_handlers_alone() -> None:
    found: list[object] = []

    def run() -> None:
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_ctrl_break_is_handled_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hasattr(signal, "SIGBREAK")
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    with pytest.raises(KeyboardInterrupt), termination_as_interrupt():
        signal.raise_signal(signal.SIGUSR1)
