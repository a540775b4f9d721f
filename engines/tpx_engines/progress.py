"""Progress and cancellation of a build."""

import threading
from dataclasses import dataclass


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """Progress and cancellation of a build. The builder reports to it, from several threads concurrently.

    `fraction` (0..1) never decreases; `phase` is the builder's name for its innermost phase. Once `stop` is set, the builder
    stops at its next step, which can take a while because one of its steps takes nearly all of the time.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.fraction, self.phase = 0.0, ""
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()
        self._stop = stop or threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._stop.is_set()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name], self.phase = _Phase(parent, max(steps, 1)), name

    def step(self, name: str) -> bool:
        """Count a finished step of phase `name`. Returning False tells the builder to stop."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done += 1
                shares = [self._fraction(phase) for phase in self._phases if self._is_root(phase)]
                self.fraction = max([self.fraction, *shares])
        return not self.cancelled

    def finish(self, name: str) -> None:
        with self._lock:
            ended = self._phases.pop(name, None)
            if ended and ended.parent:
                self.phase = ended.parent

    def _is_root(self, name: str) -> bool:
        return self._phases[name].parent is None

    def _fraction(self, name: str) -> float:
        phase = self._phases[name]
        below = sum(self._fraction(child) for child, p in self._phases.items() if p.parent == name)
        return min((phase.done + below) / phase.steps, 1.0)
