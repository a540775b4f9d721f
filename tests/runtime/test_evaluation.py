"""tpx-eval: output layouts for the evaluators, resumed runs, file counts, and paired comparison of reports."""

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
IMAGE_SIZE = (12, 8)  # width, height of the fake bundle's images
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
    """The prompt file of each command."""
    paths = {name: tmp_path / f"{name}.jsonl" for name in COMMANDS}
    for name, lines in (("geneval", GENEVAL_LINES), ("dpg", DPG_LINES)):
        paths[name].write_bytes(b"\n".join(lines) + b"\n")
    return paths


Run = Callable[..., Result]


@pytest.fixture
def run(engine: FakeEngine, fake_bundle: Path, prompts: dict[str, Path]) -> Run:
    def invoke(command: str, out: Path, *options: str, prompts_at: Path | None = None) -> Result:
        path = prompts_at or prompts[command]
        arguments = [
            command,
            "--prompts",
            str(path),
            "--bundle",
            str(fake_bundle),
            "--out",
            str(out),
            *options,
        ]
        return CliRunner().invoke(cli.main, arguments)

    return invoke


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in the folder and below, including hidden ones."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def error_of(result: Result, code: int) -> str:
    """The error line, after a check of the exit code and that there is no traceback."""
    assert result.exit_code == code, (result.output, result.exception)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in result.stderr
    return line


def read_like_geneval(out: Path) -> dict[tuple[str, str], list[str]]:
    """The images that GenEval's evaluator would score, by (folder name, prompt)."""
    images_of = {}
    for folder in sorted(os.listdir(out)):
        if not os.path.isdir(out / folder) or not folder.isdigit():
            continue
        prompt = json.loads((out / folder / "metadata.jsonl").read_text())["prompt"]
        images = os.listdir(out / folder / "samples")
        images_of[folder, prompt] = sorted(name for name in images if re.match(r"\d+\.png", name))
    return images_of


def test_geneval_output_has_the_layout_its_evaluator_reads(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("geneval", out, "--seed", "5")
    assert result.exit_code == 0, result.output
    images = [f"000{i}.png" for i in range(4)]
    assert read_like_geneval(out) == {(f"0000{j}", prompt): images for j, prompt in enumerate(PROMPTS)}
    for number, line in enumerate(GENEVAL_LINES):
        assert (out / f"0000{number}/metadata.jsonl").read_bytes() == line
    assert len(hashes(out)) == 4 * (4 + 1) + 1  # plus tpx-eval.json, which the evaluator ignores
    assert result.stdout == f"complete: all 16 files are in {out}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_image_i_of_each_prompt_has_seed_plus_i(
    run: Run, fake_bundle: Path, engine: FakeEngine, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    assert run(command, out, "--seed", "5", "--steps", "2", "--guidance", "2", "--depth", "4").exit_code == 0
    generator = Generator(Bundle.open(fake_bundle), engine)
    for number, prompt in enumerate(PROMPTS):
        for i in range(4):
            [expected] = generator(prompt, seed=5 + i, steps=2, guidance=2.0, depth=4)
            if command == "geneval":
                with Image.open(out / f"0000{number}/samples/000{i}.png") as found:
                    assert found.tobytes() == expected.tobytes()
                    facts = json.loads(found.info["tpx"])
                    assert (facts["prompt"], facts["seed"]) == (prompt, 5 + i)
                continue
            x, y = i % 2 * IMAGE_SIZE[0], i // 2 * IMAGE_SIZE[1]
            with Image.open(out / f"item_{number}.png") as sheet:
                assert sheet.size == (2 * IMAGE_SIZE[0], 2 * IMAGE_SIZE[1])
                assert (
                    sheet.crop((x, y, x + IMAGE_SIZE[0], y + IMAGE_SIZE[1])).tobytes() == expected.tobytes()
                )


def test_dpg_writes_only_images_into_its_folder(run: Run, tmp_path: Path) -> None:
    result = run("dpg", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert set(os.listdir(tmp_path / "out")) == {f"item_{n}.png" for n in range(4)}
    assert json.loads((tmp_path / "out.tpx-eval.json").read_text())["complete"]
    # Its evaluator cuts grids into squares.
    assert "notice: the evaluator of dpg cannot score images of 12x8 pixels\n" in result.stderr
    assert "cannot score" not in run("geneval", tmp_path / "geneval").stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_byte_order_mark_in_a_prompt_file_is_ignored(
    run: Run, prompts: dict[str, Path], tmp_path: Path, command: str
) -> None:
    assert run(command, tmp_path / "a").exit_code == 0
    prompts[command].write_bytes(b"\xef\xbb\xbf" + prompts[command].read_bytes())
    assert run(command, tmp_path / "b").exit_code == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_dpg_reads_a_folder_of_text_files_like_json_lines(
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


def test_dpg_rejects_a_folder_named_like_a_text_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts/item.txt").mkdir(parents=True)
    result = run("dpg", tmp_path / "out", prompts_at=tmp_path / "prompts")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(
        f"error: expected a prompt in {tmp_path / 'prompts/item.txt'}, found: Is a dir"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_resumed_run_keeps_complete_images_and_regenerates_the_rest(
    run: Run, engine: FakeEngine, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    assert run(command, out).exit_code == 0
    before = hashes(out)
    images = sorted(out.rglob("*.png"))
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:-30])  # truncated
    times = {path: path.stat().st_mtime_ns for path in images[2:]}
    engine.calls.clear()
    result = run(command, out, "--batch-size", "1")  # the batch size changes no image
    assert result.exit_code == 0, result.output
    assert f"{len(images) - 2} of {len(images)} files exist already" in result.stderr
    assert hashes(out) == before
    assert times == {path: path.stat().st_mtime_ns for path in images[2:]}
    decoded = sum(len(inputs["latents"]) for name, inputs in engine.calls if name.startswith("vae"))
    assert decoded == 2 * (1 if command == "geneval" else 4)


def test_is_complete_png_detects_truncated_and_changed_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(noise).save(path)
    complete = path.read_bytes()
    assert is_complete_png(path)
    for length in range(0, len(complete) - 12):  # the last 12 bytes are the end marker, without data
        path.write_bytes(complete[:length])
        assert not is_complete_png(path), length
    for position in range(0, len(complete) - 12, 7):
        path.write_bytes(complete[:position] + bytes([complete[position] ^ 0x55]) + complete[position + 1 :])
        assert not is_complete_png(path), position
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
def test_rejects_other_settings_in_the_same_folder(
    run: Run, tmp_path: Path, command: str, more: tuple[str, ...], found: str
) -> None:
    out = tmp_path / "out"
    assert run(command, out, "--limit", "1").exit_code == 0
    before = hashes(tmp_path)
    assert found in error_of(run(command, out, *more), 2)
    assert hashes(tmp_path) == before


def test_rejects_other_prompts_or_another_engine_in_the_same_folder(
    run: Run, prompts: dict[str, Path], engine: FakeEngine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("geneval", out).exit_code == 0
    engine.name = "another"
    assert "(engine fake), found engine another" in error_of(run("geneval", out), 2)
    engine.name = "fake"
    prompts["geneval"].write_bytes(b"\n".join(GENEVAL_LINES[::-1]))
    assert "(prompts_sha256 " in error_of(run("geneval", out), 2)


def test_explicit_default_settings_are_the_same_run(run: Run, tmp_path: Path) -> None:
    assert run("geneval", tmp_path / "out").exit_code == 0
    again = run("geneval", tmp_path / "out", "--steps", "3", "--sampler", "euler", "--guidance", "3")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_limit_can_change_between_runs(run: Run, tmp_path: Path, command: str) -> None:
    assert run(command, tmp_path / "a", "--limit", "2").exit_code == 0
    limited = hashes(tmp_path / "a")
    assert run(command, tmp_path / "a").exit_code == 0
    assert run(command, tmp_path / "b").exit_code == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert len([name for name in limited if name.endswith(".png")]) == (8 if command == "geneval" else 2)
    shorter = run(command, tmp_path / "a", "--limit", "2")
    assert shorter.exit_code == 0
    assert (
        f"{8 if command == 'geneval' else 2} unexpected files in the folder would be scored too"
        in shorter.stderr
    )


def test_resumable_adds_the_remaining_count_to_an_error_with_own_arguments() -> None:
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
def test_ctrl_c_reports_the_remaining_images_and_the_run_can_resume(
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


def test_an_engine_failure_reports_the_remaining_images(run: Run, engine: FakeEngine, tmp_path: Path) -> None:
    decoder, batches = engine.functions["vae_decoder/model.onnx"], iter(range(99))
    engine.functions["vae_decoder/model.onnx"] = lambda inputs: {
        "image": decoder(inputs)["image"] * (np.nan if next(batches) else 1)
    }
    line = error_of(run("geneval", tmp_path / "a"), 5)
    assert "expected finite numbers in the image" in line
    assert "8 of 16 images are left" in line
    assert len(list((tmp_path / "a").rglob("*.png"))) == 8


@pytest.mark.parametrize("command", [*COMMANDS, "shapes"])
def test_rejects_a_class_conditional_bundle(
    engine: FakeEngine, classes: Path, prompts: dict[str, Path], tmp_path: Path, command: str
) -> None:
    options = ["--prompts", str(prompts[command])] if command in prompts else []
    arguments = [command, *options, "--bundle", str(classes), "--out", str(tmp_path / "out")]
    line = error_of(CliRunner().invoke(cli.main, arguments), 2)
    assert re.search(r"expected a bundle that takes prompts, found \S+, which has \d+ classes;", line)
    assert "--class" not in line and not (tmp_path / "out").exists()
    assert not engine.calls


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """GenEval lines of which the second and the fourth contain words unknown to the model."""
    path = tmp_path / "mixed.jsonl"
    texts = ["a red cube", "a zebra", "a sphere", "a bench and a " * 9]
    path.write_text("\n".join(json.dumps({"tag": "colors", "prompt": text}) for text in texts))
    return path


def test_unreadable_prompts_are_reported_before_any_generation(
    run: Run, engine: FakeEngine, mixed: Path, tmp_path: Path
) -> None:
    line = error_of(run("geneval", tmp_path / "out", prompts_at=mixed), 2)
    assert "found 2 of 4 that it cannot, first 00001 'a zebra'" in line
    assert "--skip-unreadable" in line
    assert not (tmp_path / "out").exists()
    assert not engine.calls


def test_skip_unreadable_names_skipped_prompts_and_generates_the_others(
    run: Run, mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run("geneval", out, "--skip-unreadable", prompts_at=mixed)
    assert result.exit_code == 0, result.output
    assert [folder for folder, _ in read_like_geneval(out)] == ["00000", "00002"]  # numbered as in the file
    assert "skipped 00001 'a zebra'" in result.stderr
    assert "skipped 2 of 4 prompts; the evaluator does not report this" in result.stderr
    record = json.loads((out / "tpx-eval.json").read_text())
    assert next((one["name"], one["prompt"]) for one in record["unreadable"]) == ("00001", "a zebra")
    assert record["prompts"] == {"in the file": 4, "asked": 4, "drawn": 2}
    assert record["files"] == {"expected": 8, "found": 8, "strange": 0}


def test_warnings_about_prompts_are_printed_and_recorded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Generator.plan

    def plan_with_warning(self: Generator, prompt: str, **settings: Any) -> list[Settings]:
        if "on a" in prompt:
            warnings.warn(f"{prompt!r} is cut short", UserWarning, stacklevel=1)
        return plan(self, prompt, **settings)

    monkeypatch.setattr(Generator, "plan", plan_with_warning)
    # Twice, because Python itself would show a repeated warning only once.
    for _ in range(2):
        result = run("geneval", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert (
            "notice: 1 prompts with warnings, first: 'a blue sphere on a cube' is cut short" in result.stderr
        )
    record = json.loads((tmp_path / "out/tpx-eval.json").read_text())
    assert [(one["name"], one["why"]) for one in record["noticed"]] == [
        ("00001", "'a blue sphere on a cube' is cut short")
    ]


def test_rejects_a_file_without_any_readable_prompt(run: Run, mixed: Path, tmp_path: Path) -> None:
    mixed.write_text(
        "\n".join(line for line in mixed.read_text().splitlines() if "zebra" in line or "bench" in line)
    )
    line = error_of(run("geneval", tmp_path / "out", "--skip-unreadable", prompts_at=mixed), 2)
    assert "found 2 of 2 that it cannot" in line
    assert "add --skip-unreadable" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "0"), "expected steps"),
        (("--sampler", "none"), "expected a sampler"),
        (("--depth", "9"), "expected a depth"),
        (("--seed", "-1"), "expected seed"),
        (("--guidance", "nan"), "expected guidance"),
    ],
)
def test_a_bad_setting_is_not_reported_as_an_unreadable_prompt(
    run: Run, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    line = error_of(run("geneval", tmp_path / "out", "--skip-unreadable", *more), 2)
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "missing"), [("geneval", "00001/samples/0002.png"), ("dpg", "item_1.png")]
)
def test_a_missing_image_is_named_and_fails_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, missing: str
) -> None:
    save = generation.save_image
    monkeypatch.setattr(
        generation,
        "save_image",
        lambda image, path: None if str(path).endswith(missing) else save(image, path),
    )
    out = tmp_path / "out"
    count = 16 if command == "geneval" else 4
    line = error_of(run(command, out), 1)
    assert f"expected {count} files in {out}, found {count - 1}, missing {out / missing};" in line
    monkeypatch.undo()


def test_unexpected_images_in_the_folder_are_reported(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("geneval", out).exit_code == 0
    shutil.copytree(out / "00000", out / "00099")
    (out / "notes").mkdir()
    (out / "00000/samples/grid.png").write_bytes(b"")  # the evaluator reads neither this nor notes
    again = run("geneval", out)
    assert again.exit_code == 0
    assert "4 unexpected files in the folder would be scored too: " in again.stderr
    assert json.loads((out / "tpx-eval.json").read_text())["files"]["strange"] == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_rejects_a_folder_with_other_files(run: Run, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "holiday.png").write_bytes(b"mine")
    before = hashes(tmp_path)
    assert "found other files" in error_of(run(command, out), 2)
    assert hashes(tmp_path) == before


def test_a_record_without_its_images_is_ignored(run: Run, tmp_path: Path) -> None:
    assert run("dpg", tmp_path / "out").exit_code == 0
    shutil.rmtree(tmp_path / "out")
    result = run("dpg", tmp_path / "out", "--steps", "2")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out.tpx-eval.json").read_text())["settings"]["steps"] == 2


def test_rejects_a_damaged_record(run: Run, tmp_path: Path) -> None:
    assert run("geneval", tmp_path / "out").exit_code == 0
    (tmp_path / "out/tpx-eval.json").write_text('{"settings": 3}')
    assert "expected the settings of a run" in error_of(run("geneval", tmp_path / "out"), 2)


def test_the_record_contains_all_settings(run: Run, fake_bundle: Path, tmp_path: Path) -> None:
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
def test_rejects_an_invalid_prompt_file_in_one_line(
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
def test_rejects_a_missing_or_empty_prompt_path(run: Run, tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "empty").mkdir()
    error_of(run(command, tmp_path / "out", prompts_at=tmp_path / name), 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_rejects_an_output_path_that_cannot_be_written(
    run: Run, tmp_path: Path, command: str, name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    error_of(run(command, tmp_path / name), 2)
    assert (tmp_path / "file").read_text() == "mine"


class FakeGenerator:
    """A generator that accepts every prompt and returns images of a single colour, which is the seed."""

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


def test_all_geneval_prompts_give_the_expected_layout(tmp_path: Path) -> None:
    path = data("geneval/evaluation_metadata.jsonl")
    generation.run(GENEVAL, read_geneval(path), tmp_path / "out", FakeGenerator())  # type: ignore[arg-type]
    lines = path.read_bytes().splitlines()
    found = read_like_geneval(tmp_path / "out")
    assert len(found) == len(lines) == 553
    assert set(map(tuple, found.values())) == {("0000.png", "0001.png", "0002.png", "0003.png")}
    for number, line in enumerate(lines):
        assert (tmp_path / f"out/{number:05d}/metadata.jsonl").read_bytes() == line
        assert json.dumps(json.loads(line)).encode() == line  # what GenEval's own generator writes


def test_all_dpg_bench_prompts_give_the_expected_layout(tmp_path: Path) -> None:
    path = data("dpg/dpg_prompts.jsonl")
    items = read_dpg(path)
    assert any("\n" in item.prompt for item in items)
    generation.run(DPG, items, tmp_path / "out", FakeGenerator())  # type: ignore[arg-type]
    ids = {json.loads(line)["item_id"] for line in path.read_text(encoding="utf-8").splitlines()}
    assert {name.split(".")[0] for name in os.listdir(tmp_path / "out")} == ids
    assert len(ids) == 1065
    folder = tmp_path / "prompts"  # the official form of the same prompts
    folder.mkdir()
    for item in items:
        (folder / f"{item.name}.txt").write_bytes(item.prompt.encode())
    assert sorted(read_dpg(folder), key=lambda item: item.name) == sorted(items, key=lambda item: item.name)


def test_running_the_module_generates_images_from_a_real_bundle(
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
    assert result.stdout == f"complete: all 2 files are in {out}\n"
    assert "images 8/8" in result.stderr


def test_the_command_line_imports_neither_numpy_nor_an_engine() -> None:
    code = "import sys, tpx_runtime.evaluation.cli; sys.exit(bool({'numpy', 'PIL', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("samples", "found no samples; run `python -m samples.shapes.evaluate` in the checkout"),
        ("samples.shapes.evaluate", "found no samples.shapes.evaluate;"),
    ],
)
def test_shapes_without_its_checkout_gives_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, missing: str, message: str
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=fail))
    assert message in error_of(CliRunner().invoke(cli.main, ["shapes"]), 2)


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
    """Two runs of 200 prompts of very different difficulty; the second is right in 8 more images of each row's 400."""
    rng = np.random.default_rng(3)
    first = {row: np.repeat(rng.random((100, 1)) < 0.5, 4, axis=1) for row in (*ROWS, "extra")}
    second = {row: right.copy() for row, right in first.items()}
    for row in ROWS:
        second[row][np.flatnonzero(~first[row][:, 0])[:8], 0] = True
    (tmp_path / "b").mkdir()
    write_report(tmp_path / "b/report.json", second, steps=5)
    return write_report(tmp_path / "a.json", first), tmp_path / "b"


def test_a_paired_difference_has_a_narrower_interval_than_the_scores(pair: tuple[Path, Path]) -> None:
    a, b = map(Report.load, pair)
    overall = next(line for line in compare(a, b) if line.name == "overall")
    assert overall.change.mean == pytest.approx(overall.second - overall.first) == pytest.approx(8 / 400)
    assert 0 < overall.change.low < 8 / 400 < overall.change.high
    first_shares = [
        np.array([s for s, (r, _) in zip(a.shares, a.prompts, strict=True) if r == row]) for row in ROWS
    ]
    unpaired = bootstrap(first_shares)
    assert overall.change.high - overall.change.low < 0.4 * (unpaired.high - unpaired.low)


def test_compare_prints_each_row_and_the_settings_that_differ(pair: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(cli.main, ["compare", *map(str, pair)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == ["A: steps 20", "B: steps 5"]
    assert [line.split(" | ")[0] for line in lines[5:9]] == ["| one", "| two", "| **overall**", "| extra"]
    assert lines[8].endswith("| +0.0 | +0.0 to +0.0 |")  # equal in both runs
    assert "The overall difference is significant" in lines[-1]
    same = CliRunner().invoke(cli.main, ["compare", str(pair[0]), str(pair[0])])
    assert "is not significant" in same.stdout


def test_a_setting_that_only_one_report_has_is_a_difference(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """But not the hash of the model, which a record has of its weights and a run of its bundle."""
    facts = json.loads(pair[0].read_text())
    for name, more in (("a", {"weights_sha256": "1"}), ("b", {"bundle_sha256": "2", "cache_interval": 4})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**facts, **more}))
    arguments = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.stdout.splitlines()[:2] == ["A: no cache_interval", "B: cache_interval 4"]


def test_two_bundles_are_a_difference(pair: tuple[Path, Path], tmp_path: Path) -> None:
    facts = json.loads(pair[0].read_text())
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps({**facts, "bundle_sha256": name}))
    arguments = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert (
        CliRunner().invoke(cli.main, arguments).stdout.startswith("A: bundle_sha256 a\nB: bundle_sha256 b\n")
    )


def test_runs_of_two_judges_are_not_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    facts = json.loads(pair[0].read_text())
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps({**facts, "parser_sha256": name}))
    arguments = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    message = "expected runs with the same judge, found 'a' and 'b'; run one of them again"
    assert message in error_of(CliRunner().invoke(cli.main, arguments), 2)


@pytest.mark.parametrize("few", [1, MIN_PROMPTS - 1])
def test_too_few_prompts_give_no_interval_and_no_verdict(tmp_path: Path, few: int) -> None:
    """Resampling a single prompt gives an interval of zero width, which would exclude 0."""
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


def test_compare_rejects_runs_with_other_seeds_images_or_prompts(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    first = Report.load(pair[0])
    few = {row: np.ones((3, 4)) for row in ROWS}
    for changes, message in (
        ({"seed": 1}, "the same seed, found 0 and 1"),
        ({"images": 2}, "the same number of images per prompt, found 4 and 2"),
        ({}, "of the same prompts, found 300 and 6"),
    ):
        other = Report.load(write_report(tmp_path / "other.json", few, **changes))
        with pytest.raises(BadInput, match=message):
            compare(first, other)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"3", b'{"prompts": 3, "overall of": ["a"], "rows": {}}', b"\xff", b"[" * 100_000]
    + [b'{"prompts": [], "overall of": ["a"], "rows": {}}', b'{"prompts": [], "overall of": [], "rows": {}}']
    + [b'{"prompts": [{"row": "a", "prompt": "p", "right": []}], "overall of": ["a"], "rows": {}}'],
)
def test_compare_rejects_an_invalid_report_in_one_line(
    pair: tuple[Path, Path], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    error_of(CliRunner().invoke(cli.main, ["compare", str(pair[0]), str(path)]), 2)


def test_compare_rejects_a_missing_report(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, tmp_path / ("x" * 300)):
        error_of(CliRunner().invoke(cli.main, ["compare", str(path), str(pair[0])]), 2)


def test_the_interval_covers_the_true_mean_at_about_its_nominal_rate() -> None:
    rng, covered = np.random.default_rng(5), 0
    for _ in range(200):
        estimate = bootstrap([1.0 * (rng.random(60) < chance) for chance in (0.3, 0.5, 0.9)])
        covered += estimate.low <= (0.3 + 0.5 + 0.9) / 3 <= estimate.high
    assert 0.89 <= covered / 200 <= 0.99


def test_rows_have_equal_weight_regardless_of_size() -> None:
    estimate = bootstrap([np.ones(2), np.zeros(50)])
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, 0.5, 0.5)
