"""The errors a user can meet. Each is one line: what was expected, what was found, how to mend it."""


class TpxError(Exception):
    """Base of every error that TPX raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class BadInput(TpxError):
    """An argument, a prompt or an output path that cannot be used."""

    exit_code = 2


class BundleInvalid(TpxError):
    """A folder that is not a bundle, is damaged, or is of another format version."""

    exit_code = 3


class EngineUnavailable(TpxError):
    """The engine asked for cannot be used on this machine."""

    exit_code = 4


class EngineFailed(TpxError):
    """The engine ran, but refused a graph or produced something that is not a picture."""

    exit_code = 5


class Cancelled(TpxError):
    """The callback returned False, or Ctrl-C was pressed."""

    exit_code = 130


def shorten(value: object, limit: int = 40) -> str:
    """`value` as Python writes it, on one line and cut to about `limit` characters, for an error message."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[: limit - 1] + "…")
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
