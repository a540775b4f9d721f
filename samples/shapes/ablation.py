"""Does recursive sparse reasoning follow the prompt better than LoRA, and LoRA better than the base? (arXiv 2604.25299)

    python -m samples.shapes.ablation --out runs/ablation

Autoencoder and text encoder are the sample model's own. One base, trained for a seventh of the sample model's steps so that
it has something left to learn, is frozen. Each row of `ROWS` then trains adapters on it: the same data in the same order,
the same steps, the same number of trained parameters in experts (M r is constant), at its own fixed depth. Each is exported
and judged by ShapesEval. `--out` holds a folder a run, with its state, its curve, its pictures and its verdicts, and
results.json; what is finished is not done again, so a stopped run goes on and more seeds can be added.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from samples.shapes import evaluate, train_flow
from samples.shapes.train import SHIPPED, assemble, trained
from tpx_export.exporter import export_bundle
from tpx_export.model import ThinkingSpec
from tpx_export.model.autoencoder import Autoencoder
from tpx_export.model.mmdit import MMDiT
from tpx_export.pipeline import Pipeline
from tpx_runtime.cli import TpxCommand
from tpx_runtime.evaluation.compare import Report
from tpx_runtime.evaluation.record import write_json
from tpx_runtime.evaluation.statistics import bootstrap
from tpx_runtime.generator import Generator

WHOLE_RANK = 128  # M r of every row
BASE, LORA, THINKING = "base", "LoRA", "M=4, T=3"


def _thinking(experts: int, depth: int, **switches: bool) -> ThinkingSpec:
    return ThinkingSpec(experts=experts, rank=WHOLE_RANK // experts, max_depth=depth, **switches)


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
    "M=1, T=3": _thinking(1, 3),
}
MAIN = (LORA, THINKING)  # the rows that are trained with every seed


@dataclass(frozen=True)
class Work:
    """What every run shares."""

    out: Path
    data: train_flow.Data
    autoencoder: Autoencoder
    base: MMDiT
    steps: int
    batch: int
    images: int
    limit: int | None
    device: str


def run(work: Work, name: str, seed: int) -> dict[str, Any]:
    """Train, export and judge one row with one seed; the facts of results.json."""
    folder = work.out / (name.replace("=", "").replace(", ", "-").replace(" ", "-") + f"-{seed}")
    record = folder / "result.json"
    if record.exists():
        return dict(json.loads(record.read_text()))
    spec, began = ROWS[name], time.monotonic()
    transformer, trained = work.base, 0
    if spec:
        told = train_flow.Run(folder, work.steps, work.batch, seed, work.device)
        transformer = train_flow.train_adapters(
            work.base, work.data, work.autoencoder, told, spec, depths=(spec.max_depth,)
        )
        trained = trained_parameters(transformer, spec)
    seconds = time.monotonic() - began
    bundle = folder / "bundle"
    model = assemble(work.autoencoder, work.data.text_encoder, transformer.cpu())
    export_bundle(Pipeline.of(model), bundle, force=True)
    drawn = Generator.load(bundle, "onnxruntime", verify=False)
    evaluate.run(folder / "eval", drawn, images=work.images, limit=work.limit)
    shutil.rmtree(bundle)
    facts = {
        "row": name,
        "seed": seed,
        "folder": folder.name,
        "steps": work.steps if spec else 0,
        "batch": work.batch,
        "trained parameters": trained,
        "seconds of training": round(seconds),
        "spec": asdict(spec) if spec else None,
        "rows": json.loads((folder / "eval/report.json").read_text())["rows"],
    }
    write_json(record, facts)
    return facts


def trained_parameters(transformer: MMDiT, spec: ThinkingSpec) -> int:
    """What `with_thinking` leaves to train."""
    fixed = () if spec.modulation else (".scale", ".shift")
    named = transformer.state_dict().items()
    return sum(value.numel() for name, value in named if ".thinking." in name and not name.endswith(fixed))


def shares(out: Path, facts: list[dict[str, Any]]) -> list[np.ndarray]:
    """Of each kind the parts of right pictures by prompt, [prompts], the mean over seeds."""
    reports = [Report.load(out / one["folder"] / "eval") for one in facts]
    first = reports[0]
    mean = np.mean([report.shares for report in reports], axis=0)
    rows = np.array([row for row, _ in first.prompts])
    return [mean[rows == kind] for kind in first.overall]


def table(out: Path, results: list[dict[str, Any]]) -> str:
    """Each row's score in percent with its interval, each seed's, and the paired difference to LoRA."""
    lines = [
        "| | trained | seeds | overall | 95% interval | by seed | minus LoRA, same seeds | 95% interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_name = {name: [one for one in results if one["row"] == name] for name in ROWS}
    for name, found in by_name.items():
        if not found:
            continue
        score = bootstrap(shares(out, found))
        each = ", ".join(f"{100 * one['rows']['overall']['score']:.1f}" for one in found)
        difference = "| | |"
        seeds = {one["seed"] for one in found}
        beside = [one for one in by_name[LORA] if one["seed"] in seeds]
        if name != LORA and beside:
            mine = [one for one in found if one["seed"] in {other["seed"] for other in beside}]
            pairs = zip(shares(out, mine), shares(out, beside), strict=True)
            change = bootstrap([a - b for a, b in pairs])
            difference = f"| {100 * change.mean:+.1f} | {100 * change.low:+.1f} to {100 * change.high:+.1f} |"
        lines.append(
            f"| {name} | {found[0]['trained parameters']:,} | {len(found)} | {100 * score.mean:.1f} "
            f"| {100 * score.low:.1f} to {100 * score.high:.1f} | {each} {difference}"
        )
    return "\n".join(lines)


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
@click.option("--base-steps", default=1000, show_default=True)
@click.option("--steps", default=400, show_default=True, help="Of each row's adapters.")
@click.option("--batch", default=96, show_default=True)
@click.option("--images", default=2, show_default=True, help="Pictures a prompt of ShapesEval.")
@click.option(
    "--limit", type=click.IntRange(1), help="Only the first N prompts of each of ShapesEval's rows."
)
@click.option("--seeds", default=3, show_default=True, help=f"Of {' and '.join(MAIN)}; other rows have one.")
@click.option("--shards", default=48, show_default=True, help="Pools of 2,048 scenes to learn from.")
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
    images: int,
    limit: int | None,
    seeds: int,
    shards: int,
    names: tuple[str, ...],
) -> None:
    """Train and judge every row, or those named, and print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = trained(ckpt, device)
    autoencoder, text_encoder = model.autoencoder, model.text_encoder
    data = train_flow.Data.load(latents, shards, 0, autoencoder, text_encoder)
    base = train_flow.train_base(data, autoencoder, train_flow.Run(out, base_steps, batch, 0, device))
    work = Work(out, data, autoencoder, base, steps, batch, images, limit, device)
    wanted = [(name, 0) for name in names or ROWS]
    wanted += [(name, seed) for name in MAIN for seed in range(1, seeds) if name in (names or ROWS)]
    for name, seed in wanted:
        run(work, name, seed)
        results = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
        text = table(out, results)
        write_json(out / "results.json", {"runs": results})
        click.echo(text)


if __name__ == "__main__":
    main()
