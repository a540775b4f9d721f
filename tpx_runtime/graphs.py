"""Graphs on one engine: opened on first use, and kept or released after use."""

from pathlib import Path

from .engine import Engine, Session


class Graphs:
    """With `keep=False` a session lives only as long as its caller holds it, and is opened again for the next."""

    def __init__(self, engine: Engine, keep: bool = True) -> None:
        self.engine, self._keep = engine, keep
        self._kept: dict[Path, Session] = {}

    def open(self, path: Path) -> Session:
        """The graph at `path`. Raises EngineUnavailable or EngineFailed."""
        session = self._kept.get(path) or self.engine.open(path)
        if self._keep:
            self._kept[path] = session
        return session
