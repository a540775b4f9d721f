"""The process of one configuration: it makes its subject, then answers one request at a time and sleeps between them.

    python -m tpx_engines.bench.worker

Requests and answers are JSON, one on a line; the first request names the maker. An answer is {"error": kind, "line": why} or
what was asked for. Where stdin ends, so does the process.
"""

import base64
import ctypes
import importlib
import io
import json
import os
import signal
import sys
from statistics import fmean
from typing import Any, TextIO

from tpx_runtime.errors import TpxError

from .memory import peak_bytes
from .subject import Subject, Work

Request = dict[str, Any]


class Worker:
    """Requests by name; `start` comes first."""

    def __init__(self) -> None:
        self._subject: Subject | None = None

    def start(self, maker: str, work: Request, options: dict[str, Any]) -> Request:
        """Make the subject and draw its first picture: what the user of a fresh process waits for."""
        self._subject = subject = _find(maker)(Work.from_json(work), options)
        (picture,), _ = subject.draw(1)
        made = io.BytesIO()
        picture.save(made, "PNG")
        return {"png": base64.b64encode(made.getvalue()).decode(), "notes": subject.notes, **_memory()}

    def warm(self, images: int) -> Request:
        """Two steps of a batch that is about to be timed: engines take memory, and compile, for each size anew."""
        self._drawing().draw(images, steps=2)
        return {}

    def draw(self, images: int, seconds: float) -> Request:
        """One batch, and more of them until `seconds` are over; what one took on average."""
        timings = [self._drawing().draw(images)[1]]
        while sum(timing.seconds for timing in timings) < seconds:
            timings.append(self._drawing().draw(images)[1])
        return {
            "seconds": fmean(timing.seconds for timing in timings),
            "step_seconds": fmean(timing.step_seconds for timing in timings),
            **_memory(),
        }

    def call(self, function: str, arguments: dict[str, Any]) -> Request:
        """Anything else that wants a process of its own, such as an export or a matrix product."""
        answer: Request = _find(function)(**arguments)
        return answer

    def _drawing(self) -> Subject:
        assert self._subject is not None, "start comes first"
        return self._subject


def _find(name: str) -> Any:
    """`module:attribute`."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _memory() -> Request:
    return {"peak_bytes": peak_bytes()}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Until `requests` end."""
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except TpxError as error:
            answer = {"error": type(error).__name__, "line": " ".join(str(error).split())}
        except Exception as error:  # a framework's: whatever it raises is why it cannot be measured
            answer = {
                "error": "Failed",
                "line": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _end_with_parent() -> None:
    """A worker that waits sees its stdin end; on Linux one that is at work ends too when its parent was killed."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    """Answers have a pipe of their own: what frameworks print goes to stderr."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
