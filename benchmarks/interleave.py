"""Interleaved measurements (A B C A B C ...), so that slow phases of the machine affect all candidates."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Seconds per call, the mean of `times` calls in a row."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def warm_seconds(call: Callable[[], object], times: int = 1) -> float:
    """The same, after one warm-up call."""
    call()
    return seconds(call, times)


def interleaved_rounds(
    names: Iterable[K], measure: Callable[[K], R], rounds: int, warm_up: int = 0
) -> Iterator[dict[K, R]]:
    """Yield {name: measure(name)} for each round, after `warm_up` rounds whose results are dropped."""
    names = list(names)
    for number in range(warm_up + rounds):
        results = {name: measure(name) for name in names}
        if number >= warm_up:
            yield results


def interleaved(
    names: Iterable[K], measure: Callable[[K], R], rounds: int, warm_up: int = 0
) -> dict[K, list[R]]:
    """The results of all rounds of `interleaved_rounds`, by name."""
    results: dict[K, list[R]] = {name: [] for name in names}
    for round_results in interleaved_rounds(results, measure, rounds, warm_up):
        for name, result in round_results.items():
            results[name].append(result)
    return results
