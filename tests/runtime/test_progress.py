"""The estimate of the time that a long task still takes."""

import pytest

from tpx_runtime import progress as module
from tpx_runtime.progress import progress


@pytest.mark.parametrize("first", [0, 40])
def test_time_left_is_that_of_the_items_left_at_this_runs_speed(
    first: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with progress("images", first + 10, first) as advance:
        for done in range(1, 11):
            now += 60
            advance(first + done, "")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"images {first + 1}/{first + 10}  9 min 00 s left"
    assert lines[8] == f"images {first + 9}/{first + 10}  1 min 00 s left"
    assert lines[9] == f"images {first + 10}/{first + 10}"


def test_time_left_is_estimated_without_the_first_item_which_includes_loading(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with progress("steps", 4) as advance:
        for seconds, done in ((100, 1), (40, 2), (40, 3), (40, 4), (1, 4)):
            now += seconds
            advance(done, "decoding" if done == 4 else "")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "steps 1/4  5 min 00 s left",
        "steps 2/4  1 min 20 s left",
        "steps 3/4  40 s left",
        "steps 4/4  decoding",
    ]


def test_a_bar_shows_a_message_before_the_first_item_and_removes_it_after_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True)
    with progress("steps", 2) as advance:
        for done, message in ((0, "loading"), (1, ""), (2, "decoding"), (2, "")):
            advance(done, message)
    shown = capsys.readouterr().err.removesuffix("\x1b[?25h\n").split("\r")[-4:]
    assert [line.rpartition("]")[2].split() for line in shown] == [
        ["0/2", "loading"],
        ["1/2", "0", "s", "left"],
        ["2/2", "decoding"],
        ["2/2"],
    ]
