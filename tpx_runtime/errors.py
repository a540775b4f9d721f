"""The errors shown to users. Each message is one line: what was expected, what was found, how to fix it."""

from collections.abc import Sequence
from unicodedata import category


class TpxError(Exception):
    """Base of all errors that TPX raises deliberately; `exit_code` is what the command line returns."""

    exit_code = 1


class BadInput(TpxError):
    """An argument, prompt or output path cannot be used."""

    exit_code = 2


class BundleInvalid(TpxError):
    """A folder is not a bundle, is damaged, or has another format version."""

    exit_code = 3


class EngineUnavailable(TpxError):
    """The requested engine cannot be used on this machine."""

    exit_code = 4


class EngineFailed(TpxError):
    """The engine ran, but rejected a graph or produced something that is not an image."""

    exit_code = 5


class Cancelled(TpxError):
    """The callback returned False, or Ctrl-C was pressed."""

    exit_code = 130


def as_line(text: str) -> str:
    """`text` on one line, with control characters as escapes, so that it cannot change the terminal's state."""
    line = " ".join(text.splitlines())
    return "".join(c.encode("unicode_escape").decode() if category(c) == "Cc" else c for c in line)


def one_line(error: object, limit: int = 300) -> str:
    """The message of another library's error, on one line and of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


def first_few(items: Sequence[str], most: int = 5) -> str:
    """The first items on one line, and how many more there are."""
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def shorten(value: object, limit: int = 40) -> str:
    """`repr(value)` on one line, cut to about `limit` characters, for an error message."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[: limit - 1] + "…")
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
