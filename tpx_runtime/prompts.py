"""Reads prompts from a file, one per line."""

import sys
from pathlib import Path

from .errors import BadInput

STANDARD_INPUT = Path("-")


def read_prompt_lines(file: Path) -> dict[int, str]:
    """The non-blank lines of a file by line number, from 1; `-` is standard input. Raises BadInput if there are none.

    The prompts are not checked against a model.
    """
    try:
        content = file.read_bytes() if file != STANDARD_INPUT else _standard_input()
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise BadInput(
            f"expected a file of prompts, one per line, at {file}, found: {error.strerror}"
        ) from None
    except UnicodeDecodeError:
        raise BadInput(f"expected UTF-8 text in {file}, found other bytes; save it as UTF-8") from None
    found = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    if not found:
        raise BadInput(f"expected prompts in {file}, one per line, found none; write some")
    return found


def _standard_input() -> bytes:
    """All of standard input; empty if it is closed."""
    return sys.stdin.buffer.read() if sys.stdin else b""
