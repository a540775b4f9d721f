"""Interleaved measurements: their order, and the results that are kept."""

from itertools import count

from benchmarks.interleave import interleaved, warm_seconds


def test_names_are_interleaved_and_warm_up_rounds_dropped() -> None:
    number = count()
    assert interleaved("ab", lambda name: f"{name}{next(number)}", rounds=2, warm_up=1) == {
        "a": ["a2", "a4"],
        "b": ["b3", "b5"],
    }


def test_warm_seconds_makes_one_call_more() -> None:
    calls: list[None] = []
    assert warm_seconds(lambda: calls.append(None), times=3) > 0
    assert len(calls) == 4
