"""The prompt formats and image layouts of the two benchmarks.

GenEval (github.com/djghosh13/geneval, evaluation/evaluate_images.py) reads metadata.jsonl and the images in `samples` of
every folder whose name is all digits. DPG-Bench (github.com/TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py) treats
every file in one folder as an image, and its name up to the first dot as the item id.
"""

import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, shorten
from ..records import write_atomic
from ..settings import Settings

_ITEM_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")  # no dot, where DPG's evaluator truncates the id


@dataclass(frozen=True)
class Item:
    """A prompt, the name of its folder or file, and its line in the prompt file (GenEval only)."""

    name: str
    prompt: str
    line: bytes = b""


@dataclass(frozen=True)
class Target:
    """A PNG to write: a single image, or a grid of several."""

    path: Path
    jobs: tuple[Settings, ...]


@dataclass(frozen=True)
class Benchmark:
    """How to read the prompts of a benchmark and lay out its images.

    `read` reads the prompts, `record_path` returns the path of a run's record, which the evaluator must not read, `targets`
    returns the PNGs of an item, `prepare` writes the files beside them, `scored_files` returns every file that the evaluator
    would score. `square` says that it reads square images only.
    """

    name: str
    read: Callable[[Path], list[Item]]
    record_path: Callable[[Path], Path]
    targets: Callable[[Path, Item, Sequence[Settings]], list[Target]]
    prepare: Callable[[Path, Item], None]
    scored_files: Callable[[Path], set[Path]]
    square: bool = False


def read_geneval(path: Path) -> list[Item]:
    """Items of evaluation_metadata.jsonl, numbered from 00000. Raises BadInput."""
    items = []
    for number, (line, facts) in enumerate(_json_lines(path, "GenEval metadata", ("tag", "prompt"))):
        items.append(Item(f"{number:05d}", facts["prompt"], line))
    return items


def read_dpg(path: Path) -> list[Item]:
    """Items of dpg_prompts.jsonl or of a folder of `<item_id>.txt`, with unchanged prompts. Raises BadInput."""
    if os.path.isdir(path):  # unlike Path.is_dir, does not raise for names that are too long
        files = sorted(path.glob("*.txt"))
        items = [Item(file.stem, _text(_content(file, "a prompt"), str(file))) for file in files]
        if not items:
            raise BadInput(f"expected files <item_id>.txt in {path}, found none; name DPG-Bench's prompts")
    else:
        lines = _json_lines(path, "DPG-Bench prompts", ("item_id", "prompt"))
        items = [Item(facts["item_id"], facts["prompt"]) for _, facts in lines]
    names: set[str] = set()
    for item in items:
        if not _ITEM_ID.fullmatch(item.name):
            raise BadInput(
                f"expected item ids of letters, digits, _ and -, because they become file names, found {shorten(item.name)} "
                f"in {path}; rename it"
            )
        if item.name.lower() in names:  # some file systems ignore case
            raise BadInput(f"expected unique item ids, found {item.name} twice in {path}; rename one")
        names.add(item.name.lower())
    return items


def _json_lines(path: Path, what: str, keys: Sequence[str]) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line without its line break, and its JSON object, in which `keys` are strings. Raises BadInput."""
    lines = [line for line in _content(path, what).splitlines() if line.strip()]
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            facts = json.loads(_text(line, str(path)))
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict) or not all(isinstance(facts.get(key), str) for key in keys):
            raise BadInput(
                f"expected {what} in {path}, one JSON object with {' and '.join(keys)} per line, found "
                f"{shorten(line.decode(errors='replace'))} as number {number}; name that file"
            )
        found.append((line, facts))
    if not found:
        raise BadInput(f"expected {what} in {path}, found no lines; name that file")
    return found


def _content(path: Path, what: str) -> bytes:
    """The bytes of a file without a byte-order mark. Raises BadInput, whose message says `what` was expected in it."""
    try:
        return path.read_bytes().removeprefix(BOM_UTF8)
    except OSError as error:
        raise BadInput(f"expected {what} in {path}, found: {error.strerror}; name that file") from None


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"expected {where} to be UTF-8 text, found other bytes; convert it") from None


def _geneval_targets(out: Path, item: Item, jobs: Sequence[Settings]) -> list[Target]:
    samples = out / item.name / "samples"
    return [Target(samples / f"{number:04d}.png", (job,)) for number, job in enumerate(jobs)]


def _geneval_prepare(out: Path, item: Item) -> None:
    (out / item.name / "samples").mkdir(parents=True, exist_ok=True)
    metadata = out / item.name / "metadata.jsonl"
    if not metadata.is_file() or metadata.read_bytes() != item.line:
        write_atomic(metadata, item.line)


def _geneval_scored_files(out: Path) -> set[Path]:
    found = out.glob("*/samples/*.png*")
    return {path for path in found if path.parts[-3].isdigit() and re.match(r"\d+\.png", path.name)}


def _dpg_record_path(out: Path) -> Path:
    resolved = out.resolve()  # "." has no name
    # Not inside `out`, where every file is scored.
    return resolved.parent / f"{resolved.name}.tpx-eval.json"


GENEVAL = Benchmark(
    name="geneval",
    read=read_geneval,
    record_path=lambda out: out / "tpx-eval.json",
    targets=_geneval_targets,
    prepare=_geneval_prepare,
    scored_files=_geneval_scored_files,
)
DPG = Benchmark(
    name="dpg",
    read=read_dpg,
    record_path=_dpg_record_path,
    targets=lambda out, item, jobs: [Target(out / f"{item.name}.png", tuple(jobs))],
    prepare=lambda out, item: None,
    scored_files=lambda out: set(out.iterdir()) if out.is_dir() else set(),
    square=True,
)
