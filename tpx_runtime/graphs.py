"""Graphs of one engine, opened on first use and then cached or released."""

from pathlib import Path

from .engine import GraphEngine, Session


class Graphs:
    """Opens graphs. With `keep`, sessions are cached; without, a session lives only as long as its caller holds it."""

    def __init__(self, engine: GraphEngine, keep: bool = True) -> None:
        self.engine, self._keep = engine, keep
        self._cached: dict[Path, Session] = {}

    def open(self, path: Path) -> Session:
        """The graph at `path`. Raises EngineUnavailable or EngineFailed."""
        session = self._cached.get(path) or self.engine.open(path)
        if self._keep:
            self._cached[path] = session
        return session

    def release(self) -> None:
        """Drop the cached sessions; a session frees its memory once its last user has finished."""
        self._cached.clear()
