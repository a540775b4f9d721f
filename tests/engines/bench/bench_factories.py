"""Factories of runners that need no engine. Worker processes import them by name.

Each appends its process id to options["log"], so that tests can see which processes were started.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image

from tpx_engines.bench.runner import Runner, Workload
from tpx_runtime.errors import EngineUnavailable
from tpx_runtime.generator import Generator


class _FakeGenerator:
    """A stand-in for Generator that returns seeded noise; each step takes `step_s` seconds."""

    def __init__(self, error: int = 0, step_s: float = 0.0) -> None:
        self._error, self._step_s = error, step_s

    def plan(self, prompt: str, *, seed: int, steps: int, num_images: int, **rest: Any) -> list[Any]:
        return [SimpleNamespace(seed=seed + i, steps=steps) for i in range(num_images)]

    def clear_conditions(self) -> None:
        pass

    def generate(self, jobs: list[Any], batch_size: int, callback: Callable[..., None]) -> list[Image.Image]:
        for step in range(jobs[0].steps):
            time.sleep(self._step_s)
            callback(step + 1, jobs[0].steps, None)
        noise = [np.random.default_rng(job.seed).integers(0, 200, (8, 12, 3)) for job in jobs]
        return [Image.fromarray((values + self._error).astype(np.uint8)) for values in noise]


def _log(options: dict[str, Any]) -> None:
    with Path(options["log"]).open("a") as file:
        file.write(f"{os.getpid()}\n")


def right(workload: Workload, options: dict[str, Any]) -> Runner:
    _log(options)
    print("output of a framework must not be read as an answer")
    return Runner(cast(Generator, _FakeGenerator()), workload)


def wrong(workload: Workload, options: dict[str, Any]) -> Runner:
    _log(options)
    return Runner(cast(Generator, _FakeGenerator(error=50)), workload)


def full(workload: Workload, options: dict[str, Any]) -> Runner:
    raise OSError(28, "No space left on device")


def slow(workload: Workload, options: dict[str, Any]) -> Runner:
    _log(options)
    return Runner(cast(Generator, _FakeGenerator(step_s=options["step_s"])), workload)


def compiled(workload: Workload, options: dict[str, Any]) -> Runner:
    _log(options)
    notes = {
        "setting": workload.compile_setting or "freezing",
        "compile_s": 12.0,
        "tried": {"default": 5.0, "freezing": 4.0},
    }
    return Runner(cast(Generator, _FakeGenerator()), workload, notes)


def unavailable(workload: Workload, options: dict[str, Any]) -> Runner:
    raise EngineUnavailable("expected a GPU, found none;\nbuy one")


def broken(workload: Workload, options: dict[str, Any]) -> Runner:
    raise RuntimeError("deep inside a framework")


def killed(workload: Workload, options: dict[str, Any]) -> Runner:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
