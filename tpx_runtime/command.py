"""What all commands share: whatever a user did wrong, and Ctrl-C, ends in one line on stderr and an exit code."""

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from . import __version__
from .errors import Cancelled, TpxError
from .interrupts import as_ctrl_c


class ErrorLine(click.ClickException):
    """An error that click prints as one line and exits with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(" ".join(message.splitlines()))  # a path in it may hold line breaks
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=file is None)


@contextmanager
def one_line() -> Iterator[None]:
    """Turn click's usage errors, for which it would print several lines, into ErrorLine."""
    try:
        yield
    except click.UsageError as error:
        # A group without a command is click's help, which is no error; click 8.1 has no such class.
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        said = " ".join(error.format_message().split()).rstrip(".")
        where = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        raise ErrorLine(f"{said}{where}", exit_code=2) from None


def mend_streams() -> None:
    """Let a closed standard stream swallow what is written, and one of another code page take every name."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def noticing() -> Iterator[None]:
    """What is warned of inside, such as a prompt that is cut short, is said in one line each on stderr afterwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for line in dict.fromkeys(" ".join(str(warning.message).splitlines()) for warning in caught):
        click.echo(f"notice: {line}", err=True)


def _say_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        click.echo(f"tpx {__version__}")
        ctx.exit()


def _version() -> click.Option:
    return click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_say_version,
        help="Show the version and exit.",
    )


class TpxCommand(click.Command):
    """A command whose errors, and Ctrl-C, end in one line on stderr and the error's exit code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_version())

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with one_line():
            try:
                return super().make_context(*args, **kwargs)
            except TpxError as error:  # of an option that is read at once
                raise ErrorLine(str(error), error.exit_code) from None

    def invoke(self, ctx: click.Context) -> Any:
        mend_streams()
        try:
            with one_line(), as_ctrl_c():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            error: TpxError = Cancelled("cancelled")
        except TpxError as caught:
            error = caught
        raise ErrorLine(str(error), error.exit_code)


class TpxGroup(click.Group):
    """A group of such commands."""

    command_class = TpxCommand

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_version())

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with one_line():
            return super().make_context(*args, **kwargs)

    def resolve_command(self, *args: Any, **kwargs: Any) -> Any:
        with one_line():
            return super().resolve_command(*args, **kwargs)
