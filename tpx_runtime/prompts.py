"""Prompts from a file, one a line."""

import sys
from pathlib import Path

from .errors import BadInput

STANDARD_INPUT = Path("-")


def prompts_in(file: Path) -> dict[int, str]:
    """A file's lines that are not blank, by number from 1; `-` is standard input. Raises BadInput if there are none.

    They are not checked against a model.
    """
    try:
        content = file.read_bytes() if file != STANDARD_INPUT else _standard_input()
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise BadInput(
            f"expected a file of prompts, one a line, at {file}, found: {error.strerror}"
        ) from None
    except UnicodeDecodeError:
        raise BadInput(f"expected UTF-8 text in {file}, found other bytes; save it as UTF-8") from None
    found = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    if not found:
        raise BadInput(f"expected prompts in {file}, one a line, found none; write some")
    return found


def _standard_input() -> bytes:
    """All of it; nothing where it is closed."""
    return sys.stdin.buffer.read() if sys.stdin else b""
