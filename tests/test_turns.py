"""The order in which benchmarks measure things, and what of it counts."""

from itertools import count

from benchmarks.turns import in_turns, settled_seconds


def test_all_take_turns_and_warming_up_does_not_count() -> None:
    number = count()
    assert in_turns("ab", lambda name: f"{name}{next(number)}", rounds=2, warm_up=1) == {
        "a": ["a2", "a4"],
        "b": ["b3", "b5"],
    }


def test_a_settled_call_is_called_once_more() -> None:
    calls: list[None] = []
    assert settled_seconds(lambda: calls.append(None), times=3) > 0
    assert len(calls) == 4
