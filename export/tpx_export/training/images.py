"""A folder of pictures -> examples to train on: each picture's file, and its caption or class.

| layout | told |
|---|---|
| metadata.jsonl: {"file_name": ..., "text": ...} on each line | captions (Hugging Face's imagefolder) |
| metadata.jsonl: {"file_name": ..., "class_id": ...} | classes |
| NAME.png beside NAME.txt, at any depth | captions |
| one folder for each class, named by number, or as many as there are classes, in the order of their names | classes |
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpx_runtime.errors import BadInput, shorten

METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Example:
    """A picture and what it shows: a caption, where "" is none, or the number of a class."""

    path: Path
    told: str | int


def read_folder(folder: Path, classes: int = 0) -> list[Example]:
    """The examples in `folder`, in a fixed order; of captions, or of classes 0 .. classes - 1 if any.

    Pictures are not opened. Raises BadInput for a folder that has none of the layouts above.
    """
    if not folder.is_dir():
        raise BadInput(f"expected a folder of pictures, found none at {folder}; check the path")
    if (folder / METADATA).exists():
        found = _from_metadata(folder / METADATA, classes)
    else:
        found = _from_class_folders(folder, classes) if classes else _from_text_files(folder)
    if not found:
        layouts = "one folder of pictures a class" if classes else "pictures beside .txt files"
        raise BadInput(
            f"expected {layouts}, or {METADATA}, in {folder}, found no pictures; see docs/training.md"
        )
    return found


def _pictures(folder: Path) -> list[Path]:
    """All pictures, at any depth, except hidden ones, sorted by their path as text."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = ((path.relative_to(folder).as_posix(), path) for path in found)
    return [path for name, path in sorted(names) if not any(part[0] == "." for part in name.split("/"))]


def _from_text_files(folder: Path) -> list[Example]:
    examples = []
    for path in _pictures(folder):
        text = path.with_suffix(".txt")
        try:
            examples.append(Example(path, " ".join(text.read_text(encoding="utf-8-sig").split())))
        except FileNotFoundError:
            raise BadInput(
                f"expected a caption of {path} in {text.name}, found no such file; write one, empty for no caption"
            ) from None
        except (OSError, UnicodeDecodeError):
            raise BadInput(
                f"expected a caption in UTF-8 in {text}, found something else; write it anew"
            ) from None
    return examples


def _from_class_folders(folder: Path, classes: int) -> list[Example]:
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if all(path.name.isascii() and path.name.isdecimal() for path in folders):
        numbers = [int(path.name) for path in folders]
        if odd := [number for number in numbers if number >= classes]:
            raise BadInput(
                f"expected folders of classes 0..{classes - 1} in {folder}, found {odd[0]}; the base has no such class"
            )
    elif len(folders) == classes:
        numbers = list(range(classes))
    else:
        raise BadInput(
            f"expected a folder for each of the base's {classes} classes in {folder}, or folders named by number, found "
            f"{len(folders)} with names such as {shorten(folders[0].name)}; rename them to their classes' numbers"
        )
    return [
        Example(path, number)
        for number, inside in zip(numbers, folders, strict=True)
        for path in _pictures(inside)
    ]


def _from_metadata(path: Path, classes: int) -> list[Example]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        raise BadInput(
            f"expected JSON lines in UTF-8 in {path}, found something else; write it anew"
        ) from None
    return [
        _example(path, number, line, classes) for number, line in enumerate(lines, start=1) if line.strip()
    ]


def _example(path: Path, number: int, line: str, classes: int) -> Example:
    field, kind = ("class_id", int) if classes else ("text", str)
    try:
        facts: Any = json.loads(line)
    except (ValueError, RecursionError):
        facts = None
    name = facts.get("file_name") if isinstance(facts, dict) else None
    if not isinstance(name, str) or type(facts.get(field)) is not kind:
        raise BadInput(
            f"expected file_name and {field} in line {number} of {path}, found {shorten(line)}; write it anew"
        )
    told: str | int = facts[field]
    if isinstance(told, int) and not 0 <= told < classes:
        raise BadInput(f"expected class_id in 0..{classes - 1} in line {number} of {path}, found {told}")
    # The name alone, since a file in Hugging Face's cache is a symbolic link out of its folder.
    written, picture = Path(name), path.parent / name
    if "\0" in name or written.anchor or ".." in written.parts or not picture.is_file():
        raise BadInput(
            f"expected a picture in {path.parent} in line {number} of {path}, found no {shorten(name)}; check its name"
        )
    return Example(picture, " ".join(told.split()) if isinstance(told, str) else told)
