"""Makers of subjects that need no engine; a worker process imports them by name.

Each writes its process id into options["log"], by which a test sees who was started.
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

from tpx_engines.bench.subject import Subject, Work
from tpx_runtime.errors import EngineUnavailable
from tpx_runtime.generator import Generator


class _Painter:
    """Noise of a seed in the place of a generator's pictures; a step takes `step_s`."""

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


def right(work: Work, options: dict[str, Any]) -> Subject:
    _log(options)
    print("what a framework prints is no answer")
    return Subject(cast(Generator, _Painter()), work)


def wrong(work: Work, options: dict[str, Any]) -> Subject:
    _log(options)
    return Subject(cast(Generator, _Painter(error=50)), work)


def slow(work: Work, options: dict[str, Any]) -> Subject:
    _log(options)
    return Subject(cast(Generator, _Painter(step_s=options["step_s"])), work)


def compiled(work: Work, options: dict[str, Any]) -> Subject:
    _log(options)
    notes = {
        "setting": work.tuned or "freezing",
        "compile_s": 12.0,
        "tried": {"default": 5.0, "freezing": 4.0},
    }
    return Subject(cast(Generator, _Painter()), work, notes)


def unavailable(work: Work, options: dict[str, Any]) -> Subject:
    raise EngineUnavailable("expected a GPU, found none;\nbuy one")


def broken(work: Work, options: dict[str, Any]) -> Subject:
    raise RuntimeError("deep inside a framework")


def killed(work: Work, options: dict[str, Any]) -> Subject:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
