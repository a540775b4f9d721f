"""Shared behaviour of all commands: user errors and Ctrl-C end in one line on stderr and an exit code."""

import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from . import __version__
from .errors import BadInput, Cancelled, EngineFailed, EngineUnavailable, TpxError, as_line
from .files import is_full
from .interrupts import termination_as_interrupt

_CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}


class OneLineError(click.ClickException):
    """An error that click prints as one line before it exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(as_line(message))
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=file is None)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Convert click's usage errors, which it prints on several lines, and those of disks and paths to OneLineError."""
    try:
        yield
    except click.UsageError as error:
        # A group called without a command shows its help, which is not an error; click 8.1 does not have this class.
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        message = " ".join(error.format_message().split()).rstrip(".")
        where = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        raise OneLineError(f"{message}{where}", BadInput.exit_code) from None
    except OSError as error:
        if not (reason := _user_message(error)):
            raise
        raise OneLineError(reason, BadInput.exit_code) from None


def _user_message(error: OSError) -> str | None:
    """What to tell the user about a full disk or an unusable path; None for an error that may be a fault of ours."""
    if is_full(error):
        return f"expected room for {error.filename or 'the output'}, found: {error.strerror}; free some space"
    if error.errno in (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM) and error.filename:
        return f"expected a usable path {error.filename}, found: {error.strerror}; choose another"
    # Of Python's tempfile, which torch calls when it is imported.
    if (error.strerror or "").startswith("No usable temporary directory"):
        return f"expected a folder for temporary files, found: {error.strerror}; free some space or set TMPDIR to another"
    return None


def make_streams_safe() -> None:
    """Redirect closed standard streams to the null device; escape characters that a stream's encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def skip_model_converter() -> None:
    """Leave OpenVINO's model converter out of its import, of which it takes a third; no command converts with it."""
    sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]


@contextmanager
def warnings_as_notices() -> Iterator[None]:
    """On exit, print each warning that was raised inside, such as a truncated prompt, as one `notice:` line on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except BadInput:  # nothing was done that the warnings are of
            caught.clear()
            raise
        finally:
            for line in dict.fromkeys(as_line(str(warning.message)) for warning in caught):
                click.echo(f"notice: {line}", err=True)


def _print_version(ctx: click.Context, _: click.Parameter, requested: bool) -> None:
    if requested and not ctx.resilient_parsing:
        click.echo(f"tpx {__version__}")
        ctx.exit()


def _version() -> click.Option:
    return click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_version,
        help="Show the version and exit.",
    )


class TpxCommand(click.Command):
    """A command that reports errors and Ctrl-C as one line on stderr and exits with the error's code.

    `extra` is the pip extra with the packages that it imports, named where one is missing.
    """

    def __init__(self, *args: Any, extra: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{"context_settings": _CONTEXT_SETTINGS, **kwargs})
        self.params.append(_version())
        self._extra = extra

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # On Windows, click would replace "?", "*" and "%NAME%" in prompts.
        return super().main(*args, **{"windows_expand_args": False, **kwargs})

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        # Of Pillow, for large photographs, which are fine.
        warnings.filterwarnings("ignore", ".*decompression bomb", RuntimeWarning)
        with one_line_errors():
            try:
                return super().make_context(*args, **kwargs)
            except TpxError as error:  # from the callback of an eager option
                raise OneLineError(str(error), error.exit_code) from None

    def invoke(self, ctx: click.Context) -> Any:
        make_streams_safe()
        skip_model_converter()
        try:
            with one_line_errors(), termination_as_interrupt():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            error: TpxError = Cancelled("cancelled")
        except TpxError as caught:
            error = caught
        except MemoryError as caught:
            reason = f" ({caught})" if str(caught) else ""
            error = EngineFailed(
                f"expected enough memory, found too little{reason}; take smaller batches or images"
            )
        except ModuleNotFoundError as missing:
            if not self._extra or not missing.name or missing.name.startswith("tpx_"):
                raise
            error = EngineUnavailable(
                f"expected the package {missing.name} for {ctx.info_name}, found none; "
                f"install it with `pip install 'tpx[{self._extra}]'`"
            )
        raise OneLineError(str(error), error.exit_code)


class TpxGroup(click.Group):
    """A group of `TpxCommand`s."""

    command_class = TpxCommand

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"context_settings": _CONTEXT_SETTINGS, **kwargs})
        self.params.append(_version())

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def resolve_command(self, *args: Any, **kwargs: Any) -> Any:
        with one_line_errors():
            return super().resolve_command(*args, **kwargs)
