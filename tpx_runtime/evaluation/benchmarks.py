"""The two benchmarks' own layouts: which prompts there are, and which file shows which pictures.

GenEval (github.com/djghosh13/geneval, evaluation/evaluate_images.py) looks into every folder whose name is all digits, reads
its metadata.jsonl and each picture of its `samples`. DPG-Bench (github.com/TencentQQGYLab/ELLA,
dpg_bench/compute_dpg_bench.py) takes everything in one folder for a picture, and its name up to the first dot for the id.
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
from ..records import write_whole
from ..settings import Settings

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")  # no dot: DPG's evaluator cuts the id there


@dataclass(frozen=True)
class Item:
    """One prompt, the name of its folder or file, and the line that asked for it (GenEval alone)."""

    name: str
    prompt: str
    line: bytes = b""


@dataclass(frozen=True)
class Target:
    """One PNG to write: a single picture, or a grid of several."""

    path: Path
    jobs: tuple[Settings, ...]


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark wants its prompts read and its pictures laid out.

    `read`: the prompts. `record`: where a run's settings go, out of the evaluator's way. `targets`: the PNGs of one item.
    `prepare`: what lies beside its pictures. `seen`: every picture that the evaluator would score.
    """

    name: str
    read: Callable[[Path], list[Item]]
    record: Callable[[Path], Path]
    targets: Callable[[Path, Item, Sequence[Settings]], list[Target]]
    prepare: Callable[[Path, Item], None]
    seen: Callable[[Path], set[Path]]


def read_geneval(path: Path) -> list[Item]:
    """Items of evaluation_metadata.jsonl, numbered from 00000. Raises BadInput."""
    items = []
    for number, (line, facts) in enumerate(_json_lines(path, "GenEval metadata", ("tag", "prompt"))):
        items.append(Item(f"{number:05d}", facts["prompt"], line))
    return items


def read_dpg(path: Path) -> list[Item]:
    """Items of dpg_prompts.jsonl, or of a folder of `<item_id>.txt`; prompts as they are. Raises BadInput."""
    if os.path.isdir(path):  # for a name of any length, unlike Path.is_dir
        files = sorted(path.glob("*.txt"))
        items = [Item(file.stem, _text(_content(file), str(file))) for file in files]
        if not items:
            raise BadInput(f"expected files <item_id>.txt in {path}, found none; name DPG-Bench's prompts")
    else:
        found = _json_lines(path, "DPG-Bench prompts", ("item_id", "prompt"))
        items = [Item(facts["item_id"], facts["prompt"]) for _, facts in found]
    names: set[str] = set()
    for item in items:
        if not _SAFE.fullmatch(item.name):
            raise BadInput(
                f"expected item ids of letters, digits, _ and -, for they name files, found {shorten(item.name)} in "
                f"{path}; rename it"
            )
        if item.name.lower() in names:  # some file systems take Aa and aa for one
            raise BadInput(f"expected every item id once, found {item.name} twice in {path}; rename one")
        names.add(item.name.lower())
    return items


def _json_lines(path: Path, what: str, keys: Sequence[str]) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line, without its end, and the object it holds, in which `keys` are text. Raises BadInput."""
    try:
        lines = [line for line in _content(path).splitlines() if line.strip()]
    except OSError as error:
        raise BadInput(f"expected {what} in {path}, found: {error.strerror}; name that file") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            facts = json.loads(_text(line, str(path)))
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict) or not all(isinstance(facts.get(key), str) for key in keys):
            raise BadInput(
                f"expected {what} in {path}, a JSON object with {' and '.join(keys)} a line, found "
                f"{shorten(line.decode(errors='replace'))} as number {number}; name that file"
            )
        found.append((line, facts))
    if not found:
        raise BadInput(f"expected {what} in {path}, found no line; name that file")
    return found


def _content(path: Path) -> bytes:
    """Without the mark that some editors begin a file with. Raises OSError."""
    return path.read_bytes().removeprefix(BOM_UTF8)


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
        write_whole(metadata, item.line)


def _geneval_seen(out: Path) -> set[Path]:
    found = out.glob("*/samples/*.png*")
    return {path for path in found if path.parts[-3].isdigit() and re.match(r"\d+\.png", path.name)}


def _beside(out: Path) -> Path:
    whole = out.resolve()  # of "." too
    return whole.parent / f"{whole.name}.tpx-eval.json"  # not within, where every file is scored


GENEVAL = Benchmark(
    name="geneval",
    read=read_geneval,
    record=lambda out: out / "tpx-eval.json",
    targets=_geneval_targets,
    prepare=_geneval_prepare,
    seen=_geneval_seen,
)
DPG = Benchmark(
    name="dpg",
    read=read_dpg,
    record=_beside,
    targets=lambda out, item, jobs: [Target(out / f"{item.name}.png", tuple(jobs))],
    prepare=lambda out, item: None,
    seen=lambda out: set(out.iterdir()) if out.is_dir() else set(),
)
