"""Invalid input to the commands in samples/shapes gives a one-line error before any work is done."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from samples.shapes import deepen, parser_errors, plot, score_classes
from samples.shapes.plot import read_sweep
from tpx_runtime.errors import BadInput

OVERALL = {"score": 0.5, "low": 0.4, "high": 0.6}
CELL = {"sampler": "euler", "steps": 4, "depth": 3, "seconds an image": 0.1, "rows": {"overall": OVERALL}}
REPORT = {
    "list": "x",
    "images": 1,
    "seed": 0,
    "overall of": ["counting"],
    "rows": {},
    "prompts": [{"row": "counting", "prompt": "two cubes", "right": [True]}],
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A valid loss log, a valid sweep, and a valid run of ShapesEval without its images."""
    (tmp_path / "a.csv").write_text("50,0.3\n")
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": [CELL]}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.json").write_text(json.dumps(REPORT))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.pt").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("curves a.csv --out none/x.png", "expected a folder none to write x.png into, found none"),
        ("curves a.csv --out x.foo", "expected an output name that ends in .png, found x.foo"),
        ("curves a.csv --out folder.png", "expected folder.png to be a file, found a folder"),
        ("sweep sweep.json --against steps --out none/x.png", "expected a folder none"),
        ("images run --kind counting --out none/x.png", "expected a folder none"),
        ("images run --kind counting --out x.png", "expected the images of run beside its report"),
        ("images run --first 0 --out x.png", "Invalid value for '--first'"),
    ],
)
def test_plot_rejects_invalid_arguments_and_writes_nothing(
    files: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    result = CliRunner().invoke(plot.main, command.split())
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert sorted(files.rglob("*")) == before


def test_plot_rejects_an_unreadable_image(files: Path) -> None:
    (files / "run/0000.png").write_text("mine")
    arguments = ["images", str(files / "run"), "--kind", "counting", "--out", str(files / "x.png")]
    result = CliRunner().invoke(plot.main, arguments)
    assert result.exit_code == 2 and "found something else at" in result.stderr


@pytest.mark.parametrize("missing", ["sampler", "steps", "seconds an image", "rows", None])
def test_read_sweep_rejects_cells_without_the_plotted_values(files: Path, missing: str | None) -> None:
    assert read_sweep(files / "sweep.json", "steps")[0].x == 4
    few = {**CELL, "rows": {"overall": {"score": 0.5, "low": None, "high": None}}}
    (files / "sweep.json").write_text(json.dumps({"cells": [few]}))
    [cell] = read_sweep(files / "sweep.json", "steps")
    assert cell.score == 50 and math.isnan(cell.low) and math.isnan(cell.high)
    cells = [{key: value for key, value in CELL.items() if key != missing}] if missing else []
    (files / "sweep.json").write_text(json.dumps({"cells": cells}))
    with pytest.raises(BadInput, match="with cells that have steps, found none"):
        read_sweep(files / "sweep.json", "steps")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("none/x.safetensors", "expected a folder none to write x.safetensors into, found none; make it"),
        ("folder.pt", "expected folder.pt to be a file, found a folder"),
        ("x.foo", "expected --out ending in .safetensors or .pt, found x.foo"),
    ],
)
def test_deepen_rejects_an_invalid_output_path(
    files: Path, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    monkeypatch.chdir(files)
    result = CliRunner().invoke(deepen.main, ["--ckpt", str(deepen.__file__), "--out", out])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_score_classes_checks_the_output_folder_before_the_bundle(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    result = CliRunner().invoke(score_classes.main, ["--bundle", "none", "--json", "none/x.json"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: expected a folder none to write x.json into, found none; make it")


@pytest.mark.parametrize(
    ("module", "option"),
    [("ablation", name) for name in ("base-steps", "steps", "batch", "images", "seeds", "shards", "limit")]
    + [("train", name) for name in ("text-steps", "adapter-steps", "batch", "shards")]
    + [("train_classes", name) for name in ("steps", "adapter-steps", "batch")]
    + [("train_parser", name) for name in ("steps", "images")]
    + [("sweep", "images"), ("score", "seeds"), ("score_classes", "seeds"), ("parser_errors", "renders")],
)
def test_rejects_a_count_of_zero(module: str, option: str) -> None:
    command = importlib.import_module(f"samples.shapes.{module}").main
    result = CliRunner().invoke(command, [f"--{option}", "0"])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: Invalid value for '--{option}'")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (module, "--rate nan", "expected a finite --rate above 0, found nan")
        for module in ("ablation", "train")
    ]
    + [
        ("train", f"--rate {rate}", f"expected a finite --rate above 0, found {rate}")
        for rate in ("0.0", "-1.0", "inf")
    ]
    + [
        (module, f"--seed {2**31}", "Invalid value for '--seed'")
        for module in ("train", "train_classes", "train_parser")
    ]
    + [(module, "--device tpu", "expected --device cpu or cuda") for module in ("train", "train_classes")],
)
def test_training_rejects_other_values_before_it_makes_a_folder(
    tmp_path: Path, module: str, arguments: str, message: str
) -> None:
    command = importlib.import_module(f"samples.shapes.{module}").main
    result = CliRunner().invoke(command, [*arguments.split(), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["ablation", "train", "train_classes", "train_parser"])
def test_rejects_a_file_as_the_output_folder(files: Path, module: str) -> None:
    command = importlib.import_module(f"samples.shapes.{module}").main
    result = CliRunner().invoke(command, ["--out", str(files / "a.csv")])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: expected a folder to write into at {files / 'a.csv'}, found: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("until", ["autoencoder", "text"])
def test_training_from_a_checkpoint_has_a_stage_to_train(tmp_path: Path, until: str) -> None:
    command = importlib.import_module("samples.shapes.train").main
    arguments = ["--start", "x.pt", "--until", until, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: expected --until base or adapters with --start")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["score", "score_classes", "parser_errors"])
def test_the_judge_without_onnx_runtime_is_a_one_line_error(tmp_path: Path, module: str) -> None:
    code = "import sys, runpy; sys.modules['onnxruntime'] = None; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, f"samples.shapes.{module}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 4 and result.stderr.splitlines()[-1] == (
        "error: expected onnxruntime, which runs the judge of ShapesEval, found none; pip install 'tpx[cpu]'"
    )


def test_a_record_of_parser_errors_that_cannot_be_written_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser_errors, "ERRORS", tmp_path / "none/errors.json")
    monkeypatch.setattr(parser_errors, "measure", lambda *_: {})
    result = CliRunner().invoke(parser_errors.main, [])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: expected to write {tmp_path / 'none/errors.json'}, found: ")


def test_the_ablation_checks_its_engine_before_it_trains(tmp_path: Path) -> None:
    command = importlib.import_module("samples.shapes.ablation").main
    result = CliRunner().invoke(command, ["--engine", "none", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.stderr.startswith("error: expected an engine of ")
    assert not (tmp_path / "out").exists()
