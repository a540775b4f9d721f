"""Whether one run of ShapesEval is better than another: both draw the same prompts with the same seeds, so they pair."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput
from ..records import differing
from .statistics import FEWEST, Estimate, bootstrap

IDENTITY = ("list", "images", "seed")  # what two runs must share; all else is what is compared


@dataclass(frozen=True)
class Report:
    """What report.json says: `facts` of the run, and of each prompt its row, its words and the part of right pictures.

    `overall` names the rows whose unweighted mean is the score.
    """

    facts: dict[str, Any]
    overall: tuple[str, ...]
    prompts: tuple[tuple[str, str], ...]
    shares: tuple[float, ...]

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read the file, or report.json in the folder, of a finished run. Raises BadInput."""
        try:
            path = path / "report.json" if path.is_dir() else path
            facts = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"expected a report.json at {path}, found: {error.strerror}; name one") from None
        except (ValueError, RecursionError):
            facts = None
        try:
            listed, overall = facts.pop("prompts"), tuple(facts.pop("overall of"))
            prompts = tuple((str(one["row"]), str(one["prompt"])) for one in listed)
            shares = tuple(sum(map(bool, one["right"])) / len(one["right"]) for one in listed)
            del facts["rows"]
            whole = bool(overall) and set(overall) <= {row for row, _ in prompts}
        except (TypeError, KeyError, AttributeError, ZeroDivisionError):
            whole = False
        if not whole:
            raise BadInput(
                f"expected a report of `tpx-eval shapes` in {path}, found something else; run that again"
            )
        return cls(facts, overall, prompts, shares)


@dataclass(frozen=True)
class Difference:
    """One line of the comparison: the scores of both runs, and second minus first with its interval."""

    name: str
    prompts: int
    first: float
    second: float
    change: Estimate


def compare(first: Report, second: Report) -> list[Difference]:
    """Each row, with "overall" behind the rows that it averages. Raises BadInput for runs that do not pair."""
    for key in IDENTITY:
        if first.facts.get(key) != second.facts.get(key):
            found = f"{first.facts.get(key)} and {second.facts.get(key)}"
            raise BadInput(f"expected runs of one {key}, found {found}; run one of them again")
    if first.prompts != second.prompts or first.overall != second.overall:
        found = f"{len(first.prompts)} and {len(second.prompts)} that are not alike"
        raise BadInput(f"expected runs of the same prompts, found {found}; run both with one --limit")
    shares: dict[str, list[tuple[float, float]]] = {}
    for (row, _), *pair in zip(first.prompts, first.shares, second.shares, strict=True):
        shares.setdefault(row, []).append((pair[0], pair[1]))
    others = [row for row in shares if row not in first.overall]
    lines = {row: [row] for row in first.overall} | {"overall": list(first.overall)}
    return [
        _difference(name, [np.array(shares[row]) for row in rows])
        for name, rows in (lines | {row: [row] for row in others}).items()
    ]


def _difference(name: str, rows: list[Any]) -> Difference:
    """`rows`: of each row [prompts, 2] shares, first and second."""
    first, second = (float(np.mean([row[:, run].mean() for row in rows])) for run in (0, 1))
    return Difference(
        name, sum(map(len, rows)), first, second, bootstrap([row[:, 1] - row[:, 0] for row in rows])
    )


def as_text(first: Report, second: Report, lines: list[Difference]) -> str:
    """The comparison as a Markdown table in percent, under what distinguishes the runs."""
    shared = first.facts.keys() & second.facts.keys()  # a record knows the weights' hash, a run the bundle's
    facts = ({key: one.facts[key] for key in one.facts if key in shared} for one in (first, second))
    told = differing(*facts) or ("the same settings",) * 2
    parts = [f"A: {told[0]}", f"B: {told[1]}"]
    parts += ["", "| | prompts | A | B | B - A | 95% interval |", "|---|---|---|---|---|---|"]
    for line in lines:
        shown = f"**{line.name}**" if line.name == "overall" else line.name
        change = line.change
        parts.append(
            f"| {shown} | {line.prompts} | {100 * line.first:.1f} | {100 * line.second:.1f} | {100 * change.mean:+.1f} "
            f"| {change.interval or 'too few prompts'} |"
        )
    overall = next(line.change for line in lines if line.name == "overall")
    return "\n".join([*parts, "", _verdict(overall)])


def _verdict(overall: Estimate) -> str:
    if overall.interval is None:
        return (
            f"Whether the overall difference is clear of chance cannot be said: expected {FEWEST} or more prompts in each "
            f"row that it averages, found {overall.fewest}; run both with more."
        )
    clear = overall.low > 0 or overall.high < 0
    return (
        f"The overall difference {'is' if clear else 'is not'} clear of chance: its interval "
        f"{'leaves out' if clear else 'holds'} 0."
    )
