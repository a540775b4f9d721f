"""The parent's side of a worker process: starts it, sends requests, and stops it with all its children."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tpx_runtime.errors import TpxError

REST_S = 0.05  # pause after every answer, in which spinning threads of an engine go to sleep


class MeasurementFailed(TpxError):
    """A configuration cannot be measured; the message says why."""


class WorkerProcess:
    """A worker process in its own session, so that Ctrl-C reaches only the parent, and a kill reaches all its children.

    `folder` holds its temporary files. `began` and `answered` are the times (time.perf_counter) of its start and of its last
    answer.
    """

    def __init__(self, folder: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  stop() closes it
        self.began = self.answered = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tpx_engines.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the answer. Raises MeasurementFailed for an error answer or if the process has ended."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(OSError):  # on Windows not a BrokenPipeError
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        self.answered = time.perf_counter()
        if not line:
            raise MeasurementFailed(self._exit_reason())
        answer: dict[str, Any] = json.loads(line)
        time.sleep(REST_S)
        if "error" in answer:
            raise MeasurementFailed(answer["line"])
        return answer

    def stop(self) -> None:
        """Kill the process and all its children. May be called twice."""
        _kill_group(self._process.pid)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _exit_reason(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"expected an answer from the worker process, found {how}" + (
            f": {lines[-1][:200]}" if lines else ""
        )


def _kill_group(pid: int) -> None:
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(pid)], capture_output=True, check=False)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
