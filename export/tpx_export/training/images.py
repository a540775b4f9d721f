"""Reads a folder of training images: the path of each image, and its caption or class.

| layout | condition |
|---|---|
| metadata.jsonl: {"file_name": ..., "text": ...} on each line | captions (Hugging Face's imagefolder) |
| metadata.jsonl: {"file_name": ..., "class_id": ...} | classes |
| NAME.png next to NAME.txt, at any depth | captions |
| one folder per class, named by its number, or as many folders as classes, in the order of their names | classes |
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpx_runtime.errors import BadInput, shorten
from tpx_runtime.tokenizer.encoding import reject_surrogates

METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Example:
    """An image and its condition: a caption, "" for none, or a class id."""

    path: Path
    condition: str | int


def read_folder(folder: Path, classes: int = 0) -> list[Example]:
    """The examples in `folder` in a deterministic order: with classes 0 .. classes - 1, or with captions if `classes` is 0.

    Images are not opened. Raises BadInput for a folder with none of the layouts above.
    """
    if not folder.is_dir():
        raise BadInput(f"expected a folder of images, found none at {folder}; check the path")
    if (folder / METADATA).exists():
        found = _from_metadata(folder / METADATA, classes)
    else:
        found = _from_class_folders(folder, classes) if classes else _from_text_files(folder)
    if not found:
        layouts = "one folder of images per class" if classes else "images next to .txt files"
        raise BadInput(
            f"expected {layouts}, or {METADATA}, in {folder}, found no images; see docs/training.md"
        )
    return found


def _image_paths(folder: Path) -> list[Path]:
    """All images at any depth, except hidden ones, sorted by their relative path."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = ((path.relative_to(folder).as_posix(), path) for path in found)
    return [path for name, path in sorted(names) if not any(part[0] == "." for part in name.split("/"))]


def _from_text_files(folder: Path) -> list[Example]:
    examples = []
    for path in _image_paths(folder):
        text = path.with_suffix(".txt")
        try:
            examples.append(Example(path, " ".join(text.read_text(encoding="utf-8-sig").split())))
        except FileNotFoundError:
            raise BadInput(
                f"expected a caption of {path} in {text.name}, found no such file; create it, empty for no caption"
            ) from None
        except (OSError, UnicodeDecodeError):
            raise BadInput(
                f"expected a caption in UTF-8 in {text}, found something else; write it again"
            ) from None
    return examples


def _from_class_folders(folder: Path, classes: int) -> list[Example]:
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if all(path.name.isascii() and path.name.isdecimal() for path in folders):
        numbers = [int(path.name) for path in folders]
        if too_large := [number for number in numbers if number >= classes]:
            raise BadInput(
                f"expected folders of classes 0..{classes - 1} in {folder}, found {too_large[0]}; rename it to a class of "
                "the base"
            )
        if len(set(numbers)) < len(numbers):
            twice = next(path.name for path in folders if numbers.count(int(path.name)) > 1)
            raise BadInput(
                f"expected one folder for each class in {folder}, found several for class {int(twice)}, such as {twice}; "
                "merge them"
            )
    elif len(folders) == classes:
        numbers = list(range(classes))
    else:
        raise BadInput(
            f"expected a folder for each of the base's {classes} classes in {folder}, or folders named by numbers, found "
            f"{len(folders)} with names such as {shorten(folders[0].name)}; rename them to their classes' numbers"
        )
    return [
        Example(path, number)
        for number, class_folder in zip(numbers, folders, strict=True)
        for path in _image_paths(class_folder)
    ]


def _from_metadata(path: Path, classes: int) -> list[Example]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        raise BadInput(
            f"expected JSON lines in UTF-8 in {path}, found something else; write it again"
        ) from None
    return [
        _example(path, number, line, classes) for number, line in enumerate(lines, start=1) if line.strip()
    ]


def _example(path: Path, number: int, line: str, classes: int) -> Example:
    field, kind = ("class_id", int) if classes else ("text", str)
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or type(entry.get(field)) is not kind:
        raise BadInput(
            f"expected file_name and {field} in line {number} of {path}, found {shorten(line)}; correct it"
        )
    condition: str | int = entry[field]
    if isinstance(condition, str):
        try:
            reject_surrogates(condition)
        except BadInput as error:
            raise BadInput(f"{path}, line {number}: {error}") from None
    if isinstance(condition, int) and not 0 <= condition < classes:
        raise BadInput(f"expected class_id in 0..{classes - 1} in line {number} of {path}, found {condition}")
    # The name is checked and not the resolved path: a file in Hugging Face's cache is a symbolic link out of its folder.
    relative, image = Path(name), path.parent / name
    # os.path.isfile is also False for a name that cannot be a file's, for which Path.is_file raises an error.
    if relative.anchor or ".." in relative.parts or not os.path.isfile(image):
        raise BadInput(
            f"expected an image in {path.parent} in line {number} of {path}, found no {shorten(name)}; check its name"
        )
    return Example(image, " ".join(condition.split()) if isinstance(condition, str) else condition)
