"""How far a build is, and the switch that stops it."""

import threading
from dataclasses import dataclass


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """How far a build is, and the switch that stops it. The builder reports, from several threads at once; others look on.

    `fraction` (0..1) never falls; `phase` is what the builder calls its innermost work. Once `stop` is set, the builder
    stops at its next step, which may be a while: one of its steps takes nearly all of the time.
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
        """A step of `name` is done. False asks the builder to stop."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done += 1
                shares = [self._share(phase) for phase in self._phases if self._root(phase)]
                self.fraction = max([self.fraction, *shares])
        return not self.cancelled

    def finish(self, name: str) -> None:
        with self._lock:
            ended = self._phases.pop(name, None)
            if ended and ended.parent:
                self.phase = ended.parent

    def _root(self, name: str) -> bool:
        return self._phases[name].parent is None

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        below = sum(self._share(child) for child, p in self._phases.items() if p.parent == name)
        return min((phase.done + below) / phase.steps, 1.0)
