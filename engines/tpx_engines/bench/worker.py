"""The process of one configuration: creates its runner, then answers requests one at a time.

    python -m tpx_engines.bench.worker

Requests and answers are JSON, one per line; the first request names the factory. An answer is the result of the request or
{"error": exception type, "line": message}. The process exits at the end of stdin.
"""

import base64
import ctypes
import importlib
import io
import json
import os
import signal
import sys
import tempfile
from statistics import fmean
from typing import Any, TextIO

from tpx_runtime.errors import TpxError, one_line
from tpx_runtime.files import is_full

from .memory import peak_bytes
from .runner import Runner, Workload

Request = dict[str, Any]


class Worker:
    """The requests, by name. `start` must be the first."""

    def __init__(self) -> None:
        self._runner: Runner | None = None

    def start(self, factory: str, workload: Request, options: dict[str, Any]) -> Request:
        """Create the runner and generate the first image: what a user waits for in a new process."""
        self._runner = runner = _resolve(factory)(Workload.from_json(workload), options)
        (image,), _ = runner.draw(1)
        file = io.BytesIO()
        image.save(file, "PNG")
        return {"png": base64.b64encode(file.getvalue()).decode(), "notes": runner.notes, **_memory()}

    def warm(self, images: int) -> Request:
        """Run two steps at a batch size to be timed, three times.

        Engines allocate and compile for each size in its first calls, and capture a CUDA graph in the third.
        """
        for _ in range(3):
            self._started_runner().draw(images, steps=2)
        return {}

    def draw(self, images: int, seconds: float) -> Request:
        """Generate batches until `seconds` have passed, at least one; return the mean time of a batch."""
        timings = [self._started_runner().draw(images)[1]]
        while sum(timing.seconds for timing in timings) < seconds:
            timings.append(self._started_runner().draw(images)[1])
        return {
            "seconds": fmean(timing.seconds for timing in timings),
            "step_seconds": fmean(timing.step_seconds for timing in timings),
            **_memory(),
        }

    def call(self, function: str, arguments: dict[str, Any]) -> Request:
        """Call any function that needs a separate process, such as an export or a matrix product."""
        answer: Request | None = _resolve(function)(**arguments)
        return answer or {}

    def _started_runner(self) -> Runner:
        assert self._runner is not None, "start comes first"
        return self._runner


def _resolve(name: str) -> Any:
    """Import `module:attribute`."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _memory() -> Request:
    return {"peak_bytes": peak_bytes()}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until the stream ends."""
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except TpxError as error:
            answer = {"error": type(error).__name__, "line": " ".join(str(error).split())}
        except Exception as error:  # from a framework: any exception is a reason why it cannot be measured
            answer = {"error": "Failed", "line": _reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _reason(error: Exception) -> str:
    if is_full(error):  # results are written by the parent
        return f"expected room in {tempfile.gettempdir()}, found: {one_line(error)}; free some space or set TMPDIR"
    return f"{type(error).__name__}: {one_line(error)}"


def _exit_with_parent() -> None:
    """On Linux, kill this process when its parent dies. An idle worker also exits at the end of its stdin."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    """Send answers to the original stdout, and redirect everything that frameworks print to stderr."""
    _exit_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
