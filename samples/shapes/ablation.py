"""Does recursive sparse reasoning follow the prompt better than LoRA, and LoRA better than the base? (arXiv 2604.25299)

    python -m samples.shapes.ablation --out runs/ablation

Autoencoder and text encoder are the sample model's own. One base is trained on a world without relations (`BEFORE`) and
frozen: it knows objects, colours and numbers and nothing of "on" or "left of", as Stable Diffusion 3 is weak at position.
Each row of `ROWS` then trains adapters on it with scenes full of relations (`AFTER`): the same data in the same order,
the same steps, the same number of trained parameters in experts (M r is constant but in the last two rows), at its own
fixed depth. Each is exported and judged by ShapesEval. `--out` holds a folder a run, with its state, its curve, its pictures
and its verdicts, and results.json; finished runs are skipped, so a stopped run can go on and more seeds can be added.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from samples.shapes import evaluate, held_out, train_flow
from samples.shapes.questions import NEVER_SEEN, SEEN
from samples.shapes.train import SHIPPED, assemble, trained
from tpx_export.exporter import export_bundle
from tpx_export.model import ThinkingSpec
from tpx_export.model.autoencoder import Autoencoder
from tpx_export.model.mmdit import MMDiT
from tpx_export.pipeline import Pipeline
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import resolve
from tpx_runtime.evaluation.compare import Report
from tpx_runtime.evaluation.statistics import Estimate, bootstrap
from tpx_runtime.files import make_folder
from tpx_runtime.generator import Generator
from tpx_runtime.manifest import EVERY_LEVEL
from tpx_runtime.records import require_same, write_json

LOSSES = "losses.npy"
FRESH_SEED, FRESH_SHARDS = 2**20, 2  # scenes that no training with a seed below sees
BASE_BATCH = 96
BEFORE = {
    "single object": 0.12,
    "two objects": 0.30,
    "counting": 0.20,
    "colours": 0.20,
    "colour attribution": 0.18,
}
AFTER = {
    "two objects": 0.15,
    "counting": 0.15,
    "colour attribution": 0.10,
    "position": 0.25,
    "attribution + position": 0.35,
}
WIDTH = 192  # three quarters of the sample model's: narrow enough to be trained a score of times on two cores
# Two points below Euler's 20 steps in less than half of their time (docs/replication.md).
DRAWN: dict[str, Any] = {
    "sampler": "dpmpp2m",
    "steps": 8,
    "guidance": 3.0,
    "guidance_interval": EVERY_LEVEL,
}
WHOLE_RANK = 128  # M r of every row
RELATED = ("position", SEEN, NEVER_SEEN)  # rows of ShapesEval whose prompts hold a relation
BASE, LORA, THINKING, RECURSIVE = "base", "LoRA", "M=4, T=3", "M=1, T=3"


def _thinking(experts: int, depth: int, rank: int | None = None, **switches: Any) -> ThinkingSpec:
    return ThinkingSpec(experts=experts, rank=rank or WHOLE_RANK // experts, max_depth=depth, **switches)


ROWS: dict[str, ThinkingSpec | None] = {
    BASE: None,
    LORA: _thinking(1, 1, modulation=False),
    THINKING: _thinking(4, 3),
    "M=4, T=1": _thinking(4, 1),
    "M=4, T=2": _thinking(4, 2),
    "M=2, T=3": _thinking(2, 3),
    "M=2, T=2": _thinking(2, 2),
    "M=2, T=1": _thinking(2, 1),
    "M=4, T=3, no modulation": _thinking(4, 3, modulation=False),
    "M=4, T=3, gate sees tokens alone": _thinking(4, 3, gate_sees_condition=False),
    "M=4, T=3, base at every step": _thinking(4, 3, base_every_step=True),
    RECURSIVE: _thinking(1, 3),
    # The paper's own rank for each expert: more parameters than LoRA has.
    "M=2, T=2, rank 128 each": _thinking(2, 2, WHOLE_RANK),
    "M=4, T=3, rank 128 each": _thinking(4, 3, WHOLE_RANK),
}
MAIN = (LORA, THINKING, RECURSIVE)  # the rows that are trained with every seed
Sides = tuple[tuple[str, ...], tuple[str, ...]]
# What else is compared, each side a mean over rows and over the seeds that all of them have: the first minus the second.
POOLED: dict[str, Sides] = {
    "T=3 minus T=1, all M": ((RECURSIVE, "M=2, T=3", THINKING), (LORA, "M=2, T=1", "M=4, T=1")),
    "M=4 minus M=2, all T": (("M=4, T=1", "M=4, T=2", THINKING), ("M=2, T=1", "M=2, T=2", "M=2, T=3")),
    f"{RECURSIVE} minus {BASE}": ((RECURSIVE,), (BASE,)),
    f"{THINKING} minus {BASE}": ((THINKING,), (BASE,)),
} | {
    f"{THINKING} minus {other.removeprefix(THINKING).removeprefix(', ')}": ((THINKING,), (other,))
    for other in (
        RECURSIVE,
        "M=4, T=1",
        "M=4, T=3, no modulation",
        "M=4, T=3, gate sees tokens alone",
        "M=4, T=3, base at every step",
    )
}
COMPARED: dict[str, Sides] = {
    f"{name} minus {LORA}": ((name,), (LORA,)) for name in ROWS if name != LORA
} | POOLED
# Student's t, two-sided 95%, of 1 to 9 degrees of freedom; for more the last, which is too wide rather than too narrow.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
COVERED = (
    "Intervals of the first two tables: bootstrap over prompts, or over scenes, of the weights as they were trained; what "
    "another seed of training would give is not in them. Of the third: Student's t over seeds, of these prompts and scenes."
)


@dataclass(frozen=True)
class Work:
    """What every run shares."""

    out: Path
    data: train_flow.Data
    fresh: train_flow.Data  # scenes that nothing is trained on
    autoencoder: Autoencoder
    base: MMDiT
    steps: int
    batch: int
    rate: float
    images: int
    limit: int | None
    engine: str
    device: str
    before: dict[str, int]  # what the base was trained with

    @property
    def settings(self) -> dict[str, Any]:
        """What all runs of one table share."""
        mine = {name: getattr(self, name) for name in ("steps", "batch", "rate", "images", "limit")}
        return {**self.before, **mine}


def run(work: Work, name: str, seed: int) -> dict[str, Any]:
    """Train, export and judge one row with one seed; returns its entry of results.json.

    Raises BadInput where it is finished with other settings.
    """
    folder = work.out / (name.replace("=", "").replace(", ", "-").replace(" ", "-") + f"-{seed}")
    record = folder / "result.json"
    if record.exists():
        facts = dict(json.loads(record.read_text()))
        require_same(facts.get("settings", {}), work.settings, folder)
        return facts
    spec, began = ROWS[name], time.monotonic()
    transformer = adapted(work, folder, spec, seed) if spec else work.base
    seconds = time.monotonic() - began
    lost = held_out.losses(transformer, work.fresh, spec.max_depth if spec else 1)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / LOSSES, lost)
    draw_and_judge(work, folder, transformer)
    facts = {
        "row": name,
        "seed": seed,
        "folder": folder.name,
        "settings": work.settings,
        "trained parameters": trained_parameters(transformer, spec) if spec else 0,
        "seconds of training": round(seconds),
        "spec": asdict(spec) if spec else None,
        "loss on fresh scenes": float(lost.mean()),
        "rows": json.loads((folder / "eval/report.json").read_text())["rows"],
    }
    write_json(record, facts)
    return facts


def adapted(work: Work, folder: Path, spec: ThinkingSpec, seed: int) -> MMDiT:
    """The base with adapters, trained at their own depth alone."""
    told = train_flow.Run(folder, work.steps, work.batch, seed, work.device, work.rate)
    depths = (spec.max_depth,)
    return train_flow.train_adapters(work.base, work.data, work.autoencoder, told, spec, depths)


def draw_and_judge(work: Work, folder: Path, transformer: MMDiT) -> None:
    """Export the transformer to a bundle, run ShapesEval with it into the folder's `eval`, and remove the bundle."""
    bundle = folder / "bundle"
    model = assemble(work.autoencoder, work.data.text_encoder, transformer)
    export_bundle(Pipeline.from_model(model), bundle, force=True)
    drawn = Generator.load(bundle, work.engine, verify=False)
    evaluate.run(folder / "eval", drawn, images=work.images, limit=work.limit, **DRAWN)
    shutil.rmtree(bundle)


def trained_parameters(transformer: MMDiT, spec: ThinkingSpec) -> int:
    """What `with_thinking` leaves to train."""
    fixed = () if spec.modulation else (".scale", ".shift")
    named = transformer.state_dict().items()
    return sum(value.numel() for name, value in named if ".thinking." in name and not name.endswith(fixed))


def shares(out: Path, facts: list[dict[str, Any]]) -> list[np.ndarray]:
    """For each kind, the share of right pictures of each prompt, [prompts], averaged over runs."""
    by_row, overall = _by_row(out, facts)
    return [by_row[kind] for kind in overall]


def related(out: Path, facts: list[dict[str, Any]]) -> list[np.ndarray]:
    """The same for all prompts with a relation, held out ones too, as one array: adapters are trained on relations."""
    by_row, _ = _by_row(out, facts)
    return [np.concatenate([by_row[row] for row in RELATED])]


def _by_row(out: Path, facts: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    reports = [Report.load(out / one["folder"] / "eval") for one in facts]
    first = reports[0]
    mean = np.mean([report.shares for report in reports], axis=0)
    rows = np.array([row for row, _ in first.prompts])
    return {row: mean[rows == row] for row in set(rows)}, first.overall


def lost(out: Path, facts: list[dict[str, Any]]) -> list[np.ndarray]:
    """The loss on each fresh scene, [scenes], averaged over runs."""
    return [np.mean([np.load(out / one["folder"] / LOSSES) for one in facts], axis=0)]


@dataclass(frozen=True)
class Measure:
    """A column of the table: what is measured, how it is read, and how its numbers are written."""

    name: str
    read: Callable[[Path, list[dict[str, Any]]], list[np.ndarray]]
    times: float
    digits: int

    def written(self, estimate: Estimate, sign: str = "") -> str:
        mean, low, high = (
            f"{self.times * value:{sign}.{self.digits}f}"
            for value in (estimate.mean, estimate.low, estimate.high)
        )
        return f"{mean} ({low} to {high})"


MEASURES = (
    Measure("ShapesEval overall, %", shares, 100, 1),
    Measure("prompts with a relation, %", related, 100, 1),
    Measure("loss on fresh scenes, 1/1000", lost, 1000, 2),
)


def table(out: Path, results: list[dict[str, Any]]) -> str:
    """Each row's measures with their 95% intervals, and its paired differences from LoRA of the same seeds."""
    head = ["", "trained", "seeds", "by seed, %"]
    for measure in MEASURES:
        head += [measure.name, "minus LoRA"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in ROWS:
        found = [one for one in results if one["row"] == name]
        if not found:
            continue
        each = ", ".join(f"{100 * one['rows']['overall']['score']:.1f}" for one in found)
        told = [name, f"{found[0]['trained parameters']:,}", str(len(found)), each]
        sides = ((name,), (LORA,))
        seeds = [] if name == LORA else _shared(results, sides)
        for measure in MEASURES:
            told.append(measure.written(bootstrap(measure.read(out, found))))
            change = bootstrap(_difference(out, results, sides, seeds, measure)) if seeds else None
            told.append(measure.written(change, "+") if change else "")
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def pooled(out: Path, results: list[dict[str, Any]]) -> str:
    """Each measure's paired difference for the comparisons of POOLED whose rows are all there."""
    lines = _head("seeds")
    for name, sides in POOLED.items():
        if seeds := _shared(results, sides):
            told = [name, str(len(seeds))]
            for measure in MEASURES:
                told.append(measure.written(bootstrap(_difference(out, results, sides, seeds, measure)), "+"))
            lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def by_seed(out: Path, results: list[dict[str, Any]]) -> str:
    """The comparisons of COMPARED with several seeds: each seed's difference, then the mean and its interval over seeds."""
    lines = _head("seeds")
    for name, sides in COMPARED.items():
        seeds = _shared(results, sides)
        if len(seeds) < 2:
            continue
        told = [name, ", ".join(map(str, seeds))]
        for measure in MEASURES:
            parts = [_difference(out, results, sides, [seed], measure) for seed in seeds]
            each = [float(np.mean([row.mean() for row in rows])) for rows in parts]
            listed = ", ".join(f"{measure.times * one:+.{measure.digits}f}" for one in each)
            told.append(f"{listed}: {measure.written(over_seeds(each), '+')}")
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def over_seeds(values: list[float]) -> Estimate:
    """The mean of two values or more, one a seed, with its 95% interval by Student's t."""
    mean = float(np.mean(values))
    reach = T_95[min(len(values) - 1, len(T_95)) - 1] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Estimate(mean, mean - reach, mean + reach, len(values))


def _head(*columns: str) -> list[str]:
    names = ["", *columns, *(measure.name for measure in MEASURES)]
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def _shared(results: list[dict[str, Any]], sides: Sides) -> list[int]:
    """The seeds that every row of both sides has."""
    rows, runs = set(itertools.chain(*sides)), {(one["row"], one["seed"]) for one in results}
    return [seed for seed in sorted({seed for _, seed in runs}) if all((row, seed) in runs for row in rows)]


def _difference(
    out: Path, results: list[dict[str, Any]], sides: Sides, seeds: list[int], measure: Measure
) -> list[np.ndarray]:
    """The first side minus the second, each a mean over its rows and `seeds`, as `measure` reads it."""
    first, second = (
        measure.read(out, [one for one in results if one["row"] in side and one["seed"] in seeds])
        for side in sides
    )
    return [a - b for a, b in zip(first, second, strict=True)]


def tables(out: Path, results: list[dict[str, Any]]) -> str:
    """Everything that is printed: the three tables, what their intervals cover, and the judge's own errors."""
    parts = [made(out, results) for made in (table, pooled, by_seed)]
    return "\n\n".join([*parts, COVERED, evaluate.parser_line("overall", *RELATED)])


@click.command(cls=TpxCommand)
@click.option(
    "--ckpt",
    type=click.Path(path_type=Path),
    default=SHIPPED,
    show_default=True,
    help="Whose autoencoder and text encoder to take.",
)
@click.option(
    "--latents",
    type=click.Path(path_type=Path),
    default=Path("runs/latents"),
    show_default=True,
    help="Folder of the scenes to learn from; those that are not there yet are rendered.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/ablation"), show_default=True)
@click.option("--base-steps", type=click.IntRange(1), default=800, show_default=True)
@click.option(
    "--steps", type=click.IntRange(1), default=300, show_default=True, help="Of each row's adapters."
)
@click.option(
    "--batch", type=click.IntRange(1), default=96, show_default=True, help="Of each row's adapters."
)
@click.option("--rate", default=1e-3, show_default=True, help="Highest learning rate of adapters.")
@click.option(
    "--images", type=click.IntRange(1), default=2, show_default=True, help="Pictures a prompt of ShapesEval."
)
@click.option(
    "--limit", type=click.IntRange(1), help="Only the first N prompts of each of ShapesEval's rows."
)
@click.option("--engine", default="auto", show_default=True, help="Engine that draws ShapesEval.")
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help=f"Of {' and '.join(MAIN)}; other rows have one.",
)
@click.option(
    "--shards",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Pools of 2,048 scenes, before and after.",
)
@click.option(
    "--row", "names", type=click.Choice(list(ROWS)), multiple=True, help="Only these.  [default: all]"
)
def main(
    ckpt: Path,
    latents: Path,
    out: Path,
    base_steps: int,
    steps: int,
    batch: int,
    rate: float,
    images: int,
    limit: int | None,
    engine: str,
    seeds: int,
    shards: int,
    names: tuple[str, ...],
) -> None:
    """Train and judge every row, or those named, and print the tables."""
    resolve(engine)  # refuses now rather than after the training
    make_folder(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = trained(ckpt, device)
    autoencoder, text_encoder = model.autoencoder, model.text_encoder
    before, data, fresh = (
        train_flow.Data.load(latents, many, seed, autoencoder, text_encoder, mix)
        for many, seed, mix in ((shards, 0, BEFORE), (shards, 1, AFTER), (FRESH_SHARDS, FRESH_SEED, AFTER))
    )
    torch.manual_seed(0)
    narrow = train_flow.fresh_base(autoencoder, text_encoder, WIDTH)
    base = train_flow.train_base(
        narrow, before, autoencoder, train_flow.Run(out, base_steps, BASE_BATCH, 0, device)
    )
    told = {"base steps": base_steps, "shards": shards}
    work = Work(out, data, fresh, autoencoder, base, steps, batch, rate, images, limit, engine, device, told)
    wanted = [(name, 0) for name in names or ROWS]
    wanted += [(name, seed) for name in MAIN for seed in range(1, seeds) if name in (names or ROWS)]
    for name, seed in wanted:
        run(work, name, seed)
        results = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
        write_json(out / "results.json", {"runs": results})
        click.echo(tables(out, results))


if __name__ == "__main__":
    main()
