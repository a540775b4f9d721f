"""Plots and image sheets made from files like those of real runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from samples.shapes.plot import main, read_curve
from tpx_runtime.errors import BadInput

PROMPTS = [("colours", "a red cube"), ("position", "a cube on a cone"), ("position", "a cone left of a cube")]


def write_run(folder: Path, shade: int, prompts: list[tuple[str, str]] = PROMPTS) -> str:
    """Write a run with two images per prompt, the first of grey value `shade` plus the prompt's number."""
    folder.mkdir()
    listed = [{"row": row, "prompt": prompt, "right": [True, False]} for row, prompt in prompts]
    report = {
        "list": "x",
        "images": 2,
        "seed": 0,
        "overall of": ["colours", "position"],
        "rows": {},
        "prompts": listed,
    }
    (folder / "report.json").write_text(json.dumps(report))
    for number in range(len(prompts)):
        pair = np.full((4, 12, 3), 255, np.uint8)
        pair[:, :6] = shade + number
        Image.fromarray(pair).save(folder / f"{number:04d}.png")
    return str(folder)


def test_the_sheet_has_the_first_image_of_each_prompt_in_a_row_per_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, shade) for name, shade in (("a", 10), ("b", 20))]
    out = tmp_path / "sheet.png"
    result = CliRunner().invoke(main, ["images", *runs, "--kind", "position", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["a cube on a cone", "a cone left of a cube", str(out)]
    sheet = np.asarray(Image.open(out))[..., 0]
    assert sheet.shape == (8, 12)
    assert sheet[::4, ::6].tolist() == [[11, 12], [21, 22]]


@pytest.mark.parametrize(
    ("kind", "other", "message"),
    [
        ("counting", PROMPTS, "found none of counting"),
        ("position", [PROMPTS[0], PROMPTS[2], PROMPTS[1]], "found other prompts in each"),
    ],
)
def test_runs_that_cannot_be_paired_give_a_one_line_error(
    tmp_path: Path, kind: str, other: list[tuple[str, str]], message: str
) -> None:
    runs = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 0, other)]
    result = CliRunner().invoke(main, ["images", *runs, "--kind", kind, "--out", str(tmp_path / "sheet.png")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("images", [None, 0, "2", True])
def test_a_report_without_the_number_of_images_is_rejected_in_one_line(
    tmp_path: Path, images: object
) -> None:
    run = write_run(tmp_path / "a", 0)
    path = tmp_path / "a/report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": images}))
    result = CliRunner().invoke(main, ["images", run, "--out", str(tmp_path / "sheet.png")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "expected the number of images per prompt in the report of" in result.stderr


def test_read_curve_keeps_the_last_value_of_a_repeated_step(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("50,0.3\n100,0.2\n100,0.25\n150,0.1\n")
    assert read_curve(tmp_path / "a.csv") == {50: 0.3, 100: 0.25, 150: 0.1}
    (tmp_path / "b.csv").write_text("step,loss\n")
    for name in ("b.csv", "none.csv"):
        with pytest.raises(BadInput, match="expected a curve"):
            read_curve(tmp_path / name)


def test_plots_are_written_and_a_wrong_file_gives_an_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "a.csv").write_text("50,0.3\n100,0.2\n")
    overall = {"score": 0.5, "low": 0.4, "high": 0.6}
    cells = [
        {"sampler": "euler", "steps": steps, "seconds an image": 0.1, "rows": {"overall": overall}}
        for steps in (4, 8)
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells}))
    for command in (
        ["curves", "a.csv"],
        ["sweep", "sweep.json", "--against", "steps"],
    ):
        out = tmp_path / f"{command[0]}.png"
        arguments = [str(tmp_path / argument) if "." in argument else argument for argument in command]
        result = CliRunner().invoke(main, [*arguments, "--out", str(out)])
        assert result.exit_code == 0, result.output
        with Image.open(out) as image:
            assert image.width > 300
    result = CliRunner().invoke(
        main, ["sweep", str(tmp_path / "a.csv"), "--against", "steps", "--out", "x.png"]
    )
    assert result.exit_code == 2
    assert result.stderr.startswith("error: expected the sweep.json of `samples.shapes.sweep`")
