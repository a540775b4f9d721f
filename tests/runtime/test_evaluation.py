"""tpx-eval: the layouts that evaluators read, runs that go on, counts, and paired comparison."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tpx_runtime.bundle import Bundle
from tpx_runtime.engine.cuda import OUT_OF_MEMORY, CudaFailed
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation import cli, generation
from tpx_runtime.evaluation.benchmarks import DPG, GENEVAL, read_dpg, read_geneval
from tpx_runtime.evaluation.compare import Report, compare
from tpx_runtime.evaluation.generation import is_complete_png
from tpx_runtime.evaluation.resumable import resumable
from tpx_runtime.evaluation.statistics import MIN_PROMPTS, bootstrap
from tpx_runtime.generator import Generator
from tpx_runtime.settings import Settings

from .fakes import FakeEngine

PROMPTS = ["a red cube", "a blue sphere on a cube", "two cube\n", "a red cube and an blue sphere"]
GENEVAL_LINES = [
    json.dumps({"tag": "colors", "include": [{"class": "cube"}], "prompt": p}).encode() for p in PROMPTS
]
DPG_LINES = [json.dumps({"item_id": f"item_{n}", "prompt": p}).encode() for n, p in enumerate(PROMPTS)]
COMMANDS = ("geneval", "dpg")
SIDES = (12, 8)  # width, height of the fake bundle's images
DATA = Path(os.environ.get("TPX_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The engine behind Generator.load."""
    fake = FakeEngine()
    monkeypatch.setattr(
        Generator, "load", lambda path, name="auto": Generator(Bundle.open(path, verify=False), fake)
    )
    return fake


@pytest.fixture
def prompts(tmp_path: Path) -> dict[str, Path]:
    """The prompts' file of each command."""
    paths = {name: tmp_path / f"{name}.jsonl" for name in COMMANDS}
    for name, lines in (("geneval", GENEVAL_LINES), ("dpg", DPG_LINES)):
        paths[name].write_bytes(b"\n".join(lines) + b"\n")
    return paths


Run = Callable[..., Result]


@pytest.fixture
def run(engine: FakeEngine, fake_bundle: Path, prompts: dict[str, Path]) -> Run:
    def invoke(command: str, out: Path, *more: str, prompts_at: Path | None = None) -> Result:
        asked = prompts_at or prompts[command]
        arguments = [command, "--prompts", str(asked), "--bundle", str(fake_bundle), "--out", str(out), *more]
        return CliRunner().invoke(cli.main, arguments)

    return invoke


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def error_of(result: Result, code: int) -> str:
    """The one line of an error; more would be a traceback."""
    assert result.exit_code == code, (result.output, result.exception)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in result.stderr
    return line


def as_geneval_reads(out: Path) -> dict[tuple[str, str], list[str]]:
    """What GenEval's evaluator would score: of each folder's (name, prompt) the images."""
    found = {}
    for folder in sorted(os.listdir(out)):
        if not os.path.isdir(out / folder) or not folder.isdigit():
            continue
        prompt = json.loads((out / folder / "metadata.jsonl").read_text())["prompt"]
        images = os.listdir(out / folder / "samples")
        found[folder, prompt] = sorted(p for p in images if re.match(r"\d+\.png", p))
    return found


def test_geneval_is_laid_out_as_its_evaluator_reads_it(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("geneval", out, "--seed", "5")
    assert result.exit_code == 0, result.output
    images = [f"000{i}.png" for i in range(4)]
    assert as_geneval_reads(out) == {(f"0000{j}", prompt): images for j, prompt in enumerate(PROMPTS)}
    for number, line in enumerate(GENEVAL_LINES):
        assert (out / f"0000{number}/metadata.jsonl").read_bytes() == line
    assert len(hashes(out)) == 4 * (4 + 1) + 1  # and tpx-eval.json, where no evaluator looks
    assert result.stdout == f"expected 16 files in {out}, found 16\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_image_i_of_each_prompt_is_that_of_seed_plus_i(
    run: Run, fake_bundle: Path, engine: FakeEngine, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    assert run(command, out, "--seed", "5", "--steps", "2", "--guidance", "2", "--depth", "4").exit_code == 0
    generator = Generator(Bundle.open(fake_bundle), engine)
    for number, prompt in enumerate(PROMPTS):
        for i in range(4):
            [wanted] = generator(prompt, seed=5 + i, steps=2, guidance=2.0, depth=4)
            if command == "geneval":
                with Image.open(out / f"0000{number}/samples/000{i}.png") as found:
                    assert found.tobytes() == wanted.tobytes()
                    facts = json.loads(found.info["tpx"])
                    assert (facts["prompt"], facts["seed"]) == (prompt, 5 + i)
                continue
            x, y = i % 2 * SIDES[0], i // 2 * SIDES[1]
            with Image.open(out / f"item_{number}.png") as sheet:
                assert sheet.size == (2 * SIDES[0], 2 * SIDES[1])
                assert sheet.crop((x, y, x + SIDES[0], y + SIDES[1])).tobytes() == wanted.tobytes()


def test_dpg_puts_nothing_but_images_into_its_folder(run: Run, tmp_path: Path) -> None:
    result = run("dpg", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert set(os.listdir(tmp_path / "out")) == {f"item_{n}.png" for n in range(4)}
    assert json.loads((tmp_path / "out.tpx-eval.json").read_text())["complete"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_a_prompt(
    run: Run, prompts: dict[str, Path], tmp_path: Path, command: str
) -> None:
    assert run(command, tmp_path / "a").exit_code == 0
    prompts[command].write_bytes(b"\xef\xbb\xbf" + prompts[command].read_bytes())
    assert run(command, tmp_path / "b").exit_code == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_dpg_reads_a_folder_of_texts_like_json_lines(
    run: Run, prompts: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for number, prompt in enumerate(PROMPTS):
        (folder / f"item_{number}.txt").write_bytes((b"", b"\xef\xbb\xbf")[number % 2] + prompt.encode())
    (folder / "readme.md").write_text("not a prompt")
    assert read_dpg(folder) == read_dpg(prompts["dpg"])
    assert [item.prompt for item in read_dpg(folder)] == PROMPTS  # line breaks kept
    assert run("dpg", tmp_path / "a", prompts_at=folder).exit_code == 0
    assert run("dpg", tmp_path / "b").exit_code == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_whole_is_kept_and_the_rest_drawn_the_same(
    run: Run, engine: FakeEngine, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    assert run(command, out).exit_code == 0
    before = hashes(out)
    images = sorted(out.rglob("*.png"))
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:-30])  # copied by halves
    times = {path: path.stat().st_mtime_ns for path in images[2:]}
    engine.calls.clear()
    result = run(command, out, "--batch-size", "1")  # which changes no image
    assert result.exit_code == 0, result.output
    assert f"{len(images) - 2} of {len(images)} files exist already" in result.stderr
    assert hashes(out) == before
    assert times == {path: path.stat().st_mtime_ns for path in images[2:]}
    decoded = sum(len(inputs["latents"]) for name, inputs in engine.calls if name.startswith("vae"))
    assert decoded == 2 * (1 if command == "geneval" else 4)


def test_an_image_that_is_cut_or_changed_anywhere_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    assert is_complete_png(path)
    for length in range(0, len(whole) - 12):  # the last 12 bytes are the end mark, which says nothing
        path.write_bytes(whole[:length])
        assert not is_complete_png(path), length
    for place in range(0, len(whole) - 12, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        assert not is_complete_png(path), place
    assert not is_complete_png(tmp_path)
    assert not is_complete_png(tmp_path / "none.png")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("more", "found"),
    [
        (("--steps", "2"), "(steps 3), found steps 2;"),
        (("--seed", "1"), "(seed 0), found seed 1;"),
        (("--sampler", "heun", "--depth", "1"), "(sampler euler, depth 2), found sampler heun, depth 1;"),
        (("--images", "2"), "(images 4), found images 2;"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    run: Run, tmp_path: Path, command: str, more: tuple[str, ...], found: str
) -> None:
    out = tmp_path / "out"
    assert run(command, out, "--limit", "1").exit_code == 0
    before = hashes(tmp_path)
    assert found in error_of(run(command, out, *more), 2)
    assert hashes(tmp_path) == before


def test_other_prompts_another_bundle_or_engine_in_the_same_folder_are_refused(
    run: Run, prompts: dict[str, Path], engine: FakeEngine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("geneval", out).exit_code == 0
    engine.name = "another"
    assert "(engine fake), found engine another" in error_of(run("geneval", out), 2)
    engine.name = "fake"
    prompts["geneval"].write_bytes(b"\n".join(GENEVAL_LINES[::-1]))
    assert "(prompts_sha256 " in error_of(run("geneval", out), 2)


def test_naming_the_default_settings_is_the_same_run(run: Run, tmp_path: Path) -> None:
    assert run("geneval", tmp_path / "out").exit_code == 0
    again = run("geneval", tmp_path / "out", "--steps", "3", "--sampler", "euler", "--guidance", "3")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_limit_can_grow(run: Run, tmp_path: Path, command: str) -> None:
    assert run(command, tmp_path / "a", "--limit", "2").exit_code == 0
    few = hashes(tmp_path / "a")
    assert run(command, tmp_path / "a").exit_code == 0
    assert run(command, tmp_path / "b").exit_code == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert len([name for name in few if name.endswith(".png")]) == (8 if command == "geneval" else 2)
    shorter = run(command, tmp_path / "a", "--limit", "2")
    assert shorter.exit_code == 0
    assert (
        f"{8 if command == 'geneval' else 2} unexpected files in the folder would be scored too"
        in shorter.stderr
    )


def test_an_error_with_arguments_of_its_own_says_how_many_are_left_too() -> None:
    def run() -> None:
        with resumable(16) as advance:
            advance(6)
            raise CudaFailed("cuMemAlloc", OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY")

    with pytest.raises(CudaFailed) as caught:
        run()
    assert str(caught.value) == (
        "expected CUDA's cuMemAlloc to succeed, found CUDA_ERROR_OUT_OF_MEMORY; generate fewer images at once, or close "
        "other programs; 10 of 16 images are left; run the same command again to resume"
    )
    assert caught.value.code == OUT_OF_MEMORY


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_says_how_many_are_left_and_the_run_goes_on(
    run: Run, engine: FakeEngine, tmp_path: Path, command: str
) -> None:
    decoder, batches = engine.functions["vae_decoder/model.onnx"], iter(range(99))

    def interrupted(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if next(batches) == 1:
            raise KeyboardInterrupt
        return decoder(inputs)

    engine.functions["vae_decoder/model.onnx"] = interrupted
    line = error_of(run(command, tmp_path / "a"), 130)
    assert "8 of 16 images are left; run the same command again to resume" in line
    assert not [name for name in hashes(tmp_path) if name.endswith(".part")]
    record = tmp_path / ("a/tpx-eval.json" if command == "geneval" else "a.tpx-eval.json")
    assert not json.loads(record.read_text())["complete"]
    result = run(command, tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert json.loads(record.read_text())["complete"]
    assert run(command, tmp_path / "b").exit_code == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_an_engine_that_fails_half_way_says_what_is_left(
    run: Run, engine: FakeEngine, tmp_path: Path
) -> None:
    decoder, batches = engine.functions["vae_decoder/model.onnx"], iter(range(99))
    engine.functions["vae_decoder/model.onnx"] = lambda inputs: {
        "image": decoder(inputs)["image"] * (np.nan if next(batches) else 1)
    }
    line = error_of(run("geneval", tmp_path / "a"), 5)
    assert "expected finite numbers in the image" in line
    assert "8 of 16 images are left" in line
    assert len(list((tmp_path / "a").rglob("*.png"))) == 8


@pytest.mark.parametrize("command", [*COMMANDS, "shapes"])
def test_a_bundle_of_classes_is_refused_for_what_it_is(
    engine: FakeEngine, classes: Path, prompts: dict[str, Path], tmp_path: Path, command: str
) -> None:
    asked = ["--prompts", str(prompts[command])] if command in prompts else []
    arguments = [command, *asked, "--bundle", str(classes), "--out", str(tmp_path / "out")]
    line = error_of(CliRunner().invoke(cli.main, arguments), 2)
    assert re.search(r"expected a bundle that takes prompts, found \S+, which has \d+ classes;", line)
    assert "--class" not in line and not (tmp_path / "out").exists()
    assert not engine.calls


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """GenEval lines of which the second and the fourth hold words that the model does not know."""
    path = tmp_path / "mixed.jsonl"
    texts = ["a red cube", "a zebra", "a sphere", "a bench and a " * 9]
    path.write_text("\n".join(json.dumps({"tag": "colors", "prompt": text}) for text in texts))
    return path


def test_unreadable_prompts_are_found_before_anything_is_drawn(
    run: Run, engine: FakeEngine, mixed: Path, tmp_path: Path
) -> None:
    line = error_of(run("geneval", tmp_path / "out", prompts_at=mixed), 2)
    assert "found 2 of 4 that it cannot, first 00001 'a zebra'" in line
    assert "--skip-unreadable" in line
    assert not (tmp_path / "out").exists()
    assert not engine.calls


def test_skipped_prompts_are_named_and_the_others_drawn(run: Run, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("geneval", out, "--skip-unreadable", prompts_at=mixed)
    assert result.exit_code == 0, result.output
    assert [folder for folder, _ in as_geneval_reads(out)] == ["00000", "00002"]  # numbers of the file
    assert "skipped 00001 'a zebra'" in result.stderr
    assert "skipped 2 of 4 prompts; the evaluator does not report this" in result.stderr
    record = json.loads((out / "tpx-eval.json").read_text())
    assert next((one["name"], one["prompt"]) for one in record["unreadable"]) == ("00001", "a zebra")
    assert record["prompts"] == {"in the file": 4, "asked": 4, "drawn": 2}
    assert record["files"] == {"expected": 8, "found": 8, "strange": 0}


def test_what_the_model_says_of_a_prompt_is_told_and_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Generator.plan

    def cuts(self: Generator, prompt: str, **settings: Any) -> list[Settings]:
        if "on a" in prompt:
            warnings.warn(f"{prompt!r} is cut short", UserWarning, stacklevel=1)
        return plan(self, prompt, **settings)

    monkeypatch.setattr(Generator, "plan", cuts)
    for _ in range(2):  # again, for Python would say the same warning but once
        result = run("geneval", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert (
            "notice: 1 prompts with warnings, first: 'a blue sphere on a cube' is cut short" in result.stderr
        )
    record = json.loads((tmp_path / "out/tpx-eval.json").read_text())
    assert [(one["name"], one["why"]) for one in record["noticed"]] == [
        ("00001", "'a blue sphere on a cube' is cut short")
    ]


def test_a_model_that_reads_no_prompt_draws_none(run: Run, mixed: Path, tmp_path: Path) -> None:
    mixed.write_text(
        "\n".join(line for line in mixed.read_text().splitlines() if "zebra" in line or "bench" in line)
    )
    line = error_of(run("geneval", tmp_path / "out", "--skip-unreadable", prompts_at=mixed), 2)
    assert "found 2 of 2 that it cannot" in line
    assert "add --skip-unreadable" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--steps", "0"), "expected steps"),
        (("--sampler", "none"), "expected a sampler"),
        (("--depth", "9"), "expected a depth"),
        (("--seed", "-1"), "expected seed"),
        (("--guidance", "nan"), "expected guidance"),
    ],
)
def test_a_bad_setting_is_not_called_an_unreadable_prompt(
    run: Run, tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    line = error_of(run("geneval", tmp_path / "out", "--skip-unreadable", *more), 2)
    assert line.startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "place"), [("geneval", "00001/samples/0002.png"), ("dpg", "item_1.png")])
def test_a_missing_image_is_named_and_the_run_fails(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str
) -> None:
    save = generation.save_png
    monkeypatch.setattr(
        generation, "save_png", lambda image, path: None if str(path).endswith(place) else save(image, path)
    )
    out = tmp_path / "out"
    count = 16 if command == "geneval" else 4
    line = error_of(run(command, out), 1)
    assert f"expected {count} files in {out}, found {count - 1}, missing {out / place};" in line
    monkeypatch.undo()


def test_images_that_no_run_asked_for_are_told(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("geneval", out).exit_code == 0
    shutil.copytree(out / "00000", out / "00099")
    (out / "notes").mkdir()
    (out / "00000/samples/grid.png").write_bytes(b"")  # neither is read
    again = run("geneval", out)
    assert again.exit_code == 0
    assert "4 unexpected files in the folder would be scored too: " in again.stderr
    assert json.loads((out / "tpx-eval.json").read_text())["files"]["strange"] == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_others_is_refused(run: Run, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "holiday.png").write_bytes(b"mine")
    before = hashes(tmp_path)
    assert "found other files" in error_of(run(command, out), 2)
    assert hashes(tmp_path) == before


def test_a_record_without_its_images_binds_nobody(run: Run, tmp_path: Path) -> None:
    assert run("dpg", tmp_path / "out").exit_code == 0
    shutil.rmtree(tmp_path / "out")
    result = run("dpg", tmp_path / "out", "--steps", "2")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out.tpx-eval.json").read_text())["settings"]["steps"] == 2


def test_a_damaged_record_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("geneval", tmp_path / "out").exit_code == 0
    (tmp_path / "out/tpx-eval.json").write_text('{"settings": 3}')
    assert "expected the settings of a run" in error_of(run("geneval", tmp_path / "out"), 2)


def test_the_record_says_what_was_drawn_with_what(run: Run, fake_bundle: Path, tmp_path: Path) -> None:
    assert run("geneval", tmp_path / "out", "--steps", "2", "--seed", "7").exit_code == 0
    settings = json.loads((tmp_path / "out/tpx-eval.json").read_text())["settings"]
    assert len(settings.pop("prompts_sha256")) == 64
    assert settings == {
        "benchmark": "geneval",
        "bundle": "fake",
        "bundle_sha256": Bundle.open(fake_bundle).manifest.sha256,
        "engine": "fake",
        "sampler": "euler",
        "steps": 2,
        "guidance": 3.0,
        "guidance_interval": [0.0, 1.0],
        "guidance_every": 1,
        "cache_interval": 1,
        "strength": None,
        "depth": 2,
        "seed": 7,
        "images": 4,
    }


GOOD_ID = '{"item_id": "%s", "prompt": "a cube"}\n'


@pytest.mark.parametrize(
    ("command", "content"),
    [
        ("geneval", b""),
        ("geneval", b"\n\n"),
        ("geneval", b"a red cube\n"),
        ("geneval", b'{"tag": "colors"}\n'),
        ("geneval", b'{"tag": "colors", "prompt": 3}\n'),
        ("geneval", b'["prompt"]\n'),
        ("geneval", b'{"tag": "colors", "prompt": "\xff"}\n'),
        ("geneval", b"[" * 100_000),
        ("geneval", DPG_LINES[0]),
        ("dpg", GENEVAL_LINES[0]),
        ("dpg", (GOOD_ID % "../up").encode()),
        ("dpg", (GOOD_ID % "").encode()),
        ("dpg", (GOOD_ID % "a.b").encode()),
        ("dpg", (GOOD_ID % "-rf").encode()),
        ("dpg", (GOOD_ID % "/etc/x").encode()),
        ("dpg", (GOOD_ID % ("x" * 101)).encode()),
        ("dpg", (GOOD_ID % "Aa" + GOOD_ID % "aA").encode()),
    ],
)
def test_what_are_no_prompts_is_refused_in_one_line(
    run: Run, tmp_path: Path, command: str, content: bytes
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    before = hashes(tmp_path)
    line = error_of(run(command, tmp_path / "out", prompts_at=path), 2)
    assert len(line) < 400
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["none.jsonl", "empty", "x" * 300])
def test_prompts_that_are_not_there_are_refused(run: Run, tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "empty").mkdir()
    error_of(run(command, tmp_path / "out", prompts_at=tmp_path / name), 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_places_that_cannot_be_written_are_refused(run: Run, tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    error_of(run(command, tmp_path / name), 2)
    assert (tmp_path / "file").read_text() == "mine"


class ReadsAll:
    """A generator that reads every prompt and draws one-coloured images, whose colour is the seed."""

    manifest = SimpleNamespace(name="all", sha256="a" * 64)
    engine = SimpleNamespace(name="fake")

    def plan(self, prompt: str, *, seed: int, num_images: int, **settings: object) -> list[Settings]:
        return [Settings(prompt, "", seed + i, 1, 1.0, "euler", 1) for i in range(num_images)]

    def generate(self, jobs: list[Settings], batch_size: int) -> Iterator[Image.Image]:
        return (Image.new("RGB", (4, 4), (job.seed, 0, 0)) for job in jobs)


def data(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"needs {name} in $TPX_DATA")
    return DATA / name


def test_all_of_genevals_prompts_make_its_layout(tmp_path: Path) -> None:
    path = data("geneval/evaluation_metadata.jsonl")
    generation.run(GENEVAL, read_geneval(path), tmp_path / "out", ReadsAll())  # type: ignore[arg-type]
    lines = path.read_bytes().splitlines()
    read = as_geneval_reads(tmp_path / "out")
    assert len(read) == len(lines) == 553
    assert set(map(tuple, read.values())) == {("0000.png", "0001.png", "0002.png", "0003.png")}
    for number, line in enumerate(lines):
        assert (tmp_path / f"out/{number:05d}/metadata.jsonl").read_bytes() == line
        assert json.dumps(json.loads(line)).encode() == line  # what GenEval's own generator writes


def test_all_of_dpg_benchs_prompts_make_its_layout(tmp_path: Path) -> None:
    path = data("dpg/dpg_prompts.jsonl")
    items = read_dpg(path)
    assert any("\n" in item.prompt for item in items)
    generation.run(DPG, items, tmp_path / "out", ReadsAll())  # type: ignore[arg-type]
    ids = {json.loads(line)["item_id"] for line in path.read_text(encoding="utf-8").splitlines()}
    assert {name.split(".")[0] for name in os.listdir(tmp_path / "out")} == ids
    assert len(ids) == 1065
    folder = tmp_path / "prompts"  # the official form of the same prompts
    folder.mkdir()
    for item in items:
        (folder / f"{item.name}.txt").write_bytes(item.prompt.encode())
    assert sorted(read_dpg(folder), key=lambda item: item.name) == sorted(items, key=lambda item: item.name)


def test_a_real_bundle_is_drawn_by_the_module_that_is_run(
    tiny_bundle: Path, prompts: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["dpg", "--prompts", prompts["dpg"], "--bundle", tiny_bundle, "--out", out]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tpx_runtime.evaluation.cli",
            *map(str, arguments),
            "--limit",
            "2",
            "--engine",
            "onnxruntime",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"expected 2 files in {out}, found 2\n"
    assert "images 8/8" in result.stderr


def test_reading_the_arguments_needs_neither_numpy_nor_an_engine() -> None:
    code = "import sys, tpx_runtime.evaluation.cli; sys.exit(bool({'numpy', 'PIL', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("missing", "code", "said"),
    [
        ("samples", 2, "found no samples; run `python -m samples.shapes.evaluate` in the checkout"),
        ("samples.shapes.evaluate", 2, "found no samples.shapes.evaluate;"),
        ("onnxruntime", 4, "pip install 'tpx[cpu]'"),
    ],
)
def test_shapes_without_its_checkout_or_engine_is_one_line(
    monkeypatch: pytest.MonkeyPatch, missing: str, code: int, said: str
) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=refuse))
    assert said in error_of(CliRunner().invoke(cli.main, ["shapes"]), code)


ROWS = ("one", "two")


def write_report(path: Path, right: dict[str, np.ndarray], **changes: object) -> Path:
    """A report.json as `tpx-eval shapes` writes it; right[row][prompt, image]."""
    prompts = [
        {"row": row, "prompt": f"{row} {number}", "right": [bool(one) for one in verdict]}
        for row, verdicts in right.items()
        for number, verdict in enumerate(verdicts)
    ]
    facts = {"list": "L", "bundle": "b", "steps": 20, "images": 4, "seed": 0, "overall of": list(ROWS)}
    path.write_text(json.dumps({**facts, "rows": {}, "prompts": prompts, **changes}))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of 200 prompts of very unequal difficulty; the second is right in 8 more images of each row's 400."""
    rng = np.random.default_rng(3)
    first = {row: np.repeat(rng.random((100, 1)) < 0.5, 4, axis=1) for row in (*ROWS, "extra")}
    second = {row: right.copy() for row, right in first.items()}
    for row in ROWS:
        second[row][np.flatnonzero(~first[row][:, 0])[:8], 0] = True
    (tmp_path / "b").mkdir()
    write_report(tmp_path / "b/report.json", second, steps=5)
    return write_report(tmp_path / "a.json", first), tmp_path / "b"


def test_a_paired_difference_is_seen_where_the_scores_scatter_more(pair: tuple[Path, Path]) -> None:
    a, b = map(Report.load, pair)
    overall = next(line for line in compare(a, b) if line.name == "overall")
    assert overall.change.mean == pytest.approx(overall.second - overall.first) == pytest.approx(8 / 400)
    assert 0 < overall.change.low < 8 / 400 < overall.change.high
    alone = [np.array([s for s, (r, _) in zip(a.shares, a.prompts, strict=True) if r == row]) for row in ROWS]
    unpaired = bootstrap(alone)
    assert overall.change.high - overall.change.low < 0.4 * (unpaired.high - unpaired.low)


def test_compare_prints_each_row_and_what_differs(pair: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(cli.main, ["compare", *map(str, pair)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == ["A: steps 20", "B: steps 5"]
    assert [line.split(" | ")[0] for line in lines[5:9]] == ["| one", "| two", "| **overall**", "| extra"]
    assert lines[8].endswith("| +0.0 | +0.0 to +0.0 |")  # alike there
    assert "The overall difference is significant" in lines[-1]
    same = CliRunner().invoke(cli.main, ["compare", str(pair[0]), str(pair[0])])
    assert "is not significant" in same.stdout


@pytest.mark.parametrize("few", [1, MIN_PROMPTS - 1])
def test_too_few_prompts_have_no_interval_and_no_verdict(tmp_path: Path, few: int) -> None:
    """The bootstrap of one prompt draws it again and again: an interval of no width leaves out 0."""
    right = {"one": np.zeros((few, 4)), "two": np.zeros((MIN_PROMPTS, 4))}
    write_report(tmp_path / "a.json", right)
    right["one"] = np.repeat([[1, 1, 0, 0]], few, axis=0)
    right["two"] = np.ones((MIN_PROMPTS, 4))
    write_report(tmp_path / "b.json", right)
    result = CliRunner().invoke(cli.main, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert result.exit_code == 0, result.output
    one, two, overall = result.stdout.splitlines()[5:8]
    assert one.endswith("| +50.0 | too few prompts |") and overall.endswith("| +75.0 | too few prompts |")
    assert two.endswith("| +100.0 | +100.0 to +100.0 |")
    assert (
        "The significance of the overall difference is unknown: expected at least 20 prompts in each row"
        in result.stdout
    )
    assert f"found {few};" in result.stdout


def test_runs_that_do_not_pair_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first = Report.load(pair[0])
    few = {row: np.ones((3, 4)) for row in ROWS}
    for changes, said in (
        ({"seed": 1}, "the same seed, found 0 and 1"),
        ({"images": 2}, "the same images"),
        ({}, "of the same prompts, found 300 and 6"),
    ):
        other = Report.load(write_report(tmp_path / "other.json", few, **changes))
        with pytest.raises(BadInput, match=said):
            compare(first, other)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"3", b'{"prompts": 3, "overall of": ["a"], "rows": {}}', b"\xff", b"[" * 100_000]
    + [b'{"prompts": [], "overall of": ["a"], "rows": {}}', b'{"prompts": [], "overall of": [], "rows": {}}']
    + [b'{"prompts": [{"row": "a", "prompt": "p", "right": []}], "overall of": ["a"], "rows": {}}'],
)
def test_what_is_no_report_is_refused_in_one_line(
    pair: tuple[Path, Path], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    error_of(CliRunner().invoke(cli.main, ["compare", str(pair[0]), str(path)]), 2)


def test_a_report_that_is_not_there_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, tmp_path / ("x" * 300)):
        error_of(CliRunner().invoke(cli.main, ["compare", str(path), str(pair[0])]), 2)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, inside = np.random.default_rng(5), 0
    for _ in range(200):
        estimate = bootstrap([1.0 * (rng.random(60) < chance) for chance in (0.3, 0.5, 0.9)])
        inside += estimate.low <= (0.3 + 0.5 + 0.9) / 3 <= estimate.high
    assert 0.89 <= inside / 200 <= 0.99


def test_rows_weigh_alike_whatever_their_size() -> None:
    estimate = bootstrap([np.ones(2), np.zeros(50)])
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, 0.5, 0.5)
