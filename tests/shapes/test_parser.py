"""The scene parser on new renders, and the scores computed with it."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from samples.shapes import score, train_parser
from samples.shapes.captions import Prompt, caption, satisfies, scene_for
from samples.shapes.parser import CELLS, RECORD, WEIGHTS, Parser, decode, peaks
from samples.shapes.render import render
from samples.shapes.train import SHIPPED
from samples.shapes.train_parser import (
    ParserNetwork,
    evaluate_parser,
    evaluation_set,
    export,
    hard_negative,
    random_pair,
    reconstruct,
    to_uint8,
)
from samples.shapes.world import COLOURS, HELD_OUT, INVERSE, MAX_OBJECTS, SHAPES, SIDE_PX, Scene
from tpx_runtime.generator import Generator

EVALUATION_SIZE = 128
PROMPTS = score.SINGLES + score.PAIRS
# For each prompt, another one.
WRONG_PROMPTS = dict(zip(PROMPTS, PROMPTS[1:] + PROMPTS[:1], strict=True))


@pytest.fixture(scope="module")
def parser() -> Parser:
    return Parser.load()


def test_the_record_names_the_options_that_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, weights = tmp_path / "parser.json", tmp_path / "parser.onnx"
    monkeypatch.setattr(train_parser, "RECORD", record)
    monkeypatch.setattr(train_parser, "WEIGHTS", weights)
    monkeypatch.setattr(train_parser, "train", lambda out, **_: None)
    monkeypatch.setattr(train_parser, "export", lambda network, path: path.touch())
    monkeypatch.setattr(train_parser.Parser, "load", lambda: None)
    monkeypatch.setattr(train_parser, "evaluation_set", lambda count, seed: ([], torch.zeros(1, 3, 1, 1)))
    monkeypatch.setattr(train_parser, "evaluate_parser", lambda *_: {"satisfied": 1.0})
    options = ["--out", str(tmp_path), "--steps", "7", "--images", "3"]
    result = CliRunner().invoke(train_parser.main, options)
    assert result.exit_code == 0, result.output
    command = f"python -m samples.shapes.train_parser --out {tmp_path} --steps 7 --images 3"
    assert json.loads(record.read_text()) == {"command": command, "fresh renders": 3, "satisfied": 1.0}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_failed_export_keeps_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_half(model: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    weights = tmp_path / "parser.onnx"
    weights.write_bytes(b"before")
    monkeypatch.setattr(train_parser.onnx, "save", save_half)
    with pytest.raises(OSError, match="No space"):
        export(ParserNetwork().eval(), weights)
    assert weights.read_bytes() == b"before" and list(tmp_path.iterdir()) == [weights]


def pixels(scenes: list[Scene]) -> np.ndarray:
    return to_uint8(render(scenes))


def shapes_and_colours(scenes: list[Scene]) -> list[list[tuple[str, str]]]:
    return [sorted((obj.shape, obj.colour) for obj in scene) for scene in scenes]


def heat_with(*values: tuple[int, int, float]) -> np.ndarray:
    """A heat map [1, CELLS, CELLS] that is 0 except for the given (row, column, value)."""
    heat = np.zeros((1, CELLS, CELLS), np.float32)
    for row, column, value in values:
        heat[0, row, column] = value
    return heat


def test_parses_new_renders(parser: Parser) -> None:
    # parser.json records at least 99% on 2048 renders. On 128 renders the standard deviation is 0.9%, so a threshold
    # two of them lower, 97%, still detects a parser that is clearly worse.
    pairs, image = evaluation_set(EVALUATION_SIZE, seed=7, fast=False)
    result = evaluate_parser(parser, pairs, to_uint8(image), seed=7)
    assert result["satisfied"] >= 0.97, result
    assert result["same objects"] >= 0.97, result
    assert result["refused"] >= 0.99, result


def test_the_recorded_accuracy_meets_the_requirements() -> None:
    record = json.loads(RECORD.read_text())
    assert record["fresh renders"] >= 2000
    assert min(record["same objects"], record["satisfied"], record["refused"]) >= 0.99
    assert WEIGHTS.stat().st_size < 3_000_000


def test_the_empty_ground_is_parsed_as_an_empty_scene(parser: Parser) -> None:
    assert parser.parse(pixels([()])) == [()]


def test_arrays_images_and_batches_give_the_same_result(parser: Parser) -> None:
    rng = random.Random(1)
    array = pixels([random_pair(rng)[1] for _ in range(3)])
    large = [Image.fromarray(one.repeat(2, axis=0).repeat(2, axis=1)) for one in array]
    expected = shapes_and_colours(parser.parse(array, batch_size=2))
    assert expected == shapes_and_colours(parser.parse([Image.fromarray(one) for one in array]))
    assert expected == shapes_and_colours(parser.parse(large))
    assert parser.parse([]) == []


def test_rejects_arrays_of_another_size(parser: Parser) -> None:
    with pytest.raises(ValueError, match="expected images uint8"):
        parser.parse(np.zeros((1, 64, 64, 3), np.uint8))


def test_peaks_are_local_maxima_highest_first() -> None:
    heat = heat_with((0, 0, 0.7), (10, 10, 0.9), (10, 11, 0.8), (20, 31, 0.95), (25, 5, 0.1))
    assert peaks(heat) == [[(20, 31), (10, 10), (0, 0)]]


def test_too_many_objects_give_one_peak_more_than_the_maximum() -> None:
    heat = heat_with(*((5, 4 * i, 0.9 - 0.01 * i) for i in range(MAX_OBJECTS + 3)))
    assert len(peaks(heat)[0]) == MAX_OBJECTS + 1


def test_decode_reads_every_output_at_the_peak() -> None:
    shape = np.zeros((1, len(SHAPES), CELLS, CELLS), np.float32)
    colour = np.zeros((1, len(COLOURS), CELLS, CELLS), np.float32)
    place = np.zeros((1, 4, CELLS, CELLS), np.float32)
    shape[0, 3, 8, 9], colour[0, 5, 8, 9], place[0, :, 8, 9] = 1, 1, (0.25, 0.5, -1.0, 0.5)
    [[obj]] = decode(heat_with((8, 9, 1.0)), shape, colour, place)
    assert (obj.shape, obj.colour) == ("cone", "blue")
    assert (obj.x, obj.y, obj.z, obj.size) == (0.25, 0.5, -1.0, 0.5)


def test_a_scene_does_not_satisfy_its_hard_negative() -> None:
    rng = random.Random(3)
    for _ in range(200):
        prompt, scene = random_pair(rng)
        assert not satisfies(scene, hard_negative(rng, prompt, scene))


@pytest.fixture(scope="module")
def rendered() -> dict[Prompt, Image.Image]:
    """A render of each prompt of the score, as from a perfect generator."""
    rng = random.Random(5)
    scenes = [scene_for(rng, prompt) for prompt in PROMPTS]
    return {prompt: Image.fromarray(one) for prompt, one in zip(PROMPTS, pixels(scenes), strict=True)}


def test_score_judges_images(parser: Parser, rendered: dict[Prompt, Image.Image]) -> None:
    rows = [
        score.judge(parser, prompt, [rendered[prompt], rendered[other]])
        for prompt, other in WRONG_PROMPTS.items()
    ]
    assert all(row.right == [True, False] for row in rows)
    assert score.percent(rows, score.SINGLES) == score.percent(rows, score.PAIRS) == 50
    side = SIDE_PX + 2 * score.FRAME_PX
    assert score.contact_sheet(rows).size == (2 * side, side * len(PROMPTS))


@pytest.mark.parametrize(("required", "code"), [((), 0), (("90", "60"), 1), (("80", "60"), 0)])
def test_score_command(
    rendered: dict[Prompt, Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    required: tuple[str, ...],
    code: int,
) -> None:
    """A generator that fails on one of five single objects scores 80% on them and 100% on pairs."""
    images = {caption(prompt): image for prompt, image in rendered.items()}
    images["a red cube"] = images["a green cone"]

    def generate(prompt: str, *, num_images: int, **settings: object) -> list[Image.Image]:
        return [images[prompt]] * num_images

    # Raises for arguments that Generator does not have.
    generator = create_autospec(Generator, instance=True, side_effect=generate)
    load = create_autospec(Generator.load, return_value=generator)
    monkeypatch.setattr(Generator, "load", load)
    out = tmp_path / "page.png"
    arguments = ["--bundle", "none", "--seeds", "2", "--out", str(out)]
    result = CliRunner().invoke(score.main, [*arguments, *(("--require", *required) if required else ())])
    assert result.exit_code == code, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["a", "red", "cube", "0/2"] in lines
    assert ["a", "red", "cube", "on", "a", "blue", "sphere", "2/2"] in lines
    assert ["single", "objects", "80.0%", "(required", "97%)"] in lines
    assert ["pairs", "100.0%", "(required", "85%)"] in lines
    assert out.exists()
    load.assert_called_once_with(Path("none"), "auto")
    assert generator.call_args.kwargs == {"num_images": 2, "steps": None, "guidance": None, "depth": None}


def test_make_score_requires_over_two_thirds_of_the_shipped_models_scores() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert f"--require {score.REQUIRED_PERCENT[0]:.0f} {score.REQUIRED_PERCENT[1]:.0f}\n" in makefile
    page = (Path(__file__).parents[2] / "docs/sample-model.md").read_text(encoding="utf-8")
    shipped_scores = [
        float(score_percent)
        for score_percent in re.findall(r"^\| \*\*.*\*\* \| \*\*(.*)%\*\* \|$", page, re.MULTILINE)
    ]
    assert len(shipped_scores) == 2
    for score_percent, required in zip(shipped_scores, score.REQUIRED_PERCENT, strict=True):
        assert score_percent * 2 / 3 < required < score_percent


def test_score_prompts_have_no_held_out_combination() -> None:
    for prompt in score.PAIRS:
        a, b = prompt.groups
        assert prompt.relation
        assert (a.colour, a.shape, prompt.relation) not in HELD_OUT, caption(prompt)
        assert (b.colour, b.shape, INVERSE[prompt.relation]) not in HELD_OUT, caption(prompt)


def test_score_does_not_import_torch() -> None:
    code = "import sys, samples.shapes.score, tpx_runtime.generator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_exported_network_matches_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ParserNetwork().eval()
    export(network, tmp_path / "parser.onnx")
    content = (tmp_path / "parser.onnx").read_bytes()
    assert b".py" not in content and b"eye.stem.0.weight" in content
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE_PX, SIDE_PX, 3), np.uint8)
    session = ort.InferenceSession(tmp_path / "parser.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"image": images})
    with torch.no_grad():
        heat, *expected = network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    for output, value in zip(outputs, (heat.sigmoid(), *expected), strict=True):
        np.testing.assert_allclose(output, value.numpy(), atol=1e-4)


def test_parses_renders_reconstructed_by_the_shipped_autoencoder(parser: Parser) -> None:
    pairs, image = evaluation_set(16, seed=7, fast=False)
    reconstructed = reconstruct(SHIPPED, image)
    assert reconstructed.min() >= 0 and reconstructed.max() <= 1
    assert evaluate_parser(parser, pairs, to_uint8(reconstructed), seed=7)["same objects"] >= 0.8


def test_weights_contain_no_source_file_names() -> None:
    assert b".py" not in WEIGHTS.read_bytes()
