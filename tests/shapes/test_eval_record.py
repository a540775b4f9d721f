"""The record of ShapesEval matches the shipped weights, the prompt list and the docs, and runs can be compared with it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from samples.shapes import eval_record
from samples.shapes.eval_record import RECORD, SHIPPED, record
from samples.shapes.evaluate import as_text, report
from samples.shapes.parser import WEIGHTS
from samples.shapes.prompt_list import LIST_NAME, listed_prompts
from tpx_runtime.bundle import hash_file
from tpx_runtime.evaluation.cli import main as tpx_eval

FACTS = json.loads(RECORD.read_text(encoding="utf-8"))
PAGE = (Path(__file__).parents[2] / "docs/shapes-eval.md").read_text(encoding="utf-8")


def test_the_record_belongs_to_the_shipped_weights_and_parser() -> None:
    assert FACTS["weights_sha256"] == hash_file(SHIPPED), "new weights need a new record"
    assert (FACTS["parser_sha256"], FACTS["list"]) == (hash_file(WEIGHTS), LIST_NAME)


def test_the_recorded_scores_follow_from_the_recorded_verdicts() -> None:
    prompts, records = listed_prompts(), FACTS["prompts"]
    assert [(entry["row"], entry["prompt"]) for entry in records] == [
        (listed.row, listed.text) for listed in prompts
    ]
    assert as_text(report(prompts, [entry["right"] for entry in records])) == as_text(FACTS["rows"])


@pytest.mark.parametrize("row", FACTS["rows"])
def test_the_docs_give_the_recorded_scores(row: str) -> None:
    found, name = FACTS["rows"][row], f"**{row}**" if row == "overall" else row
    score, low, high = (f"{100 * found[key]:.1f}" for key in ("score", "low", "high"))
    assert f"| {name} | {found['prompts']} | {score}% ({low} to {high}) |" in PAGE


def test_the_docs_give_the_commands_of_the_recorded_run() -> None:
    assert (FACTS["images"], FACTS["seed"]) == (4, 0)
    run = f"tpx-eval shapes --bundle bundles/shapes --engine {FACTS['engine']} --out out/shapes-eval"
    assert f"    {run}\n    tpx-eval compare samples/shapes/{RECORD.name} out/shapes-eval\n" in PAGE


def test_the_image_caption_in_the_docs_matches_the_record() -> None:
    """The caption names the images that were judged wrong, so the images cannot be of other weights unnoticed."""
    shown = [one for one in FACTS["prompts"] if one["row"] == "counting"][:12]
    wrong = [one["prompt"].removeprefix("a photo of ") for one in shown if not one["right"][0]]
    sentence = (
        f"wrong were asked for {' and '.join(wrong)}." if wrong else "The judge calls all twelve right."
    )
    assert sentence in PAGE


def test_a_run_can_be_compared_with_the_record(tmp_path: Path) -> None:
    run = {key: value for key, value in FACTS.items() if key != "weights_sha256"} | {
        "bundle_sha256": "b" * 64
    }
    less = [{**one, "right": [False, *one["right"][1:]]} for one in FACTS["prompts"]]
    (tmp_path / "report.json").write_text(json.dumps({**run, "prompts": less}))
    result = CliRunner().invoke(tpx_eval, ["compare", str(RECORD), str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "The overall difference is significant" in result.stdout
    (tmp_path / "report.json").write_text(json.dumps(run))
    result = CliRunner().invoke(tpx_eval, ["compare", str(RECORD), str(tmp_path)])
    assert "The overall difference is not significant" in result.stdout
    assert result.stdout.startswith("A: the same settings\nB: the same settings\n")


def test_a_complete_run_is_recorded_and_a_partial_one_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_record, "RECORD", tmp_path / "record.json")
    run = {**FACTS, "bundle_sha256": "b" * 64}
    del run["weights_sha256"]
    (tmp_path / "report.json").write_text(json.dumps(run))
    assert CliRunner().invoke(eval_record.main, [str(tmp_path)]).exit_code == 0
    assert (tmp_path / "record.json").read_bytes() == RECORD.read_bytes()
    assert record(tmp_path, WEIGHTS) != record(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({**run, "limit": 2}))
    result = CliRunner().invoke(eval_record.main, [str(tmp_path)])
    assert result.exit_code == 2
    assert "expected a run of all prompts" in result.stderr and "found --limit 2" in result.stderr


@pytest.mark.parametrize("missing", ["limit", "bundle_sha256"])
def test_a_report_without_its_limit_or_bundle_is_rejected_in_one_line(tmp_path: Path, missing: str) -> None:
    run = {**FACTS, "bundle_sha256": "b" * 64}
    del run[missing]
    (tmp_path / "report.json").write_text(json.dumps(run))
    result = CliRunner().invoke(eval_record.main, [str(tmp_path)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: expected a report with its limit and bundle in ")


def test_a_file_instead_of_a_run_is_rejected_in_one_line() -> None:
    result = CliRunner().invoke(eval_record.main, [str(RECORD)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: expected a report.json at {RECORD / 'report.json'}, found: ")
