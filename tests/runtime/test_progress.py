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
