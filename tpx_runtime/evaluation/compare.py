"""Paired comparison of two ShapesEval runs, which generate the same prompts with the same seeds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput, shorten
from ..records import differences
from .statistics import MIN_PROMPTS, Estimate, bootstrap, interval_text

# Facts that must be equal in two runs that are compared, and how messages call them.
REQUIRED_EQUAL = {
    "list": "list",
    "images": "number of images per prompt",
    "seed": "seed",
    "parser_sha256": "judge",
}
_MODEL = {"weights_sha256", "bundle_sha256"}  # a record has the first, a run the second


@dataclass(frozen=True)
class Report:
    """The contents of report.json: `facts` about the run, `prompts` as (row, prompt), and their shares of correct images.

    `overall` names the rows whose unweighted mean is the overall score.
    """

    facts: dict[str, Any]
    overall: tuple[str, ...]
    prompts: tuple[tuple[str, str], ...]
    shares: tuple[float, ...]

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read the report.json of a finished run, given its path or its folder. Raises BadInput."""
        try:
            path = path / "report.json" if path.is_dir() else path
            facts = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"expected a report.json at {path}, found: {error.strerror}; name one") from None
        except (ValueError, RecursionError):
            facts = None
        try:
            listed, overall = facts.pop("prompts"), tuple(facts.pop("overall of"))
            prompts = tuple((str(entry["row"]), str(entry["prompt"])) for entry in listed)
            shares = tuple(sum(map(bool, entry["right"])) / len(entry["right"]) for entry in listed)
            del facts["rows"]
            valid = bool(overall) and set(overall) <= {row for row, _ in prompts}
        except (TypeError, KeyError, AttributeError, ZeroDivisionError):
            valid = False
        if not valid:
            raise BadInput(
                f"expected a report of `tpx-eval shapes` in {path}, found something else; run that again"
            )
        return cls(facts, overall, prompts, shares)


@dataclass(frozen=True)
class Difference:
    """A row of the comparison: the scores of both runs, and second minus first with its interval."""

    name: str
    prompts: int
    first: float
    second: float
    change: Estimate


def compare(first: Report, second: Report) -> list[Difference]:
    """The difference of each row, with "overall" after the rows that it averages. Raises BadInput unless the runs pair."""
    for key, what in REQUIRED_EQUAL.items():
        if first.facts.get(key) != second.facts.get(key):
            found = f"{shorten(first.facts.get(key), 80)} and {shorten(second.facts.get(key), 80)}"
            raise BadInput(f"expected runs with the same {what}, found {found}; run one of them again")
    if first.prompts != second.prompts or first.overall != second.overall:
        found = f"{len(first.prompts)} and {len(second.prompts)} that differ"
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
    """`rows` holds for each row the shares [prompts, 2] of the first and the second run."""
    first, second = (float(np.mean([row[:, run].mean() for row in rows])) for run in (0, 1))
    return Difference(
        name, sum(map(len, rows)), first, second, bootstrap([row[:, 1] - row[:, 0] for row in rows])
    )


def as_text(first: Report, second: Report, lines: list[Difference]) -> str:
    """The comparison as a Markdown table in percent, below the settings in which the runs differ."""
    left_out = _MODEL & (first.facts.keys() ^ second.facts.keys())
    facts = ({key: one.facts[key] for key in one.facts if key not in left_out} for one in (first, second))
    settings = differences(*facts) or ("the same settings",) * 2
    parts = [f"A: {settings[0]}", f"B: {settings[1]}"]
    parts += ["", "| | prompts | A | B | B - A | 95% interval |", "|---|---|---|---|---|---|"]
    for line in lines:
        name = f"**{line.name}**" if line.name == "overall" else line.name
        change = line.change
        parts.append(
            f"| {name} | {line.prompts} | {100 * line.first:.1f} | {100 * line.second:.1f} | {100 * change.mean:+.1f} "
            f"| {interval_text(*change.bounds, '+')} |"
        )
    overall = next(line.change for line in lines if line.name == "overall")
    return "\n".join([*parts, "", _verdict(overall)])


def _verdict(overall: Estimate) -> str:
    if not overall.has_interval:
        return (
            f"The significance of the overall difference is unknown: expected at least {MIN_PROMPTS} prompts in each row "
            f"that it averages, found {overall.smallest_row}; run both with more."
        )
    significant = overall.low > 0 or overall.high < 0
    return (
        f"The overall difference is {'' if significant else 'not '}significant: its 95% interval "
        f"{'excludes' if significant else 'includes'} 0."
    )
