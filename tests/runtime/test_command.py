"""What every command does with errors of the operating system."""

import errno
import os
import re
import tempfile
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tpx_runtime.command import TpxCommand, warnings_as_notices
from tpx_runtime.errors import BadInput

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_reports_usage_errors_in_one_line(path: Path) -> None:
    """Read rather than run: most benchmarks need a GPU or more packages."""
    commands = re.findall(r"^@click\.command\((.*)\)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(arguments.startswith("cls=TpxCommand") for arguments in commands)


def run_raising(error: Exception) -> Result:
    @click.command(cls=TpxCommand)
    def command() -> None:
        raise error

    return CliRunner().invoke(command)


@pytest.mark.parametrize(
    ("code", "path", "message"),
    [
        (errno.ENOSPC, "x.png", "expected room for x.png, found: {reason}; free some space"),
        (errno.EDQUOT, None, "expected room for the output, found: {reason}; free some space"),
        (errno.ENAMETOOLONG, "x" * 300, "expected a usable path {path}, found: {reason}; choose another"),
        (errno.EACCES, "in\nside", "expected a usable path in side, found: {reason}; choose another"),
        (errno.EPERM, "x", "expected a usable path x, found: {reason}; choose another"),
    ],
)
def test_a_full_disk_and_an_unusable_path_are_one_line(code: int, path: str | None, message: str) -> None:
    reason = os.strerror(code)
    result = run_raising(OSError(code, reason, path))
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == f"error: {message.format(path=path, reason=reason)}\n"


def test_a_disk_without_room_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(FileNotFoundError) as caught:
            tempfile.gettempdir()
    result = run_raising(caught.value)
    assert result.exit_code == 2 and re.fullmatch(
        r"error: expected a folder for temporary files, found: No usable temporary directory found in \[.*\]; "
        "free some space or set TMPDIR to another\n",
        result.stderr,
    )


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x", "a"), OSError(errno.EPERM, "x")])
def test_other_errors_of_the_operating_system_are_not_hidden(error: OSError) -> None:
    assert run_raising(error).exception is error


def test_prompts_are_not_expanded_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(click.Command, "main", lambda self, *_, **options: seen.append(options))
    TpxCommand("draw").main(["a cat?"])
    TpxCommand("draw").main(["a cat?"], windows_expand_args=True)
    assert seen == [{"windows_expand_args": False}, {"windows_expand_args": True}]


def test_too_little_memory_is_one_line() -> None:
    for error, reason in ((MemoryError(), ""), (MemoryError("2 TiB"), " (2 TiB)")):
        result = run_raising(error)
        assert result.exit_code == 5
        expected = (
            f"error: expected enough memory, found too little{reason}; take smaller batches or images\n"
        )
        assert result.stderr == expected


def test_control_characters_are_not_sent_to_the_terminal() -> None:
    @click.command(cls=TpxCommand)
    def command() -> None:
        with warnings_as_notices():
            warnings.warn("a\x1b[2J \u4e2d", stacklevel=2)
        raise BadInput("b\x9b\x07 \ud800 é")

    assert CliRunner().invoke(command).stderr == ("notice: a\\x1b[2J \u4e2d\nerror: b\\x9b\\x07 \\ud800 é\n")
