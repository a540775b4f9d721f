"""Interleaved measurements: the order of the calls, and which results are kept."""

from itertools import count

from benchmarks.interleave import interleaved, warm_seconds


def test_calls_are_interleaved_and_warm_up_rounds_are_dropped() -> None:
    number = count()
    assert interleaved("ab", lambda name: f"{name}{next(number)}", rounds=2, warm_up=1) == {
        "a": ["a2", "a4"],
        "b": ["b3", "b5"],
    }


def test_warm_seconds_makes_one_additional_warm_up_call() -> None:
    calls: list[None] = []
    assert warm_seconds(lambda: calls.append(None), times=3) > 0
    assert len(calls) == 4
