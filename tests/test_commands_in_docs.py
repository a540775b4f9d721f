"""Every command that a page shows exists, with its options: parsed as a shell and the command would, and not run."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from tpx_runtime.images import save_png

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "samples/README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
OURS = re.compile(r"(tpx-|python -m (samples|benchmarks)\.|python benchmarks/)")


def commands(page: str) -> list[str]:
    """Lines of code blocks, indented or fenced, that begin with a command of ours, those that go on joined; and what stands
    in a sentence as `python ...`. (A `tpx-run --depth 2` in a sentence leaves things out.)"""
    page = page.replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += re.findall(r"^    (\S.*)", page, re.MULTILINE)
    lines += re.findall(r"`(python [^`]*)`", page)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if OURS.match(part)]


def words(command: str) -> list[str]:
    """As a shell splits them, without comments; [what can be left out] is taken along."""
    return shlex.split(command.replace("[", "").replace("]", ""), comments=True)


def called(told: list[str]) -> tuple[Any, list[str]]:
    """The function behind a command, and its arguments."""
    program, *arguments = told
    if program in SCRIPTS:
        module, _, name = SCRIPTS[program].partition(":")
        return getattr(importlib.import_module(module), name), arguments
    assert program == "python", f"no such command: {program}"
    if arguments[0] == "-m":
        arguments = arguments[1:]
    module = arguments[0].removesuffix(".py").replace("/", ".")
    return importlib.import_module(module).main, arguments[1:]


def parse(command: Any, arguments: list[str]) -> None:
    """Raises ClickException for what the command does not take."""
    if not isinstance(command, click.Command):
        assert not arguments, f"takes no arguments: {arguments}"
        return
    if isinstance(command, click.Group):
        inner = command.commands[arguments[0]]
        parse(inner, arguments[1:])
        return
    command.make_context(command.name, list(arguments))


SHOWN = [
    (page.relative_to(ROOT).as_posix(), one) for page in PAGES for one in commands(page.read_text("utf-8"))
]


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_a_command_that_is_shown_exists(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "DATA").mkdir()  # this and the picture are read while arguments are parsed
    picture = Image.new("RGB", (8, 8))
    picture.info["tpx"] = "{}"
    save_png(picture, tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    parse(*called(words(command)))


def test_commands_are_found_in_both_kinds_of_blocks_whole() -> None:
    page = (
        "Say `tpx-run x`, `python -m samples.demo`:\n\n    tpx-run 'a b' \\\n        --seed 7  # one\n    ls\n\n"
        "```\ntpx-export --ckpt x && tpx-run\n```\n"
    )
    assert [words(one) for one in commands(page)] == [
        ["tpx-export", "--ckpt", "x"],
        ["tpx-run"],
        ["tpx-run", "a b", "--seed", "7"],
        ["python", "-m", "samples.demo"],
    ]
    pages = {page for page, _ in SHOWN}
    assert {"README.md", "samples/README.md", "docs/replication.md", "docs/training.md"} <= pages
    assert len(SHOWN) > 40


@pytest.mark.parametrize(
    "wrong",
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
def test_a_wrong_command_is_found(wrong: str) -> None:
    with pytest.raises((click.ClickException, AssertionError)):
        parse(*called(words(wrong)))
