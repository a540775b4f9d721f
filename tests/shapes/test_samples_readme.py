"""samples/README.md agrees with the code and the recorded results."""

import json
import re
from pathlib import Path

import samples.shapes.world as world
from samples.shapes.parser import RECORD

PAGE = (Path(__file__).parents[2] / "samples" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (python -m .*)$", PAGE, re.MULTILINE)


def test_lists_the_held_out_combinations() -> None:
    def sort_key(entry: tuple[str, str, str]) -> tuple[int, str, str]:
        return world.RELATIONS.index(entry[2]), *entry[:2]

    rows = [
        f"| {colour} {shape} | {relation} |"
        for colour, shape, relation in sorted(world.HELD_OUT, key=sort_key)
    ]
    table_head = "| object | is never seen … another object |\n| --- | --- |\n"
    assert table_head + "\n".join(rows) + "\n\n" in PAGE


def test_names_every_shape_colour_and_relation() -> None:
    introduction = " ".join(PAGE.partition("\n## ")[0].split())
    for name in (*world.SHAPES, *world.COLOURS, *world.RELATIONS):
        assert name in introduction, name


def test_gives_the_recorded_accuracy_of_the_parser() -> None:
    record = json.loads(RECORD.read_text())
    assert f"| on {record['fresh renders']} fresh renders | |\n" in PAGE
    parts = re.findall(r"^\| .* \| (\d+\.\d+%) \|$", PAGE, re.MULTILINE)
    assert parts == [f"{record[name]:.2%}" for name in ("same objects", "satisfied", "refused")]
    assert record["command"] in COMMANDS


def test_gives_the_commands_to_train_and_to_score() -> None:
    modules = ["samples.shapes." + name for name in ("train", "train_parser", "score", "evaluate", "sweep")]
    assert [command.split()[2] for command in COMMANDS] == modules


def test_all_files_that_it_names_exist() -> None:
    file_names = re.findall(r"`(shapes/[\w.]+)`", PAGE)
    assert len(file_names) > 3
    assert all((RECORD.parents[1] / name).is_file() for name in file_names)
