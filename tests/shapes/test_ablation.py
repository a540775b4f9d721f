"""The ablation: comparable rows, runs, and the computation of its tables. Also sweep and deepen."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from samples.shapes import ablation, evaluate, sweep
from samples.shapes.ablation import BASE, LORA, MAIN_ROWS, ROWS, THINKING, TOTAL_RANK, Experiment
from samples.shapes.deepen import deepened
from samples.shapes.train_flow import with_thinking
from tpx_export.model import MMDiT, MMDiTSpec, TextToImage, ThinkingSpec
from tpx_runtime.errors import BadInput
from tpx_runtime.manifest import Defaults

KINDS = ["counting", "colours"]


def test_rows_have_equal_total_rank_and_variants_differ_in_one_setting() -> None:
    specs = {name: spec for name, spec in ROWS.items() if spec}
    total_ranks = {name: spec.experts * spec.rank for name, spec in specs.items()}
    assert {name for name, rank in total_ranks.items() if rank != TOTAL_RANK} == {
        "M=2, T=2, rank 128 each",
        "M=4, T=3, rank 128 each",
    }
    assert ROWS[BASE] is None and set(MAIN_ROWS) == {LORA, THINKING, ablation.RECURSIVE}
    lora = specs[LORA]
    assert (lora.experts, lora.max_depth, lora.modulation) == (1, 1, False)
    assert {(s.experts, s.max_depth) for s in specs.values()} >= {(m, t) for m in (2, 4) for t in (1, 2, 3)}
    for name, switch in (
        ("no modulation", "modulation"),
        ("gate sees tokens alone", "gate_sees_condition"),
        ("base at every step", "base_every_step"),
    ):
        row, main = specs[f"{THINKING}, {name}"], specs[THINKING]
        assert [f for f in vars(row) if getattr(row, f) != getattr(main, f)] == [switch]


@pytest.mark.parametrize("modulation", [True, False])
@pytest.mark.parametrize("experts", [1, 2])
def test_trained_parameters_counts_those_with_a_gradient(experts: int, modulation: bool) -> None:
    torch.manual_seed(0)
    size = {"latent_size": (4, 4), "context_tokens": 3, "context_width": 8, "pooled_width": 8}
    base = MMDiT(MMDiTSpec(**size, width=32, heads=2, blocks=2))  # type: ignore[arg-type]
    spec = ThinkingSpec(blocks=(1,), experts=experts, rank=3, max_depth=2, modulation=modulation)
    model = with_thinking(base, spec).train()
    with torch.no_grad():  # initial zeros would stop gradients
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    prediction, _ = model(torch.randn(2, 4, 4, 4), torch.rand(2), torch.randn(2, 3, 8), torch.randn(2, 8), 2)
    prediction.square().sum().backward()
    trained = [p for p in model.parameters() if p.grad is not None and p.grad.any()]
    assert ablation.trained_parameters(model, spec) == sum(p.numel() for p in trained) > 0


def write_finished_run(
    out: Path,
    row: str,
    seed: int,
    right: list[list[bool]],
    losses: tuple[float, ...] = (0.1,),
    related: tuple[bool, ...] = (False, False, False),
) -> dict[str, Any]:
    """Write the folder of a finished run: two prompts of each of two kinds, three with a relation, and losses by scene."""
    folder = out / f"{len(list(out.iterdir()))}"
    (folder / "eval").mkdir(parents=True)
    np.save(folder / ablation.LOSSES, np.array(losses))
    prompts = [
        {"row": KINDS[i // 2], "prompt": f"prompt {i}", "right": verdict} for i, verdict in enumerate(right)
    ]
    prompts += [
        {"row": kind, "prompt": "related", "right": [verdict] * 2}
        for kind, verdict in zip(ablation.RELATION_ROWS, related, strict=True)
    ]
    score = sum(sum(verdict) / len(verdict) for verdict in right) / len(right)
    rows = {"overall": {"score": score}}
    report = {"list": "x", "images": 2, "seed": 0, "overall of": KINDS, "rows": rows, "prompts": prompts}
    (folder / "eval/report.json").write_text(json.dumps(report))
    facts = {"row": row, "seed": seed, "folder": folder.name, "trained parameters": 7, "rows": rows}
    (folder / "result.json").write_text(json.dumps(facts))
    return facts


def test_the_table_pairs_each_row_with_lora_of_the_same_seeds(tmp_path: Path) -> None:
    yes, half, no = [True, True], [True, False], [False, False]
    results = [
        write_finished_run(tmp_path, BASE, 0, [no, no, yes, yes], (0.3, 0.3)),
        write_finished_run(tmp_path, LORA, 0, [half, no, yes, yes], (0.1, 0.2), (True, False, False)),
        write_finished_run(tmp_path, LORA, 1, [half, half, yes, yes], (0.3, 0.4)),
        write_finished_run(tmp_path, THINKING, 0, [yes, half, yes, yes], (0.05, 0.15), (True, False, True)),
        write_finished_run(tmp_path, THINKING, 1, [yes, yes, yes, yes], (0.15, 0.25)),
    ]
    head, _, *lines = ablation.row_table(tmp_path, results).splitlines()
    cells = {row[1]: dict(zip(_cells(head), row, strict=True)) for row in map(_cells, lines)}
    score, relation, loss = (measure.name for measure in ablation.MEASURES)
    assert cells[BASE][score].startswith("50.0 (")
    # Compared with both seeds of LoRA. The dict keeps the last column of that name, the loss.
    assert cells[BASE]["minus LoRA"].startswith("+50.00 (")
    assert (cells[LORA]["seeds"], cells[LORA]["by seed, %"]) == ("2", "62.5, 75.0")
    assert cells[LORA][score].startswith("68.8 (") and cells[LORA]["minus LoRA"] == ""
    assert cells[LORA][loss].startswith("250.00 (")
    assert cells[THINKING][score].startswith("93.8 (")
    assert "| +25.0 (" in lines[2] and "| -100.00 (-100.00 to -100.00) |" in lines[2]
    assert "| -18.8 (" in lines[0]
    # Three prompts, the mean over two seeds.
    assert [cells[row][relation].split()[0] for row in (BASE, LORA, THINKING)] == ["0.0", "16.7", "33.3"]
    assert "| 33.3 (0.0 to 50.0) | +16.7 (" in lines[2]


def test_pooled_differences_are_means_over_rows_and_common_seeds(tmp_path: Path) -> None:
    yes, no = [[True] * 2] * 4, [[False] * 2] * 4
    results = []
    for row, seed in (*((row, 0) for row in ROWS), (LORA, 1), (THINKING, 1), (ablation.RECURSIVE, 1)):
        recursive = row in (ablation.RECURSIVE, "M=2, T=3") or (row == THINKING and seed == 1)
        losses = (0.1, 0.3) if recursive else (0.2, 0.4)
        results.append(
            write_finished_run(
                tmp_path, row, seed, yes if recursive else no, losses, (recursive, False, False)
            )
        )

    def pooled(subset: list[dict[str, Any]]) -> dict[str, list[str]]:
        lines = map(_cells, ablation.pooled_table(tmp_path, subset).splitlines()[2:])
        return {name: [cell.split(" ")[0] for cell in cells] for _, name, *cells, _ in lines}

    rows = pooled(results)
    assert list(rows) == list(ablation.POOLED_COMPARISONS) and len(rows) == 9
    assert rows["T=3 minus T=1, all M"] == ["1", "+66.7", "+22.2", "-66.67"]
    assert rows["M=4 minus M=2, all T"] == ["1", "-33.3", "-11.1", "+33.33"]
    assert rows["M=4, T=3 minus M=1, T=3"] == ["2", "-50.0", "-16.7", "+50.00"]
    assert rows["M=4, T=3 minus no modulation"] == ["1", "+0.0", "+0.0", "+0.00"]
    assert rows["M=1, T=3 minus base"] == ["2", "+100.0", "+33.3", "-100.00"]
    rows_without_one_run = pooled([result for result in results if result["row"] != "M=2, T=2"])
    assert set(rows) - set(rows_without_one_run) == {"M=4 minus M=2, all T"}


def test_the_seed_table_has_the_difference_of_each_seed_and_an_interval(tmp_path: Path) -> None:
    yes, half, no = [True, True], [True, False], [False, False]
    results = [write_finished_run(tmp_path, BASE, 0, [no] * 4)]
    for seed, (right, scene_loss) in enumerate((([no, no, yes, yes], 0.1), ([half, no, yes, yes], 0.2))):
        results.append(write_finished_run(tmp_path, LORA, seed, [no, no, no, no], (0.3, 0.3)))
        results.append(
            write_finished_run(
                tmp_path, THINKING, seed, right, (scene_loss, scene_loss), (seed == 0, False, False)
            )
        )
    results.append(write_finished_run(tmp_path, THINKING, 2, [no] * 4, (0.1, 0.1)))  # LoRA lacks this seed
    base_minus_lora, row, minus_base = ablation.seed_table(tmp_path, results).splitlines()[2:]
    # The base's one run is paired with every seed of the other side.
    assert _cells(base_minus_lora)[1:3] == ["base minus LoRA", "0, 1"]
    assert _cells(minus_base)[1:4] == [
        "M=4, T=3 minus base",
        "0, 1, 2",
        "+50.0, +62.5, +0.0: +37.5 (-44.7 to +119.7)",
    ]
    _, name, seeds, overall, relations, loss, _ = _cells(row)
    assert (name, seeds) == ("M=4, T=3 minus LoRA", "0, 1")
    # Of two values the interval reaches 12.706 halves of their distance.
    assert overall == "+50.0, +62.5: +56.2 (-23.2 to +135.7)"
    assert relations.startswith("+33.3, +0.0: +16.7 (")
    assert loss.startswith("-200.00, -100.00: -150.00 (")
    text = ablation.tables(tmp_path, results)
    assert row in text and ablation.INTERVALS_NOTE in text and "Parser errors" in text


def test_the_interval_over_seeds_is_that_of_students_t() -> None:
    interval = ablation.mean_over_seeds([1.0, 2.0, 3.0])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.0, -0.484, 4.484), abs=1e-3)
    # More seeds than the list of quantiles has.
    many = ablation.mean_over_seeds([0.0, 1.0] * 20)
    assert many.high - many.mean == pytest.approx(2.262 * np.std([0, 1] * 20, ddof=1) / 40**0.5)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]


def test_a_finished_run_is_skipped_and_rejected_with_other_settings(tmp_path: Path) -> None:
    nothing: Any = None
    data: Any = SimpleNamespace(text_encoder=torch.nn.Linear(2, 2))
    experiment = Experiment(
        tmp_path,
        data,
        nothing,
        nothing,
        nothing,
        6,
        2,
        0.1,
        1,
        None,
        "onnxruntime",
        "cpu",
        {"base steps": 9},
    )
    folder, settings = (
        tmp_path / "LoRA-0",
        {"base steps": 9, "steps": 6, "batch": 2, "rate": 0.1, "images": 1, "engine": "onnxruntime"},
    )
    folder.mkdir()
    text_encoder = experiment.settings["text encoder"]
    facts = {"row": "LoRA", "settings": {**settings, "limit": None, "text encoder": text_encoder}}
    (folder / "result.json").write_text(json.dumps(facts))
    assert ablation.run(experiment, LORA, 0) == facts
    message = (
        r"expected the settings of the run in .*LoRA-0 \(steps 6, images 1\), found steps 7, images 2; use"
    )
    with pytest.raises(BadInput, match=message):
        ablation.run(replace(experiment, steps=7, images=2), LORA, 0)
    with pytest.raises(BadInput, match=r"\(engine onnxruntime\), found engine openvino; use"):
        ablation.run(replace(experiment, engine="openvino"), LORA, 0)
    other: Any = SimpleNamespace(text_encoder=torch.nn.Linear(2, 2))
    with pytest.raises(BadInput, match=rf"\(text encoder {text_encoder}\), found text encoder"):
        ablation.run(replace(experiment, data=other), LORA, 0)
    # From a version that did not record the settings.
    (folder / "result.json").write_text(json.dumps({"row": "LoRA"}))
    with pytest.raises(BadInput, match=r"\(no base steps, no steps"):
        ablation.run(experiment, LORA, 0)


def test_a_row_of_other_settings_is_rejected_before_training_even_if_it_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_encoder = torch.nn.Linear(2, 2)
    data = SimpleNamespace(text_encoder=text_encoder)
    parts = SimpleNamespace(autoencoder=None, text_encoder=text_encoder)
    monkeypatch.setattr(ablation, "load_frozen", lambda *_: parts)
    monkeypatch.setattr(ablation.train_flow.TrainingData, "load", lambda *_: data)
    monkeypatch.setattr(ablation.train_flow, "new_base", lambda *_: None)
    monkeypatch.setattr(ablation.train_flow, "train_base", lambda *_: None)
    monkeypatch.setattr(ablation, "run", lambda *_: pytest.fail("a row was trained"))
    (tmp_path / "base-0").mkdir()
    (tmp_path / "base-0/result.json").write_text(json.dumps({"row": BASE, "settings": {"steps": 6}}))
    result = CliRunner().invoke(ablation.main, ["--row", LORA, "--out", str(tmp_path)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        f"error: expected the settings of the run in {tmp_path / 'base-0'} (steps 6"
    )
    assert not (tmp_path / "results.json").exists()


def test_docs_quote_the_parser_errors_as_printed() -> None:
    page = (Path(__file__).parents[2] / "docs/replication.md").read_text(encoding="utf-8")
    text = " ".join(page.split())
    for rows in (("overall", *ablation.RELATION_ROWS), ("overall",), ("colours",)):
        assert evaluate.parser_error_line(*rows) in text, rows


def test_parse_counts_reads_comma_separated_numbers() -> None:
    assert sweep.parse_counts("4,8") == (4, 8)
    assert sweep.parse_counts(None) == (None,)
    for invalid in ("", "4,", "0", "a"):
        with pytest.raises(BadInput, match="expected whole numbers"):
            sweep.parse_counts(invalid)


def test_a_repeated_cell_is_not_timed_again_and_other_settings_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    timed: list[dict[str, Any]] = []

    def fake_run(folder: Path, generator: object, **arguments: Any) -> None:
        calls.append(arguments)
        # As for another bundle.
        if folder.exists() and arguments != calls[0]:
            raise BadInput("expected the settings of the run")
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(json.dumps({"rows": {"overall": {"score": 0.5}}}))

    monkeypatch.setattr(evaluate, "run", fake_run)
    generator: Any = lambda *prompt, **arguments: timed.append(arguments)  # noqa: E731
    settings = {"sampler": "euler", "depth": 2, "steps": 4, "guidance_interval": (0.2, 0.7)}
    first = sweep.cell(generator, tmp_path, settings, images=1, limit=3)
    assert sweep.cell(generator, tmp_path, settings, images=1, limit=3) == first
    # The second run finds all images already generated.
    assert calls == [{**settings, "images": 1, "limit": 3}] * 2
    assert len(timed) == 3
    with pytest.raises(BadInput, match="expected the settings of the run"):
        sweep.cell(generator, tmp_path, settings, images=2, limit=3)
    assert first["folder"] == "euler-2-4-0.2-0.7"
    assert first["rows"]["overall"]["score"] == 0.5 and first["seconds an image"] >= 0


def test_a_sweep_has_a_cell_for_every_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def cell(generator: object, out: Path, settings: dict[str, Any], **size: Any) -> dict[str, Any]:
        calls.append(settings)
        return {}

    def plan(prompt: str, **settings: Any) -> None:
        if settings["sampler"] == "nope":
            raise BadInput("expected a sampler, found nope")

    defaults = Defaults(sampler="unipc", steps=12, guidance=3.0, depth=3)
    manifest = SimpleNamespace(defaults=defaults, sha256="b" * 64)
    monkeypatch.setattr(sweep.Generator, "load", lambda *_: SimpleNamespace(manifest=manifest, plan=plan))
    monkeypatch.setattr(sweep, "cell", cell)
    monkeypatch.setattr(sweep, "table", lambda *_: "the table")
    flags = ["--bundle", "x", "--out", str(tmp_path), "--steps", "4,8", "--guidance-every", "1,3"]
    flags += ["--cache-interval", "2"]
    result = CliRunner().invoke(sweep.main, flags)
    assert (result.exit_code, result.stdout) == (0, "the table\n")
    common = {
        "sampler": "unipc",
        "depth": 3,
        "guidance": 3.0,
        "guidance_interval": (0.0, 1.0),
        "cache_interval": 2,
    }
    combinations = [(4, 1), (4, 3), (8, 1), (8, 3)]
    assert calls == [{**common, "steps": steps, "guidance_every": every} for steps, every in combinations]
    calls.clear()
    result = CliRunner().invoke(sweep.main, [*flags, "--sampler", "euler", "--sampler", "nope"])
    assert (result.exit_code, result.stderr) == (2, "error: expected a sampler, found nope\n")
    assert calls == []


def test_the_sweep_table_compares_every_cell_with_the_best(tmp_path: Path) -> None:
    cells = []
    for steps, right in ((4, [[False], [True], [True], [True]]), (8, [[True]] * 4)):
        facts = write_finished_run(tmp_path, "x", 0, right)
        (tmp_path / facts["folder"]).joinpath("eval/report.json").rename(
            tmp_path / facts["folder"] / "report.json"
        )
        overall = {**facts["rows"]["overall"], "low": 0.0, "high": 1.0}
        cells.append(
            {"steps": steps, "folder": facts["folder"], "seconds an image": 0.1, "rows": {"overall": overall}}
        )
    lines = sweep.table(tmp_path, cells, ["steps"]).splitlines()
    assert lines[2].startswith("| 4 | 75.0 |") and "| -25.0 |" in lines[2]
    assert lines[3].startswith("| 8 | 100.0 |") and "| +0.0 |" in lines[3]
    assert lines[4:] == ["", evaluate.parser_error_line("overall")]


def test_a_deepened_model_keeps_its_outputs_and_repeats_its_last_step(tiny_model: TextToImage) -> None:
    deep = deepened(tiny_model, 5)
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 100.0]), torch.randn(2, 12, 32), torch.randn(2, 32)
    for depth in (1, 2, 3):
        assert torch.equal(deep.transformer(*inputs, depth)[0], tiny_model.transformer(*inputs, depth)[0])
    shift = deep.transformer.blocks[0].thinking.shift
    assert torch.equal(shift[4], shift[2]) and not torch.equal(shift[2], shift[1])
    assert not torch.equal(deep.transformer(*inputs, 5)[0], deep.transformer(*inputs, 3)[0])
    with pytest.raises(BadInput, match="beyond the model's own 3, found 3"):
        deepened(tiny_model, 3)
