"""A worker seen from its parent: started, asked, and stopped with everything that it started."""

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

REST_S = 0.05  # after every answer: threads that an engine leaves spinning fall asleep within it


class Unmeasured(TpxError):
    """A configuration cannot be measured here; the message says why."""


class WorkerProcess:
    """A process of its own session, so that Ctrl-C reaches the parent alone, and a kill all that the process started.

    `folder` takes its temporary files. `began` and `answered` are when it was started, and when its last answer came, as
    time.perf_counter says it.
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
        """Its answer. Raises Unmeasured for one that says why not, and for a process that ended."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        self.answered = time.perf_counter()
        if not line:
            raise Unmeasured(self._epitaph())
        answer: dict[str, Any] = json.loads(line)
        time.sleep(REST_S)
        if "error" in answer:
            raise Unmeasured(answer["line"])
        return answer

    def stop(self) -> None:
        """Kill it and all that it started; again is no harm."""
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

    def _epitaph(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"expected an answer of its process, found {how}" + (f": {said[-1][:200]}" if said else "")


def _kill_group(pid: int) -> None:
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(pid)], capture_output=True, check=False)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
