"""Every command shown in the documentation exists and accepts its options. Commands are parsed, but not run."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from tpx_runtime.image_files import save_image

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "samples/README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
TPX_COMMAND = re.compile(r"(tpx-|python -m (samples|benchmarks)\.|python benchmarks/)")


def commands(page: str) -> list[str]:
    """This project's commands in a page: lines of indented or fenced code blocks, with continuation lines joined, and
    inline `python ...`. An inline `tpx-run --depth 2` is skipped, because it may leave out required arguments."""
    page = page.replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += re.findall(r"^    (\S.*)", page, re.MULTILINE)
    lines += re.findall(r"`(python [^`]*)`", page)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if TPX_COMMAND.match(part)]


def split_command(command: str) -> list[str]:
    """Split as a shell does, without comments. Optional parts in [brackets] are included."""
    return shlex.split(command.replace("[", "").replace("]", ""), comments=True)


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The function behind a command, and its arguments."""
    program, *arguments = words
    if program in SCRIPTS:
        module, _, name = SCRIPTS[program].partition(":")
        return getattr(importlib.import_module(module), name), arguments
    assert program == "python", f"no such command: {program}"
    if arguments[0] == "-m":
        arguments = arguments[1:]
    module = arguments[0].removesuffix(".py").replace("/", ".")
    return importlib.import_module(module).main, arguments[1:]


def parse(command: Any, arguments: list[str]) -> None:
    """Raise ClickException if the command does not accept the arguments."""
    if not isinstance(command, click.Command):
        assert not arguments, f"takes no arguments: {arguments}"
        return
    if isinstance(command, click.Group):
        subcommand = command.commands[arguments[0]]
        parse(subcommand, arguments[1:])
        return
    command.make_context(command.name, list(arguments))


SHOWN_COMMANDS = [
    (page.relative_to(ROOT).as_posix(), command)
    for page in PAGES
    for command in commands(page.read_text("utf-8"))
]


@pytest.mark.parametrize(("page", "command"), SHOWN_COMMANDS)
def test_a_documented_command_exists_and_accepts_its_options(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parsing the arguments checks for this folder and reads the image.
    (tmp_path / "DATA").mkdir()
    image = Image.new("RGB", (8, 8))
    image.info["tpx"] = "{}"
    save_image(image, tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    parse(*find_command(split_command(command)))


def test_commands_are_found_in_indented_fenced_and_inline_code() -> None:
    page = (
        "Say `tpx-run x`, `python -m samples.demo`:\n\n    tpx-run 'a b' \\\n        --seed 7  # one\n    ls\n\n"
        "```\ntpx-export --ckpt x && tpx-run\n```\n"
    )
    assert [split_command(command) for command in commands(page)] == [
        ["tpx-export", "--ckpt", "x"],
        ["tpx-run"],
        ["tpx-run", "a b", "--seed", "7"],
        ["python", "-m", "samples.demo"],
    ]
    pages = {page for page, _ in SHOWN_COMMANDS}
    assert {"README.md", "samples/README.md", "docs/replication.md", "docs/training.md"} <= pages
    assert len(SHOWN_COMMANDS) > 40


@pytest.mark.parametrize(
    "command",
    [
        "tpx-draw x",
        "tpx-run x --sed 7",
        "tpx-eval shapes --step 7",
        "tpx-eval compare one",
        "python -m samples.shapes.plot sweep x.json --out y.png",
        "python -m samples.shapes.score --seeds many",
        "python -m benchmarks.parity --more",
    ],
)
def test_an_invalid_command_is_detected(command: str) -> None:
    with pytest.raises((click.ClickException, AssertionError)):
        parse(*find_command(split_command(command)))
