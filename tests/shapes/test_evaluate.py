"""ShapesEval: the fixed list, its arithmetic, and a run that can be interrupted."""

import json
import random
from collections import Counter
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from samples.shapes import evaluate
from samples.shapes.captions import KINDS, scene_for, vocabulary
from samples.shapes.evaluate import NEVER_SEEN, SEEN, Question, asks_for_held_out, interval, questions, report
from samples.shapes.render import render
from samples.shapes.train_parser import to_uint8
from samples.shapes.world import HELD_OUT, is_held_out
from tpx_runtime.generator import Generator

LIST_SHA256 = "6f4a8b5939f0753747304824cd284fd3681bfe821048353070cd27ffc8210be5"


def test_the_list_is_the_one_that_scores_were_measured_on() -> None:
    asked = questions()
    assert evaluate.fingerprint(asked) == LIST_SHA256
    rows = Counter(question.row for question in asked)
    assert rows == {**dict.fromkeys(KINDS, 92), SEEN: 96, NEVER_SEEN: 96}
    assert len({(question.row, question.text) for question in asked}) == len(asked)


def test_the_model_knows_every_word() -> None:
    known = set(vocabulary())
    for question in questions():
        assert set(question.text.replace(",", " ,").split()) <= known, question.text


def test_only_the_last_row_asks_for_what_training_has_not_seen() -> None:
    rng = random.Random(0)
    held_out = Counter()
    for question in questions():
        assert asks_for_held_out(question.prompt) == (question.row == NEVER_SEEN), question.text
        if question.row == NEVER_SEEN:
            assert is_held_out(scene_for(rng, question.prompt)), question.text
            first = question.prompt.groups[0]
            held_out[first.colour, first.shape, question.prompt.relation] += 1
    assert held_out == dict.fromkeys(HELD_OUT, 8)


def test_interval_covers_the_mean_and_narrows_with_more_prompts() -> None:
    rng = np.random.default_rng(1)
    few, many = ([[(rng.random(4) < 0.7).tolist() for _ in range(n)] for _ in range(6)] for n in (10, 160))
    widths = []
    for verdicts in (few, many):
        score, low, high = interval(verdicts)
        assert low < score < high
        assert score == pytest.approx(np.mean([np.mean(row) for row in verdicts]))
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35)  # sixteen times the prompts
    assert interval([[[True, True]] * 5]) == (1, 1, 1)


def test_overall_is_the_unweighted_mean_of_the_six_kinds() -> None:
    asked, right = [], []
    for number, kind in enumerate(KINDS):
        for _ in range(number + 1):  # kinds of unequal size
            asked.append(Question(kind, questions()[0].prompt, ""))
            right.append([number < 3])
    asked.append(Question(SEEN, asked[0].prompt, ""))
    right.append([False])
    result = report(asked, right)
    assert result["overall"]["score"] == pytest.approx(0.5)
    assert result["overall"]["images"] == 21
    assert result[SEEN]["score"] == 0
    assert NEVER_SEEN not in result


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A generator that draws every prompt right, but "cone" prompts without a scene; the list of what it was asked."""
    asked: list[str] = []
    prompts = {question.text: question.prompt for question in questions()}
    empty = Image.fromarray(to_uint8(render([()]))[0])

    def draw(prompt: str, *, seed: int, num_images: int, **settings: object) -> list[Image.Image]:
        asked.append(prompt)
        if "cone" in prompt:
            return [empty] * num_images
        scene = scene_for(random.Random(seed), prompts[prompt])
        return [Image.fromarray(to_uint8(render([scene]))[0])] * num_images

    generator = create_autospec(Generator, instance=True, side_effect=draw)
    generator.bundle, generator.engine = create_autospec(object), create_autospec(object)
    generator.bundle.hash, generator.engine.name = "b" * 64, "fake"
    monkeypatch.setattr(Generator, "load", lambda path, engine: generator)
    return asked


def run(out: Path, *more: str) -> Result:
    return CliRunner().invoke(evaluate.main, ["--bundle", "none", "--out", str(out), "--limit", "3", *more])


def test_a_run_is_judged_reported_and_shown(drawn: list[str], tmp_path: Path) -> None:
    result = run(tmp_path / "a", "--images", "2")
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "a/report.json").read_text())
    wrong = sum("cone" in text for text in drawn)
    assert 0 < wrong < len(drawn) == 24
    rows = [row for name, row in facts["rows"].items() if name != "overall"]
    assert sum(row["score"] * row["images"] for row in rows) == pytest.approx(2 * (24 - wrong))
    assert f"| {KINDS[0]} | 3 | 6 |" in result.stdout
    page = (tmp_path / "a/index.html").read_text()
    assert page.count("<img") == len(list((tmp_path / "a").glob("*.png"))) == 24
    assert "): 0/2</figcaption>" in page


def test_an_interrupted_run_goes_on_and_ends_the_same(drawn: list[str], tmp_path: Path) -> None:
    whole = run(tmp_path / "a", "--images", "1").stdout.splitlines()[:-1]
    lines = (tmp_path / "a/verdicts.jsonl").read_text().splitlines()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/verdicts.jsonl").write_text("\n".join(lines[:11]) + "\n[tr")  # killed while writing
    drawn.clear()
    assert run(tmp_path / "b", "--images", "1").stdout.splitlines()[:-1] == whole
    assert len(drawn) == 24 - 10
    assert (tmp_path / "b/verdicts.jsonl").read_text().splitlines() == lines


def test_another_run_in_the_same_place_is_refused(drawn: list[str], tmp_path: Path) -> None:
    run(tmp_path / "a", "--images", "1")
    before = (tmp_path / "a/verdicts.jsonl").read_text()
    result = run(tmp_path / "a", "--images", "2")
    assert result.exit_code == 2
    assert "choose another --out" in result.stderr
    assert (tmp_path / "a/verdicts.jsonl").read_text() == before
