"""Things measured in turns (A B C A B C ...), so that a slow moment of the machine meets all of them."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Seconds of one call, the mean of several in a row."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def settled_seconds(call: Callable[[], object], times: int = 1) -> float:
    """The same, after one call that does not count."""
    call()
    return seconds(call, times)


def turns(
    names: Iterable[K], measure: Callable[[K], R], rounds: int, warm_up: int = 0
) -> Iterator[dict[K, R]]:
    """What `measure` finds of each name, round by round, after `warm_up` rounds that do not count."""
    names = list(names)
    for number in range(warm_up + rounds):
        found = {name: measure(name) for name in names}
        if number >= warm_up:
            yield found


def in_turns(
    names: Iterable[K], measure: Callable[[K], R], rounds: int, warm_up: int = 0
) -> dict[K, list[R]]:
    """All rounds of `turns` by name."""
    found: dict[K, list[R]] = {name: [] for name in names}
    for one in turns(found, measure, rounds, warm_up):
        for name, result in one.items():
            found[name].append(result)
    return found
