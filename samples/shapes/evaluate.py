"""ShapesEval: GenEval's six kinds of prompts in the shapes world, drawn by a bundle and judged by the scene parser.

    tpx-eval shapes --bundle bundles/shapes --out out/shapes-eval
    python -m samples.shapes.evaluate ...                               the same

A fixed list of 552 prompts, 92 of each kind, gives the overall score: the unweighted mean of the six kinds' shares of right
pictures. Two more rows ask for coloured pairs in a relation: 96 prompts of combinations that training has seen, and 96 of
those that were held out of it. Intervals are 95% bootstraps over prompts. Beside each score stands how often the parser is
wrong on renders of the same prompts. `--out` holds every picture, index.html, and report.json; an interrupted run goes on
where it stopped. Needs no torch.
"""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samples.shapes.captions import KINDS
from samples.shapes.parser import WEIGHTS, Parser
from samples.shapes.questions import LIST, NEVER_SEEN, SEEN, Question, questions
from samples.shapes.score import judge, page
from tpx_runtime.bundle import hash_file
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.cli import shapes as main
from tpx_runtime.evaluation.resumable import resumable
from tpx_runtime.evaluation.statistics import bootstrap
from tpx_runtime.images import save_png
from tpx_runtime.records import differences, write_atomic, write_json

if TYPE_CHECKING:
    from tpx_runtime.generator import Generator
    from tpx_runtime.settings import Settings

SEEDS_APART = 1000  # between the first pictures of two prompts: no two share their noise
# How often the parser is wrong on renders, row by row; parser_errors.py measures it.
ERRORS = Path(__file__).with_name("parser_errors.json")


@dataclass(frozen=True)
class ParserError:
    """On how many renders of a row's prompts the parser was tried; parts of right ones refused, wrong ones accepted."""

    renders: int
    true_refused: float
    false_accepted: float

    def __str__(self) -> str:
        return f"{self.true_refused:.2%} / {self.false_accepted:.2%}"


def parser_errors(path: Path = ERRORS) -> dict[str, ParserError]:
    """The recorded errors of each row, and "overall", their unweighted mean over the six kinds.

    Raises BadInput where another parser was measured than the one that judges.
    """
    record = json.loads(path.read_text())
    if record["parser sha256"] != hash_file(WEIGHTS):
        raise BadInput(
            f"expected {path.name} to be measured with the present {WEIGHTS.name}, found another; run {record['command']}"
        )
    made = {}
    for row, found in record["rows"].items():
        refused, accepted = (len(found[key]) / found["renders"] for key in ("true refused", "false accepted"))
        made[row] = ParserError(found["renders"], refused, accepted)
    kinds = [made[kind] for kind in KINDS]
    made["overall"] = ParserError(
        sum(one.renders for one in kinds),
        float(np.mean([one.true_refused for one in kinds])),
        float(np.mean([one.false_accepted for one in kinds])),
    )
    return made


def parser_line(*rows: str) -> str:
    """What stands under a table that has no column for it: the parser's errors in `rows`."""
    errors = parser_errors()
    told = "; ".join(f"{row} {errors[row]} of {errors[row].renders:,}" for row in rows)
    return (
        f"Parser wrong (true prompts refused / prompts wrong in one word accepted), on fresh renders: {told}."
    )


def report(asked: Sequence[Question], right: Sequence[Sequence[bool]]) -> dict[str, dict[str, Any]]:
    """For each row and "overall": prompts, images, score, low, high (parts of 1), and the parser's own errors."""
    rows: dict[str, list[Sequence[bool]]] = {}
    for question, verdict in zip(asked, right, strict=True):
        rows.setdefault(question.row, []).append(verdict)
    kinds = [kind for kind in KINDS if kind in rows]
    table = {row: [row] for row in kinds} | {"overall": kinds}
    table |= {row: [row] for row in (SEEN, NEVER_SEEN) if row in rows}
    errors, made = parser_errors(), {}
    for name, members in table.items():
        verdicts = [rows[row] for row in members]
        estimate = bootstrap([np.array([np.mean(images) for images in row]) for row in verdicts])
        made[name] = {
            "prompts": sum(map(len, verdicts)),
            "images": sum(len(images) for row in verdicts for images in row),
            "score": estimate.mean,
            "low": estimate.low,
            "high": estimate.high,
            "parser": asdict(errors[name]),
        }
    return made


def as_text(result: dict[str, dict[str, Any]]) -> str:
    """The report as a Markdown table, and under it what its last column means."""
    lines = ["| | prompts | images | right | 95% interval | parser wrong |", "|---|---|---|---|---|---|"]
    for name, row in result.items():
        shown = f"**{name}**" if name == "overall" else name
        score, low, high = (f"{100 * row[key]:.1f}" for key in ("score", "low", "high"))
        wrong = ParserError(**row["parser"])
        lines.append(
            f"| {shown} | {row['prompts']} | {row['images']} | {score}% | {low} to {high} | {wrong} |"
        )
    renders = result["overall"]["parser"]["renders"]
    lines.append(
        f"\nParser wrong: true prompts refused / prompts wrong in one word accepted, on {renders:,} fresh renders of the "
        "six kinds' prompts; what it does with a model's pictures is not in these figures."
    )
    return "\n".join(lines)


def as_page(asked: Sequence[Question], right: Sequence[Sequence[bool]], text: str) -> str:
    """index.html: the table, then row by row every prompt with its framed pictures and a mark for each."""
    style = "figure{display:inline-block;margin:4px}figcaption{max-width:540px}"
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{LIST}</title><style>{style}</style><h1>{LIST}</h1>",
        f"<pre>{html.escape(text)}</pre><p>Green frame and ✓: right. Red frame and ✗: wrong.",
    ]
    row = ""
    for number, (question, verdict) in enumerate(zip(asked, right, strict=True)):
        if question.row != row:
            parts.append(f"<h2>{html.escape(row := question.row)}</h2>")
        marks = "".join("✓" if one else "✗" for one in verdict)
        words = f"{html.escape(question.text)}: {marks} {sum(verdict)}/{len(verdict)}"
        parts.append(
            f"<figure><img loading=lazy src={picture_name(number)}><figcaption>{words}</figcaption></figure>"
        )
    return "\n".join(parts)


def picture_name(number: int) -> str:
    return f"{number:04d}.png"


class Verdicts:
    """`verdicts.jsonl` of a run: a line of what was run, then the verdicts of each prompt, in the list's order."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Take up the run in `folder`, or begin one. Raises BadInput where another run lies there."""
        self.path = folder / "verdicts.jsonl"
        self.right: list[list[bool]] = []
        if self.path.exists():
            first, *rest = self.path.read_text(encoding="utf-8").splitlines() or [""]
            if first != json.dumps(facts):
                raise BadInput(_another(first, facts, folder))
            # Half a line, a damaged one, and verdicts without their picture end what is taken up; the rest is drawn anew.
            for place, line in enumerate(rest):
                right = _verdicts_in(line)
                if right is None or not (folder / picture_name(place)).is_file():
                    break
                self.right.append(right)
        # Written anew: a killed run may have left half a line.
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in [facts, *self.right]).encode())

    def add(self, right: Sequence[bool]) -> None:
        self.right.append(list(right))
        with self.path.open("a") as file:
            file.write(json.dumps(self.right[-1]) + "\n")


def _verdicts_in(line: str) -> list[bool] | None:
    """The verdicts of a line; None for another line."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(found, list) and all(isinstance(verdict, bool) for verdict in found)
    return found if fits else None


def _another(line: str, facts: dict[str, Any], folder: Path) -> str:
    """Why the run that `line` speaks of is not that of `facts`."""
    try:
        before, now = differences(dict(json.loads(line)), facts) or ("", "")
    except (ValueError, TypeError):
        before, now = "what is not JSON", "no such run"
    return (
        f"expected the settings of the run in {folder} ({before}), found {now}; use those, or another --out"
    )


def _first_of_each_row(asked: Sequence[Question], limit: int | None) -> Iterator[tuple[int, Question]]:
    seen: dict[str, int] = {}
    for number, question in enumerate(asked):
        seen[question.row] = seen.get(question.row, 0) + 1
        if limit is None or seen[question.row] <= limit:
            yield number, question


def run(
    out: Path,
    generator: "Generator",
    *,
    images: int = 4,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    **settings: Any,
) -> str:
    """Draw and judge the list, write `out`, and return the table. `settings` are those of `Generator.plan`.

    Picture i of prompt n has seed `seed + 1000 n + i`, the same whatever the limit. Raises BadInput for settings that do not
    fit or a folder of another run, Cancelled with what is left.
    """
    asked = list(_first_of_each_row(questions(), limit))
    jobs = [
        generator.plan(question.text, seed=seed + SEEDS_APART * number, num_images=images, **settings)
        for number, question in asked
    ]
    parser_errors()  # refuses now rather than at the end
    facts = {**_drawn_with(generator, jobs[0][0]), "seed": seed, "images": images, "limit": limit}
    try:
        out.mkdir(parents=True, exist_ok=True)
        verdicts = Verdicts(out, facts)
    except OSError as error:
        raise BadInput(
            f"expected to write into {out}, found: {error.strerror}; choose another --out"
        ) from None
    listed = [question for _, question in asked]
    _judge_the_rest(out, generator, listed, jobs, verdicts, batch_size)
    return _write_report(out, facts, listed, verdicts.right)


def _drawn_with(generator: "Generator", used: "Settings") -> dict[str, Any]:
    """The judge, the bundle and the settings of a run, as its report gives them."""
    return {
        "list": LIST,
        "parser_sha256": hash_file(WEIGHTS),
        "bundle": generator.manifest.name,
        "bundle_sha256": generator.manifest.sha256,
        "engine": generator.engine.name,
        **{key: getattr(used, key) for key in ("sampler", "steps", "guidance", "depth")},
        "guidance_interval": list(used.guidance_interval),
        "guidance_every": used.guidance_every,
    }


def _judge_the_rest(
    out: Path,
    generator: "Generator",
    asked: Sequence[Question],
    jobs: Sequence[Sequence["Settings"]],
    verdicts: Verdicts,
    batch_size: int,
) -> None:
    """Draw, judge and save what has no verdict yet, whole prompts to a batch. Raises Cancelled with what is left."""
    parser, images = Parser.load(), len(jobs[0])
    together = max(1, batch_size // images)
    left = range(len(verdicts.right), len(asked))
    with resumable(images * len(left)) as advance:
        for start in left[::together]:
            group = range(start, min(start + together, len(asked)))
            drawn = iter(generator.generate([job for place in group for job in jobs[place]], batch_size))
            for place in group:
                row = judge(parser, asked[place].prompt, [next(drawn) for _ in range(images)])
                save_png(page([row]), out / picture_name(place))
                verdicts.add(row.right)
                advance(images)


def _write_report(
    out: Path, facts: dict[str, Any], asked: Sequence[Question], right: Sequence[Sequence[bool]]
) -> str:
    """report.json and index.html; returns the table."""
    result = report(asked, right)
    text = as_text(result)
    prompts = [
        {"row": question.row, "prompt": question.text, "right": verdict}
        for question, verdict in zip(asked, right, strict=True)
    ]
    write_json(out / "report.json", {**facts, "overall of": list(KINDS), "rows": result, "prompts": prompts})
    write_atomic(out / "index.html", as_page(asked, right, text).encode())
    return text


if __name__ == "__main__":
    main()
