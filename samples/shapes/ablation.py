"""Compares recursive sparse experts with LoRA, and LoRA with the base, on following prompts (arXiv 2604.25299).

    python -m samples.shapes.ablation --out runs/ablation

The autoencoder and text encoder are those of the sample model. One base is trained on scenes without relations (`BASE_MIX`)
and frozen: it knows objects, colours and numbers, but not "on" or "left of", as Stable Diffusion 3 is weak at position. Each
row of `ROWS` then trains adapters on scenes with relations (`ADAPTER_MIX`): the same data in the same order, the same steps,
the same number of trained parameters in experts (M r is constant except in the last two rows), at its own fixed depth. Each
is exported and scored with ShapesEval. `--out` contains a folder per run (training state, loss log, images, verdicts) and
results.json. Finished runs are skipped, so that a stopped experiment can be resumed and seeds can be added.
"""

import itertools
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from samples.shapes import evaluate, held_out, options, train_flow
from samples.shapes.fit import digest
from samples.shapes.prompt_list import HELD_OUT_PAIRS, SEEN_PAIRS
from samples.shapes.train import SHIPPED, assemble, load_frozen
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
from tpx_runtime.manifest import ALL_NOISE_LEVELS
from tpx_runtime.records import read_json, require_same_settings, write_json

LOSSES = "losses.npy"
FRESH_SEED, FRESH_SHARDS = 2**20, 2  # of scenes that are in no training data of smaller seeds
BASE_BATCH = 96
BASE_MIX = {
    "single object": 0.12,
    "two objects": 0.30,
    "counting": 0.20,
    "colours": 0.20,
    "colour attribution": 0.18,
}
ADAPTER_MIX = {
    "two objects": 0.15,
    "counting": 0.15,
    "colour attribution": 0.10,
    "position": 0.25,
    "attribution + position": 0.35,
}
BASE_WIDTH = 192  # three quarters of the sample model's, so that two cores can train twenty rows
# 96.0 on ShapesEval where 20 Euler steps have 96.7, in less than half the time (docs/replication.md).
EVAL_SETTINGS: dict[str, Any] = {
    "sampler": "dpmpp2m",
    "steps": 8,
    "guidance": 3.0,
    "guidance_interval": ALL_NOISE_LEVELS,
}
TOTAL_RANK = 128  # M r of every row
# Rows of ShapesEval whose prompts contain a relation.
RELATION_ROWS = ("position", SEEN_PAIRS, HELD_OUT_PAIRS)
BASE, LORA, THINKING, RECURSIVE = "base", "LoRA", "M=4, T=3", "M=1, T=3"


def _thinking(experts: int, depth: int, rank: int | None = None, **switches: Any) -> ThinkingSpec:
    return ThinkingSpec(experts=experts, rank=rank or TOTAL_RANK // experts, max_depth=depth, **switches)


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
    # The paper's rank for each expert, which gives more parameters than LoRA has.
    "M=2, T=2, rank 128 each": _thinking(2, 2, TOTAL_RANK),
    "M=4, T=3, rank 128 each": _thinking(4, 3, TOTAL_RANK),
}
MAIN_ROWS = (LORA, THINKING, RECURSIVE)  # the rows that are trained with every seed
Comparison = tuple[tuple[str, ...], tuple[str, ...]]  # the rows of both sides
# First side minus second side; each side is the mean over its rows and over the seeds that all rows of both sides have.
POOLED_COMPARISONS: dict[str, Comparison] = {
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
ALL_COMPARISONS: dict[str, Comparison] = {
    f"{name} minus {LORA}": ((name,), (LORA,)) for name in ROWS if name != LORA
} | POOLED_COMPARISONS
# Student's t, two-sided 95%, for 1 to 9 degrees of freedom; the last one is also used for more, which is conservative.
STUDENT_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
INTERVALS_NOTE = (
    "Intervals of the first two tables: bootstrap over prompts, or over scenes, of the weights as trained, without "
    "the variation between training seeds. Intervals of the third: Student's t over seeds, for these prompts and scenes."
)


@dataclass(frozen=True)
class Experiment:
    """The data and settings that all runs share."""

    out: Path
    data: train_flow.TrainingData
    fresh: train_flow.TrainingData  # not used in training
    autoencoder: Autoencoder
    base: MMDiT
    steps: int
    batch: int
    rate: float
    images: int
    limit: int | None
    engine: str
    device: str
    base_settings: dict[str, int]  # of the training of the base

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all runs of one table must have in common."""
        own = {name: getattr(self, name) for name in ("steps", "batch", "rate", "images", "limit")}
        own["engine"] = resolve(self.engine).name  # that of "auto" depends on the machine
        own["text encoder"] = digest(self.data.text_encoder.state_dict().values())
        return {**self.base_settings, **own}


def run(experiment: Experiment, name: str, seed: int) -> dict[str, Any]:
    """Train, export and score one row with one seed; return its entry of results.json.

    Raises BadInput if the run was finished with other settings.
    """
    folder = experiment.out / (name.replace("=", "").replace(", ", "-").replace(" ", "-") + f"-{seed}")
    record = folder / "result.json"
    if record.exists():
        return _finished_run(experiment, record)
    spec, began = ROWS[name], time.monotonic()
    transformer = train_row(experiment, folder, spec, seed) if spec else experiment.base
    seconds = time.monotonic() - began
    losses = held_out.losses(transformer, experiment.fresh, spec.max_depth if spec else 1)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / LOSSES, losses)
    export_and_evaluate(experiment, folder, transformer)
    facts = {
        "row": name,
        "seed": seed,
        "folder": folder.name,
        "settings": experiment.settings,
        "trained parameters": trained_parameters(transformer, spec) if spec else 0,
        "seconds of training": round(seconds),
        "spec": asdict(spec) if spec else None,
        "loss on fresh scenes": float(losses.mean()),
        "rows": read_json(folder / "eval/report.json")["rows"],
    }
    write_json(record, facts)
    return facts


def finished_runs(experiment: Experiment) -> list[dict[str, Any]]:
    """The entries of results.json: every finished run in `--out`, also of rows that are not asked for now.

    Raises BadInput if one of them was finished with other settings.
    """
    return [_finished_run(experiment, record) for record in sorted(experiment.out.glob("*/result.json"))]


def _finished_run(experiment: Experiment, record: Path) -> dict[str, Any]:
    facts = read_json(record)
    require_same_settings(facts.get("settings", {}), experiment.settings, record.parent)
    return facts


def train_row(experiment: Experiment, folder: Path, spec: ThinkingSpec, seed: int) -> MMDiT:
    """Train adapters on the base, only at their maximum depth."""
    run = train_flow.TrainingRun(
        folder, experiment.steps, experiment.batch, seed, experiment.device, experiment.rate
    )
    depths = (spec.max_depth,)
    return train_flow.train_adapters(
        experiment.base, experiment.data, experiment.autoencoder, run, spec, depths
    )


def export_and_evaluate(experiment: Experiment, folder: Path, transformer: MMDiT) -> None:
    """Export the transformer to a bundle, run ShapesEval with it into the folder's `eval`, and remove the bundle."""
    bundle = folder / "bundle"
    model = assemble(experiment.autoencoder, experiment.data.text_encoder, transformer)
    export_bundle(Pipeline.from_model(model), bundle, force=True)
    generator = Generator.load(bundle, experiment.engine, verify=False)
    evaluate.run(
        folder / "eval", generator, images=experiment.images, limit=experiment.limit, **EVAL_SETTINGS
    )
    shutil.rmtree(bundle)


def trained_parameters(transformer: MMDiT, spec: ThinkingSpec) -> int:
    """The number of parameters that get a gradient: those that `with_thinking` leaves trainable, without the gate of a
    single expert, whose weight is always 1."""
    fixed = [".gate."] if spec.experts == 1 else []
    fixed += [] if spec.modulation else [".scale", ".shift"]
    adapters = ((name, p) for name, p in transformer.named_parameters() if ".thinking." in name)
    return sum(p.numel() for name, p in adapters if not any(part in name for part in fixed))


def overall_scores(out: Path, facts: list[dict[str, Any]]) -> list[np.ndarray]:
    """For each kind, the share of right images of each prompt, [prompts], averaged over runs."""
    by_row, overall = _by_row(out, facts)
    return [by_row[kind] for kind in overall]


def relation_scores(out: Path, facts: list[dict[str, Any]]) -> list[np.ndarray]:
    """The same for all prompts with a relation, held-out ones included, as one array."""
    by_row, _ = _by_row(out, facts)
    return [np.concatenate([by_row[row] for row in RELATION_ROWS])]


def _by_row(out: Path, facts: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    reports = [Report.load(out / one["folder"] / "eval") for one in facts]
    first = reports[0]
    mean = np.mean([report.shares for report in reports], axis=0)
    rows = np.array([row for row, _ in first.prompts])
    return {row: mean[rows == row] for row in set(rows)}, first.overall


def fresh_losses(out: Path, facts: list[dict[str, Any]]) -> list[np.ndarray]:
    """The loss on each fresh scene, [scenes], averaged over runs."""
    return [np.mean([np.load(out / one["folder"] / LOSSES) for one in facts], axis=0)]


@dataclass(frozen=True)
class Measure:
    """A column of the tables: how its values are read from runs, and the factor and digits with which they are printed."""

    name: str
    read: Callable[[Path, list[dict[str, Any]]], list[np.ndarray]]
    factor: float
    digits: int

    def formatted(self, estimate: Estimate, sign: str = "") -> str:
        mean, low, high = (
            f"{self.factor * value:{sign}.{self.digits}f}"
            for value in (estimate.mean, estimate.low, estimate.high)
        )
        return f"{mean} ({low} to {high})"


MEASURES = (
    Measure("ShapesEval overall, %", overall_scores, 100, 1),
    Measure("prompts with a relation, %", relation_scores, 100, 1),
    Measure("loss on fresh scenes, 1/1000", fresh_losses, 1000, 2),
)


def row_table(out: Path, results: list[dict[str, Any]]) -> str:
    """A table of each row's measures with 95% intervals, and of its paired differences from LoRA of the same seeds."""
    head = ["", "trained", "seeds", "by seed, %"]
    for measure in MEASURES:
        head += [measure.name, "minus LoRA"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in ROWS:
        found = [one for one in results if one["row"] == name]
        if not found:
            continue
        each = ", ".join(f"{100 * one['rows']['overall']['score']:.1f}" for one in found)
        cells = [name, f"{found[0]['trained parameters']:,}", str(len(found)), each]
        sides = ((name,), (LORA,))
        seeds = [] if name == LORA else _common_seeds(results, sides)
        for measure in MEASURES:
            cells.append(measure.formatted(bootstrap(measure.read(out, found))))
            change = bootstrap(_difference(out, results, sides, seeds, measure)) if seeds else None
            cells.append(measure.formatted(change, "+") if change else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pooled_table(out: Path, results: list[dict[str, Any]]) -> str:
    """A table of the paired differences of POOLED_COMPARISONS, without those whose rows are missing."""
    lines = _table_head("seeds")
    for name, sides in POOLED_COMPARISONS.items():
        if seeds := _common_seeds(results, sides):
            cells = [name, str(len(seeds))]
            for measure in MEASURES:
                cells.append(
                    measure.formatted(bootstrap(_difference(out, results, sides, seeds, measure)), "+")
                )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seed_table(out: Path, results: list[dict[str, Any]]) -> str:
    """A table of ALL_COMPARISONS with several seeds: each seed's difference, then their mean and its interval."""
    lines = _table_head("seeds")
    for name, sides in ALL_COMPARISONS.items():
        seeds = _common_seeds(results, sides)
        if len(seeds) < 2:
            continue
        cells = [name, ", ".join(map(str, seeds))]
        for measure in MEASURES:
            parts = [_difference(out, results, sides, [seed], measure) for seed in seeds]
            each = [float(np.mean([row.mean() for row in rows])) for rows in parts]
            listed = ", ".join(f"{measure.factor * one:+.{measure.digits}f}" for one in each)
            cells.append(f"{listed}: {measure.formatted(mean_over_seeds(each), '+')}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_over_seeds(values: list[float]) -> Estimate:
    """The mean of two or more values, one per seed, with its 95% interval by Student's t."""
    mean = float(np.mean(values))
    t = STUDENT_T_95[min(len(values) - 1, len(STUDENT_T_95)) - 1]
    half_width = t * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Estimate(mean, mean - half_width, mean + half_width, len(values))


def _table_head(*columns: str) -> list[str]:
    names = ["", *columns, *(measure.name for measure in MEASURES)]
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def _common_seeds(results: list[dict[str, Any]], sides: Comparison) -> list[int]:
    """The seeds that all rows of both sides have. The base is without adapters and has one run, which is of every seed."""
    rows, runs = set(itertools.chain(*sides)), {(one["row"], one["seed"]) for one in results}
    if any(row == BASE for row, _ in runs):
        rows.discard(BASE)
    return [seed for seed in sorted({seed for _, seed in runs}) if all((row, seed) in runs for row in rows)]


def _difference(
    out: Path, results: list[dict[str, Any]], sides: Comparison, seeds: list[int], measure: Measure
) -> list[np.ndarray]:
    """`measure` of the first side minus the second; each side is the mean over its rows and `seeds`."""
    first, second = (
        measure.read(
            out,
            [one for one in results if one["row"] in side and (one["row"] == BASE or one["seed"] in seeds)],
        )
        for side in sides
    )
    return [a - b for a, b in zip(first, second, strict=True)]


def tables(out: Path, results: list[dict[str, Any]]) -> str:
    """The printed text: the three tables, a note on their intervals, and the judge's own errors."""
    parts = [make_table(out, results) for make_table in (row_table, pooled_table, seed_table)]
    return "\n\n".join([*parts, INTERVALS_NOTE, evaluate.parser_error_line("overall", *RELATION_ROWS)])


@click.command(cls=TpxCommand)
@click.option(
    "--ckpt",
    type=click.Path(path_type=Path),
    default=SHIPPED,
    show_default=True,
    help="Checkpoint whose autoencoder and text encoder are used.",
)
@click.option(
    "--latents",
    type=click.Path(path_type=Path),
    default=Path("runs/latents"),
    show_default=True,
    help="Folder of the training scenes; missing ones are rendered.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/ablation"), show_default=True)
@click.option("--base-steps", type=click.IntRange(1), default=800, show_default=True)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    help="Training steps of each row's adapters.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=96,
    show_default=True,
    help="Batch size of each row's adapters.",
)
@options.rate(1e-3, "Peak learning rate of the adapters.")
@click.option(
    "--images", type=click.IntRange(1), default=2, show_default=True, help="Images per prompt of ShapesEval."
)
@click.option(
    "--limit", type=click.IntRange(1), help="Only the first N prompts of each of ShapesEval's rows."
)
@click.option("--engine", default="auto", show_default=True, help="Engine that runs ShapesEval.")
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help=f"Training seeds of {' and '.join(MAIN_ROWS)}; other rows have one.",
)
@click.option(
    "--shards",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Shards of 2,048 scenes, both for the base and for the adapters.",
)
@click.option(
    "--row", "names", type=click.Choice(list(ROWS)), multiple=True, help="Only these rows.  [default: all]"
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
    """Train and score every row, or those named, and print the tables."""
    resolve(engine)  # raises now rather than after the training
    make_folder(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_frozen(ckpt, device)
    autoencoder, text_encoder = model.autoencoder, model.text_encoder
    base_data, data, fresh = (
        train_flow.TrainingData.load(latents, count, seed, autoencoder, text_encoder, mix)
        for count, seed, mix in (
            (shards, 0, BASE_MIX),
            (shards, 1, ADAPTER_MIX),
            (FRESH_SHARDS, FRESH_SEED, ADAPTER_MIX),
        )
    )
    torch.manual_seed(0)
    untrained = train_flow.new_base(autoencoder, text_encoder, BASE_WIDTH)
    base = train_flow.train_base(
        untrained, base_data, autoencoder, train_flow.TrainingRun(out, base_steps, BASE_BATCH, 0, device)
    )
    base_settings = {"base steps": base_steps, "shards": shards}
    experiment = Experiment(
        out, data, fresh, autoencoder, base, steps, batch, rate, images, limit, engine, device, base_settings
    )
    finished_runs(experiment)  # raises now rather than after a row's training
    runs = [(name, 0) for name in names or ROWS]
    runs += [(name, seed) for name in MAIN_ROWS for seed in range(1, seeds) if name in (names or ROWS)]
    for name, seed in runs:
        run(experiment, name, seed)
        results = finished_runs(experiment)
        write_json(out / "results.json", {"runs": results})
        click.echo(tables(out, results))


if __name__ == "__main__":
    main()
