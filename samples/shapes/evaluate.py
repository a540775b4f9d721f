"""ShapesEval: GenEval's six kinds of prompts in the shapes world; a bundle generates images, the scene parser judges them.

    tpx-eval shapes --bundle bundles/shapes --out out/shapes-eval
    python -m samples.shapes.evaluate ...                               the same

A fixed list of 552 prompts, 92 of each kind, gives the overall score: the unweighted mean, over the six kinds, of the share
of right images. Two more rows are coloured pairs in a relation: 96 prompts of combinations in the training data, and 96 of
held-out combinations. Intervals are 95% bootstraps over prompts. Beside each score is the parser's error rate on renders of
the same prompts. `--out` contains every image, index.html and report.json; the same command resumes an interrupted run.
Needs no torch.
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
from samples.shapes.prompt_list import HELD_OUT_PAIRS, LIST_NAME, SEEN_PAIRS, ListedPrompt, listed_prompts
from samples.shapes.score import contact_sheet, judge
from tpx_runtime.bundle import hash_file
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.cli import shapes as main
from tpx_runtime.evaluation.resumable import resumable
from tpx_runtime.evaluation.statistics import bootstrap, interval_text
from tpx_runtime.image_files import save_image
from tpx_runtime.records import differences, write_atomic, write_json

if TYPE_CHECKING:
    from tpx_runtime.generator import Generator
    from tpx_runtime.settings import Settings

SEED_STRIDE = 1000  # between the first images of two prompts, so that no two prompts share their noise
# The parser's errors on renders, row by row, as measured by parser_errors.py.
ERRORS = Path(__file__).with_name("parser_errors.json")


@dataclass(frozen=True)
class ParserError:
    """The number of renders of a row's prompts, and the shares (0..1) of true prompts refused and wrong ones accepted."""

    renders: int
    true_refused: float
    false_accepted: float

    def __str__(self) -> str:
        return f"{self.true_refused:.2%} / {self.false_accepted:.2%}"


def parser_errors(path: Path = ERRORS) -> dict[str, ParserError]:
    """The recorded errors of each row, and as "overall" their unweighted mean over the six kinds.

    Raises BadInput if they were measured with another parser than the present one.
    """
    record = json.loads(path.read_text())
    if record["parser sha256"] != hash_file(WEIGHTS):
        raise BadInput(
            f"expected {path.name} to be measured with the present {WEIGHTS.name}, found another; run {record['command']}"
        )
    errors = {}
    for row, found in record["rows"].items():
        refused, accepted = (len(found[key]) / found["renders"] for key in ("true refused", "false accepted"))
        errors[row] = ParserError(found["renders"], refused, accepted)
    kinds = [errors[kind] for kind in KINDS]
    errors["overall"] = ParserError(
        sum(one.renders for one in kinds),
        float(np.mean([one.true_refused for one in kinds])),
        float(np.mean([one.false_accepted for one in kinds])),
    )
    return errors


def parser_error_line(*rows: str) -> str:
    """The parser's errors in `rows`, to be printed under a table that has no column for them."""
    errors = parser_errors()
    listing = "; ".join(f"{row} {errors[row]} of {errors[row].renders:,}" for row in rows)
    return f"Parser errors (true prompts refused / prompts wrong in one word accepted), on fresh renders: {listing}."


def report(prompts: Sequence[ListedPrompt], right: Sequence[Sequence[bool]]) -> dict[str, dict[str, Any]]:
    """For each row and "overall": prompts, images, score, low, high (in 0..1), and the parser's own errors."""
    rows: dict[str, list[Sequence[bool]]] = {}
    for listed, verdict in zip(prompts, right, strict=True):
        rows.setdefault(listed.row, []).append(verdict)
    kinds = [kind for kind in KINDS if kind in rows]
    table = {row: [row] for row in kinds} | {"overall": kinds}
    table |= {row: [row] for row in (SEEN_PAIRS, HELD_OUT_PAIRS) if row in rows}
    errors, result = parser_errors(), {}
    for name, members in table.items():
        verdicts = [rows[row] for row in members]
        estimate = bootstrap([np.array([np.mean(images) for images in row]) for row in verdicts])
        low, high = estimate.bounds
        result[name] = {
            "prompts": sum(map(len, verdicts)),
            "images": sum(len(images) for row in verdicts for images in row),
            "score": estimate.mean,
            "low": low,
            "high": high,
            "parser": asdict(errors[name]),
        }
    return result


def as_text(result: dict[str, dict[str, Any]]) -> str:
    """The report as a Markdown table, with an explanation of its last column."""
    lines = ["| | prompts | images | right | 95% interval | parser errors |", "|---|---|---|---|---|---|"]
    for name, row in result.items():
        shown = f"**{name}**" if name == "overall" else name
        score, interval = f"{100 * row['score']:.1f}%", interval_text(row["low"], row["high"])
        errors = ParserError(**row["parser"])
        lines.append(f"| {shown} | {row['prompts']} | {row['images']} | {score} | {interval} | {errors} |")
    renders = result["overall"]["parser"]["renders"]
    lines.append(
        f"\nParser errors: true prompts refused / prompts wrong in one word accepted, on {renders:,} fresh renders of the "
        "six kinds' prompts. Its errors on a model's images are not measured."
    )
    return "\n".join(lines)


def as_html(prompts: Sequence[ListedPrompt], right: Sequence[Sequence[bool]], text: str) -> str:
    """The content of index.html: the table, then row by row every prompt with its framed images and their verdicts."""
    style = "figure{display:inline-block;margin:4px}figcaption{max-width:540px}"
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{LIST_NAME}</title><style>{style}</style><h1>{LIST_NAME}</h1>",
        f"<pre>{html.escape(text)}</pre><p>Green frame and ✓: right. Red frame and ✗: wrong.",
    ]
    row = ""
    for number, (listed, verdict) in enumerate(zip(prompts, right, strict=True)):
        if listed.row != row:
            parts.append(f"<h2>{html.escape(row := listed.row)}</h2>")
        marks = "".join("✓" if one else "✗" for one in verdict)
        words = f"{html.escape(listed.text)}: {marks} {sum(verdict)}/{len(verdict)}"
        parts.append(
            f"<figure><img loading=lazy src={image_name(number)}><figcaption>{words}</figcaption></figure>"
        )
    return "\n".join(parts)


def image_name(number: int) -> str:
    return f"{number:04d}.png"


class Verdicts:
    """The file verdicts.jsonl of a run: a line of its settings, then one of verdicts per prompt, in the list's order."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Resume the run in `folder`, or begin one. Raises BadInput if `folder` has a run with other settings."""
        self.path = folder / "verdicts.jsonl"
        self.right: list[list[bool]] = []
        if self.path.exists():
            # A damaged line may be of any bytes.
            first, *rest = self.path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            if first != json.dumps(facts):
                raise BadInput(_other_run_message(first, facts, folder))
            # Resume up to the first damaged line or missing image; the rest is generated again.
            for index, line in enumerate(rest):
                right = _verdicts_in(line)
                if right is None or not (folder / image_name(index)).is_file():
                    break
                self.right.append(right)
        # A killed run may have left a partial line.
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in [facts, *self.right]).encode())

    def add(self, right: Sequence[bool]) -> None:
        self.right.append(list(right))
        with self.path.open("a") as file:
            file.write(json.dumps(self.right[-1]) + "\n")


def _verdicts_in(line: str) -> list[bool] | None:
    """The verdicts in a line; None if the line is damaged."""
    try:
        verdicts = json.loads(line)
    except ValueError:
        return None
    valid = isinstance(verdicts, list) and all(isinstance(verdict, bool) for verdict in verdicts)
    return verdicts if valid else None


def _other_run_message(line: str, facts: dict[str, Any], folder: Path) -> str:
    """The message that `line`, the settings in verdicts.jsonl, differs from `facts`."""
    try:
        before, now = differences(dict(json.loads(line)), facts) or ("", "")
    except (ValueError, TypeError):
        before, now = "not valid JSON", "other settings"
    return (
        f"expected the settings of the run in {folder} ({before}), found {now}; use those, or another --out"
    )


def _first_of_each_row(
    prompts: Sequence[ListedPrompt], limit: int | None
) -> Iterator[tuple[int, ListedPrompt]]:
    seen: dict[str, int] = {}
    for number, listed in enumerate(prompts):
        seen[listed.row] = seen.get(listed.row, 0) + 1
        if limit is None or seen[listed.row] <= limit:
            yield number, listed


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
    """Generate and judge the images, write them and the report into `out`, and return the table.

    `settings` are those of `Generator.plan`. Image i of prompt n has seed `seed + 1000 n + i` for any limit. Raises BadInput
    for invalid settings or a folder of another run, EngineUnavailable without ONNX Runtime, and Cancelled, which says how
    many images remain.
    """
    numbered = list(_first_of_each_row(listed_prompts(), limit))
    jobs = [
        generator.plan(listed.text, seed=seed + SEED_STRIDE * number, num_images=images, **settings)
        for number, listed in numbered
    ]
    parser_errors()  # raises now rather than at the end
    parser = Parser.load()
    facts = {**_run_facts(generator, jobs[0][0]), "seed": seed, "images": images, "limit": limit}
    try:
        out.mkdir(parents=True, exist_ok=True)
        verdicts = Verdicts(out, facts)
    except OSError as error:
        raise BadInput(
            f"expected to write into {out}, found: {error.strerror}; choose another --out"
        ) from None
    prompts = [listed for _, listed in numbered]
    _judge_remaining(out, generator, parser, prompts, jobs, verdicts, batch_size)
    return _write_report(out, facts, prompts, verdicts.right)


def _run_facts(generator: "Generator", used: "Settings") -> dict[str, Any]:
    """The judge, the bundle and the settings of a run, as they are stored in its report."""
    return {
        "list": LIST_NAME,
        "parser_sha256": hash_file(WEIGHTS),
        "bundle": generator.manifest.name,
        "bundle_sha256": generator.manifest.sha256,
        "engine": generator.engine.name,
        **used.loop_settings,
    }


def _judge_remaining(
    out: Path,
    generator: "Generator",
    parser: Parser,
    prompts: Sequence[ListedPrompt],
    jobs: Sequence[Sequence["Settings"]],
    verdicts: Verdicts,
    batch_size: int,
) -> None:
    """Generate, judge and save the prompts without a verdict, in batches of whole prompts. Raises Cancelled."""
    images = len(jobs[0])
    prompts_per_batch = max(1, batch_size // images)
    remaining = range(len(verdicts.right), len(prompts))
    with resumable(images * len(remaining)) as advance:
        for start in remaining[::prompts_per_batch]:
            group = range(start, min(start + prompts_per_batch, len(prompts)))
            generated = iter(generator.generate([job for index in group for job in jobs[index]], batch_size))
            for index in group:
                row = judge(parser, prompts[index].prompt, [next(generated) for _ in range(images)])
                save_image(contact_sheet([row]), out / image_name(index))
                verdicts.add(row.right)
                advance(images)


def _write_report(
    out: Path, facts: dict[str, Any], prompts: Sequence[ListedPrompt], right: Sequence[Sequence[bool]]
) -> str:
    """Write report.json and index.html; return the table."""
    result = report(prompts, right)
    text = as_text(result)
    records = [
        {"row": listed.row, "prompt": listed.text, "right": verdict}
        for listed, verdict in zip(prompts, right, strict=True)
    ]
    write_json(out / "report.json", {**facts, "overall of": list(KINDS), "rows": result, "prompts": records})
    write_atomic(out / "index.html", as_html(prompts, right, text).encode())
    return text


if __name__ == "__main__":
    main()
