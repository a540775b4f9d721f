"""The commands tpx-run, tpx-verify and tpx-info: output and exit codes on success and for each kind of error."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import tpx_runtime
from tpx_runtime import cli, options
from tpx_runtime.bundle import GOLDEN, Bundle
from tpx_runtime.engine import ENGINES, Arrays, Engine
from tpx_runtime.errors import BadInput, EngineFailed
from tpx_runtime.evaluation.cli import main as evaluation
from tpx_runtime.generator import Generator, ImageResized
from tpx_runtime.image_files import save_image
from tpx_runtime.metadata import settings_in
from tpx_runtime.options import find_bundle
from tpx_runtime.output_files import choose_output_files
from tpx_runtime.sampling import SAMPLERS_FOR
from tpx_runtime.tokenizer import Encoding
from tpx_runtime.verified import RECORD
from tpx_runtime.verify import PartReport, load_golden

from .fakes import CLASSES, THREE_ENCODERS, FakeEngine, seal, vae_decoder, vae_encoder, without_encoder

PROMPT = "a red cube on a blue sphere"
DEFAULT_NAME = "a-red-cube-on-a-blue-sphere-0.png"


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every test in an empty folder, where no bundle is found by default."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TPX_BUNDLE", raising=False)
    monkeypatch.setattr(options, "SAMPLE_BUNDLE", Path("no/such/bundle"))
    return folder


@pytest.fixture
def default_bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TPX_BUNDLE", str(tiny_bundle))
    return tiny_bundle


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.run, [str(argument) for argument in arguments])


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(cli.verify, [str(argument) for argument in arguments])


def assert_error(result: Result, exit_code: int, message: str) -> None:
    """Check for one error line on stderr that contains `message`, nothing on stdout, and the exit code."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == exit_code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert result.stdout == ""


# tpx-run: successful runs


def test_stdout_has_only_the_path_and_stderr_the_progress(default_bundle: Path, workdir: Path) -> None:
    result = run(PROMPT)
    assert result.exit_code == 0
    assert result.stdout == f"{DEFAULT_NAME}\n"
    assert re.fullmatch(
        r"engine: onnxruntime \(chosen by auto\)\ndenoising 0/4  loading\ndenoising 4/4  decoding\n",
        result.stderr,
    )
    with Image.open(DEFAULT_NAME) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
        facts = json.loads(image.text["tpx"])
        assert image.text["parameters"].startswith(
            f"{PROMPT}\nSteps: 4, Sampler: euler, CFG scale: 2.0, Seed: 0"
        )
    assert facts["prompt"] == PROMPT
    assert facts["bundle_sha256"] == Bundle.open(default_bundle).hash
    assert [path.name for path in workdir.iterdir()] == [DEFAULT_NAME]


def test_gives_the_same_image_as_the_generator(default_bundle: Path) -> None:
    options = {"seed": 5, "steps": 3, "guidance": 1.5, "sampler": "dpmpp2m", "depth": 2}
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += ["--guidance-interval", "0", "0.9", "--guidance-every", "2", "--cache-interval", "3"]
    result = run(PROMPT, *flags, "--negative-prompt", "green", "--out", "a.png", "--engine", "onnxruntime")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "engine: onnxruntime"
    assert "notice" not in result.stderr
    (expected,) = Generator.load(default_bundle, "onnxruntime")(
        PROMPT,
        negative_prompt="green",
        guidance_interval=(0.0, 0.9),
        guidance_every=2,
        cache_interval=3,
        **options,
    )  # type: ignore[arg-type]
    with Image.open("a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
        facts = json.loads(image.text["tpx"])
    assert options.items() <= facts.items()
    assert (facts["guidance_interval"], facts["guidance_every"]) == ([0.0, 0.9], 2)
    assert facts["cache_interval"] == 3
    assert facts["negative_prompt"] == "green"


def test_several_images_form_a_grid_with_consecutive_seeds(default_bundle: Path) -> None:
    assert run(PROMPT, "-n", 3, "--seed", 7, "--steps", 2, "--out", "a.png").exit_code == 0
    single = Generator.load(default_bundle, "onnxruntime")(PROMPT, seed=8, steps=2)[0]
    with Image.open("a.png") as image:
        assert image.size == (128, 128)
        second = np.asarray(image)[:64, 64:].astype(int)
        assert (np.asarray(image)[64:, 64:] == 255).all()
        assert json.loads(image.text["tpx"])["seed"] == 7
    assert np.abs(second - np.asarray(single)).max() <= 1


def test_batch_size_sets_how_many_images_are_generated_at_once(
    fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    use_engine(monkeypatch, engine)
    command = ("red cube", "--bundle", fake_bundle, "-n", 3, "--out", "a.png")
    assert run(*command, "--batch-size", 2).exit_code == 0
    decoded = [len(inputs["latents"]) for name, inputs in engine.calls if name.startswith("vae_decoder")]
    assert decoded == [2, 1]
    assert len(engine.opened) == len(set(engine.opened))  # graphs are kept for the second batch
    assert_error(run(*command, "--force", "--batch-size", 0), 2, "'--batch-size': 0 is not in the range")


def test_a_single_batch_keeps_one_graph_in_memory_at_a_time(
    fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory: list[list[str]] = []
    engine = FakeEngine(
        {"vae_decoder/model.onnx": lambda x: (in_memory.append(engine.alive), vae_decoder(x))[1]}
    )
    use_engine(monkeypatch, engine)
    assert (
        run("red cube", "--bundle", fake_bundle, "-n", 2, "--batch-size", 2, "--out", "a.png").exit_code == 0
    )
    assert in_memory == [["vae_decoder/model.onnx"]]


def test_seed_in_the_output_name_writes_one_file_per_image(default_bundle: Path, workdir: Path) -> None:
    command = (PROMPT, "-n", 3, "--seed", 7, "--steps", 2, "--batch-size", 2, "--out", "a-{seed}.png")
    result = run(*command)
    assert result.stdout.split() == ["a-7.png", "a-8.png", "a-9.png"]
    assert run(PROMPT, "--seed", 8, "--steps", 2, "--out", "alone.png").exit_code == 0
    for seed in (7, 8, 9):
        with Image.open(f"a-{seed}.png") as image, Image.open("alone.png") as single:
            assert json.loads(image.info["tpx"])["seed"] == seed
            difference = np.abs(np.asarray(image).astype(int) - np.asarray(single)).max()
            assert difference <= 1 if seed == 8 else difference > 1
    Path("a-7.png").unlink()
    assert_error(
        run(*command), 2, "expected a new file, found a-8.png there already; replace it with --force"
    )
    assert not Path("a-7.png").exists()
    assert run("red cube", "--bundle", default_bundle, "--out", "b-{seed}.png").stdout == "b-0.png\n"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A  red, cube!", "a-red-cube-0.png"),
        ("красный куб", "красный-куб-0.png"),
        ("cafe\u0301 \U0001f40e 赤い", "café-赤い-0.png"),
        ("\U0001f40e", "image-0.png"),
        ("हिन्दी घोड़ा", unicodedata.normalize("NFC", "हिन्दी-घोड़ा-0.png")),
        (f"{'x' * 59} y", "x" * 59 + "-0.png"),
        ("x" * 300, "x" * 60 + "-0.png"),
        ("赤" * 300, "赤" * 40 + "-0.png"),
    ],
)
def test_default_file_names_come_from_prompts(prompt: str, name: str) -> None:
    (output,) = choose_output_files(None, [prompt], [0], False)
    assert output.path == Path(name)


def test_default_file_names_have_only_letters_that_the_file_system_encodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    outputs = choose_output_files(None, ["красный cube", "куб"], [0], False)
    assert [output.path.name for output in outputs] == ["cube-0.png", "image-0.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected a file's name in --out, found '.'; name an image"),
        ("x-{index}.png", "expected only {seed}, {prompt} and {number} in braces in --out, found {index}"),
        (
            "x-{seed:04d}.png",
            "expected only {seed}, {prompt} and {number} in braces in --out, found {seed:04d}",
        ),
        ("{seed}/x.png", "expected placeholders in the file's name alone, found one in the folder {seed}"),
    ],
)
def test_rejects_names_that_cannot_be_filled_in(default_bundle: Path, name: str, message: str) -> None:
    assert_error(run(PROMPT, "--out", name), 2, message)


def test_rejects_an_empty_name_of_a_bundle(default_bundle: Path) -> None:
    assert_error(run(PROMPT, "--bundle", ""), 2, "expected the folder of a bundle, found an empty name")


PROMPTS = ["red cube", "blue sphere", "red cube"]


@pytest.fixture
def prompts_txt(workdir: Path) -> Path:
    path = workdir / "prompts.txt"
    path.write_text("\ufeffred cube\n\n  blue sphere\nred cube", encoding="utf-8")
    return path


@pytest.mark.parametrize("piped", [False, True])
def test_generates_an_image_for_each_prompt_of_a_file_or_stdin(
    default_bundle: Path, prompts_txt: Path, monkeypatch: pytest.MonkeyPatch, piped: bool
) -> None:
    stdin = None if not piped else prompts_txt.read_bytes()
    arguments = ["--prompts", "-" if piped else str(prompts_txt), "--steps", "2", "--seed", "3"]
    result = CliRunner().invoke(cli.run, [*arguments, "--engine", "onnxruntime"], input=stdin)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["red-cube-3.png", "blue-sphere-3.png", "red-cube-3-2.png"]
    expected = Generator.load(default_bundle, "onnxruntime")(PROMPTS, steps=2, seed=3)
    for name, prompt, expected_image in zip(result.stdout.split(), PROMPTS, expected, strict=True):
        with Image.open(name) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected_image))
            assert json.loads(image.info["tpx"])["prompt"] == prompt


@pytest.mark.parametrize(
    ("out", "names", "sizes"),
    [
        (None, ["red-cube-0", "blue-sphere-0"], [(24, 8)] * 2),
        ("{prompt}.png", ["red-cube", "blue-sphere"], [(24, 8)] * 2),
        (
            "x-{seed}-{prompt}.png",
            [f"x-{seed}-{w}" for w in ("red-cube", "blue-sphere") for seed in (0, 1)],
            [(12, 8)] * 4,
        ),
    ],
)
def test_each_prompt_gets_one_file_or_one_per_seed(
    fake_bundle: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str | None,
    names: list[str],
    sizes: list[tuple[int, int]],
) -> None:
    use_engine(monkeypatch, FakeEngine())
    (workdir / "prompts.txt").write_text("red cube\nblue sphere\n")
    flags = [] if out is None else ["--out", out]
    result = run("--prompts", "prompts.txt", "--bundle", fake_bundle, "-n", 2, "--steps", 1, *flags)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [f"{name}.png" for name in names]
    found_sizes = []
    for name in result.stdout.split():
        with Image.open(name) as image:
            found_sizes.append(image.size)
    assert found_sizes == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prompts", "none.txt"],
            "expected a file of prompts, one per line, at none.txt, found: No such file",
        ),
        (["--prompts", "empty.txt"], "expected prompts in empty.txt, one per line, found none; write some"),
        (["--prompts", "prompts.txt", PROMPT], "expected PROMPT or --prompts, found both"),
        (
            ["--prompts", "wrong.txt"],
            "wrong.txt, line 3: expected words of this model's vocabulary, found 'zebra'",
        ),
        (["--prompts", "prompts.txt", "--depth", "9"], "error: expected a depth of"),
        (
            ["--prompts", "prompts.txt", "--out", "a.png"],
            "expected a file for each of 3 prompts, found one name for several in --out a.png; add {number}",
        ),
        (["--prompts", "prompts.txt", "--out", "{prompt}.png"], "expected a file for each of 3 prompts"),
    ],
)
def test_rejects_bad_prompt_files_and_output_names_for_prompts(
    default_bundle: Path, prompts_txt: Path, arguments: list[str], message: str
) -> None:
    (prompts_txt.parent / "empty.txt").write_text(" \n")
    (prompts_txt.parent / "wrong.txt").write_text("red cube\n\na zebra\n")
    files_before = sorted(path.name for path in prompts_txt.parent.iterdir())
    assert_error(run(*arguments), 2, message)
    assert sorted(path.name for path in prompts_txt.parent.iterdir()) == files_before


def test_settings_in_asks_for_the_parsed_json() -> None:
    with pytest.raises(BadInput, match=r"expected json.loads\(image.info\[.tpx.\]\), found image.info"):
        settings_in({"parameters": "a red cube", "tpx": '{"prompt": "a red cube"}'})


@pytest.mark.parametrize(
    "changes",
    [
        *({name: float("inf")} for name in ("seed", "steps", "class_id", "num_images", "guidance_every")),
        *({name: 10**400} for name in ("guidance", "strength")),
        *({"guidance_interval": [0.0, end]} for end in (10**400, float("nan"), "1", None)),
        *({"guidance_interval": value} for value in (0.5, [0.5], [0.0, 0.5, 1.0])),
        *({"seed": value} for value in (3.7, True, "3", [3], None)),
        *({"steps": value} for value in (2.9, True)),
        *({"prompt": value} for value in (3, None, ["a"])),
    ],
)
def test_settings_of_another_type_are_rejected(changes: dict[str, Any]) -> None:
    good = {
        "prompt": "a",
        "seed": 3,
        "guidance": 2,
        "strength": 0.5,
        "guidance_interval": [0, 1],
        "num_images": 2,
    }
    assert settings_in({**good, "bundle": "x"}) == good
    with pytest.raises(BadInput, match=f"expected settings that tpx-run wrote, found {next(iter(changes))} "):
        settings_in(good | changes)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_like_reads_the_settings_in_other_formats(default_bundle: Path, suffix: str) -> None:
    result = run(PROMPT, "--steps", 3, "--seed", 4, "--out", f"{{seed}}.{suffix}", "-n", 2)
    assert result.stdout.split() == [f"4.{suffix}", f"5.{suffix}"]
    assert run("--like", f"5.{suffix}", "--out", "again.png").exit_code == 0
    assert run(PROMPT, "--steps", 3, "--seed", 5, "--out", "direct.png").exit_code == 0
    assert Path("again.png").read_bytes() == Path("direct.png").read_bytes()


def test_like_reproduces_an_image_from_its_metadata(default_bundle: Path) -> None:
    flags = ["--seed", "5", "--steps", "3", "--guidance", "2.5", "--guidance-interval", "0.2", "0.9"]
    flags += ["--sampler", "heun", "--depth", "2", "--negative-prompt", "green", "--guidance-every", "2"]
    assert run(PROMPT, *flags, "--out", "a.png").exit_code == 0
    again = run("--like", "a.png", "--out", "b.png")
    assert again.exit_code == 0, again.output
    other = run("--steps", 4, "--like", "a.png", "--out", "c.png", "blue sphere")
    assert other.exit_code == 0, other.output
    facts = []
    for name in "abc":
        with Image.open(f"{name}.png") as image:
            facts.append((json.loads(image.info["tpx"]), np.asarray(image)))
    assert facts[1][0] == facts[0][0]
    np.testing.assert_array_equal(facts[1][1], facts[0][1])
    assert facts[2][0] == facts[0][0] | {"steps": 4, "prompt": "blue sphere"}
    assert "notice" not in again.stderr


def test_like_asks_for_the_image_and_says_what_differs(default_bundle: Path) -> None:
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(name)
    Image.new("L", (64, 64), "white").save("mask.png")
    assert (
        run(PROMPT, "--steps", 2, "--image", "red.png", "--mask", "mask.png", "--out", "a.png").exit_code == 0
    )
    message = (
        "expected the image that the image of --like was generated from, found none; give it with --image"
    )
    assert_error(run("--like", "a.png", "--out", "b.png"), 2, message)
    same = run("--like", "a.png", "--image", "red.png", "--mask", "mask.png", "--out", "b.png")
    assert (same.exit_code, "notice" in same.stderr) == (0, False)
    other = run("--like", "a.png", "--image", "blue.png", "--out", "c.png")
    assert "notice: the image of --like was generated with another image\n" in other.stderr
    assert "notice: the image of --like was generated with a mask\n" in other.stderr
    assert run(PROMPT, "--steps", 2, "--image", "red.png", "--out", "d.png").exit_code == 0
    masked = run("--like", "d.png", "--image", "red.png", "--mask", "mask.png", "--out", "e.png")
    assert "notice: the image of --like was generated with no mask\n" in masked.stderr


@pytest.mark.parametrize("edit", [{"seed": None}, {"depth": [3]}, {"guidance_interval": 0.5}])
def test_like_rejects_settings_of_other_types(default_bundle: Path, edit: dict[str, object]) -> None:
    assert run(PROMPT, "--steps", 2, "--out", "a.png").exit_code == 0
    with Image.open("a.png") as image:
        facts = json.loads(image.text["tpx"]) | edit
        image.info["tpx"] = json.dumps(facts)
        save_image(image, Path("b.png"), replace=True)
    [name] = edit
    assert_error(run("--like", "b.png"), 2, f"expected settings that tpx-run wrote, found {name} ")


def test_like_of_an_image_without_t5_takes_a_bundle_that_never_had_it(default_bundle: Path) -> None:
    assert run(PROMPT, "--steps", 2, "--out", "a.png").exit_code == 0
    with Image.open("a.png") as image:
        image.info["tpx"] = json.dumps(json.loads(image.text["tpx"]) | {"left_out": ["text_encoder_3"]})
        save_image(image, Path("b.png"), replace=True)
    assert run("--like", "b.png", "--out", "c.png").exit_code == 0
    assert_error(run("--like", "b.png", "--no-t5"), 2, "expected a bundle with T5 to leave out, found ")


def test_like_reproduces_a_grid(default_bundle: Path) -> None:
    assert run(PROMPT, "--steps", 2, "-n", 3, "--out", "a.png").exit_code == 0
    assert run("--like", "a.png", "--out", "b.png").exit_code == 0
    assert run("--like", "a.png", "-n", 1, "--out", "c.png").exit_code == 0
    with Image.open("a.png") as grid, Image.open("b.png") as again, Image.open("c.png") as single:
        np.testing.assert_array_equal(np.asarray(again), np.asarray(grid))
        assert single.size < grid.size


def test_prompts_of_a_file_take_the_other_settings_of_the_image(
    default_bundle: Path, prompts_txt: Path
) -> None:
    assert run(PROMPT, "--steps", 2, "--seed", 5, "--out", "a.png").exit_code == 0
    result = run("--like", "a.png", "--prompts", prompts_txt)
    assert result.exit_code == 0, result.output
    for name in result.stdout.split():
        with Image.open(name) as image:
            facts = json.loads(image.info["tpx"])
        assert (facts["steps"], facts["seed"]) == (2, 5) and facts["prompt"] != PROMPT
    assert len(result.stdout.split()) == 3


def test_like_prints_a_notice_for_an_image_of_another_bundle(
    fake_bundle: Path, default_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(PROMPT, "--steps", 1, "--out", "a.png").exit_code == 0
    use_engine(monkeypatch, FakeEngine())
    result = run("--like", "a.png", "--bundle", fake_bundle, "--depth", 1, "--out", "b.png", "red cube")
    assert result.exit_code == 0, result.output
    assert "notice: the image of --like was generated with another bundle, 'tiny'\n" in result.stderr


@pytest.mark.parametrize("metadata", [None, "{", "[1]"])
def test_like_rejects_an_image_without_settings(default_bundle: Path, metadata: str | None) -> None:
    image = Image.new("RGB", (8, 8))
    image.info.update({"tpx": metadata} if metadata else {})
    save_image(image, "a.png")
    message = "expected an image that tpx-run wrote, found a.png without its settings; name another"
    assert_error(run("--like", "a.png"), 2, message)
    assert_error(run("--like", "none.png"), 2, "expected an image in none.png, found: No such file")


@pytest.mark.parametrize("out", [None, "a.png"])
def test_a_file_created_during_generation_is_not_overwritten(
    fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    engine = use_engine(monkeypatch, FakeEngine())
    decode, other_file = engine.functions["vae_decoder/model.onnx"], workdir / (out or "red-cube-0.png")

    def decode_and_create_file(inputs: Arrays) -> Arrays:
        other_file.write_text("theirs")
        return decode(inputs)

    engine.functions["vae_decoder/model.onnx"] = decode_and_create_file
    result = run("red cube", "--bundle", fake_bundle, *(["--out", out] if out else []))
    assert other_file.read_text() == "theirs"
    if out:
        assert result.exit_code == 2
        assert "expected a new file, found a.png there already; replace it with --force" in result.stderr
    else:
        assert (result.exit_code, result.stdout) == (0, "red-cube-0-2.png\n")


@pytest.mark.parametrize("closed", ["2>&-", "<&-"])
def test_runs_with_closed_stdin_or_stderr(tiny_bundle: Path, workdir: Path, closed: str) -> None:
    command = f"{sys.executable} -c 'from tpx_runtime.cli import run; run()' --bundle {tiny_bundle} --steps 1"
    prompt = "--prompts -" if closed == "<&-" else "'red cube'"
    result = subprocess.run(f"{command} {prompt} {closed}", shell=True, capture_output=True, text=True)
    if closed == "<&-":
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == "error: expected prompts in -, one per line, found none; write some\n"
    else:
        assert (result.returncode, result.stdout) == (0, "red-cube-0.png\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="expected /dev/full, found none")
@pytest.mark.parametrize("argument", [None, "--version", "--help"])
def test_standard_output_on_a_full_disk_is_reported(tiny_bundle: Path, argument: str | None) -> None:
    code = "from tpx_runtime.cli import info; info()"
    command = [sys.executable, "-c", code, argument or str(tiny_bundle)]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert (
        result.stderr
        == "error: expected room for the output, found: No space left on device; free some space\n"
    )


def test_a_file_name_that_stdout_cannot_encode_is_escaped(tiny_bundle: Path, workdir: Path) -> None:
    code = "from tpx_runtime.cli import run; run()"
    arguments = ["--bundle", str(tiny_bundle), "--steps", "1", "--out", "\u7ea2.png", "red cube"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    assert (result.returncode, result.stdout) == (0, "\\u7ea2.png\n"), result.stderr
    assert (workdir / "\u7ea2.png").exists()


def test_force_overwrites_a_file(default_bundle: Path) -> None:
    Path("a.png").write_text("before")
    assert run(PROMPT, "--steps", 1, "--out", "a.png", "--force").exit_code == 0
    with Image.open("a.png") as image:
        assert image.size == (64, 64)


def test_the_bundle_option_overrides_the_environment(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPX_BUNDLE", "/no/such/place")
    assert run(PROMPT, "--steps", 1, "--bundle", tiny_bundle).exit_code == 0
    assert_error(run(PROMPT), 3, "expected a bundle (a folder with manifest.json) at /no/such/place")


def test_the_sample_bundle_in_the_current_folder_is_found(
    tiny_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "SAMPLE_BUNDLE", Path("bundles/shapes"))
    (workdir / "bundles").mkdir()
    (workdir / "bundles/shapes").symlink_to(tiny_bundle)
    assert find_bundle(None) == Path("bundles/shapes")
    assert run(PROMPT, "--steps", 1).exit_code == 0


def test_help_names_every_sampler_and_engine() -> None:
    text = " ".join(run("--help").stdout.split())
    assert run("-h").stdout == run("--help").stdout
    assert all(name in text for samplers in SAMPLERS_FOR.values() for name in samplers)
    assert all(name in text for name in ENGINES)
    assert all(name in " ".join(verify("--help").stdout.split()) for name in ENGINES)


# tpx-run: image-to-image and inpainting


@pytest.fixture
def start_png() -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save("start.png")
    return Path("start.png")


@pytest.mark.parametrize("strength", [None, 0.3, 1.0])
def test_image_to_image_gives_the_same_image_as_the_generator(
    default_bundle: Path, start_png: Path, strength: float | None
) -> None:
    flags = [] if strength is None else ["--strength", strength]
    assert run(PROMPT, "--image", start_png, *flags, "--seed", 3, "--out", "a.png").exit_code == 0
    with Image.open(start_png) as input_image, pytest.warns(ImageResized):
        (expected,) = Generator.load(default_bundle, "onnxruntime")(
            PROMPT, image=input_image, strength=strength, seed=3
        )
    with Image.open("a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
        assert json.loads(image.text["tpx"])["strength"] == (strength or 0.6)
        assert f"Denoising strength: {strength or 0.6}" in image.text["parameters"]


def test_inpainting_changes_pixels_only_where_the_mask_is_white(
    default_bundle: Path, start_png: Path
) -> None:
    mask = Image.new("1", (120, 90))
    mask.paste(1, (0, 0, 60, 90))
    mask.save("mask.png")
    result = run(PROMPT, "--image", start_png, "--mask", "mask.png", "--strength", 1, "--out", "a.png")
    assert result.exit_code == 0
    assert (
        "notice: the input image of 120x90 pixels is resized and cropped to the model's 64x64\n"
        in result.stderr
    )
    with Image.open(start_png) as input_image, pytest.warns(ImageResized):
        kept = np.asarray(Generator.load(default_bundle, "onnxruntime").edit(input_image).image)
    with Image.open("a.png") as image:
        np.testing.assert_array_equal(np.asarray(image)[:, 32:], kept[:, 32:])
        assert (np.asarray(image)[:, :32] != kept[:, :32]).mean() > 0.5


def test_images_finished_before_an_interrupt_are_kept_and_printed(
    fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = use_engine(monkeypatch, FakeEngine())
    decode = engine.functions["vae_decoder/model.onnx"]

    def interrupted(inputs: Arrays) -> Arrays:
        if len([name for name, _ in engine.calls if name.startswith("vae_decoder")]) > 2:
            raise KeyboardInterrupt
        return decode(inputs)

    engine.functions["vae_decoder/model.onnx"] = interrupted
    result = run("red cube", "--bundle", fake_bundle, "-n", 6, "--batch-size", 2, "--out", "a-{seed}.png")
    assert result.exit_code == 130
    assert result.stdout.split() == [f"a-{seed}.png" for seed in range(4)]
    assert result.stderr.splitlines()[-1] == "error: cancelled"
    assert sorted(path.name for path in workdir.iterdir()) == result.stdout.split()


def test_a_random_seed_is_printed_and_stored_in_the_image(
    fake_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, FakeEngine())
    seeds = set()
    for word in ("random", "RANDOM"):
        result = run("red cube", "--bundle", fake_bundle, "--seed", word)
        (seed_line,) = [line for line in result.stderr.splitlines() if line.startswith("seed: ")]
        assert result.stdout == f"red-cube-{seed_line.removeprefix('seed: ')}.png\n"
        with Image.open(result.stdout.strip()) as image:
            seed = json.loads(image.info["tpx"])["seed"]
        assert seed_line == f"seed: {seed}"
        seeds.add(seed)
    assert len(seeds) == 2


def test_no_verify_skips_the_hashes(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    content = bytearray((copy / "vae_decoder/weights.data").read_bytes())
    content[0] ^= 1
    (copy / "vae_decoder/weights.data").write_bytes(content)
    assert_error(run(PROMPT, "--bundle", copy), 3, "expected SHA-256")
    assert run(PROMPT, "--bundle", copy, "--no-verify").exit_code == 0
    assert_error(run(PROMPT, "--bundle", copy, "--engine", "x"), 2, "expected an engine of auto")


def test_force_allows_overwriting_the_input_image(default_bundle: Path, start_png: Path) -> None:
    before = start_png.read_bytes()
    assert run(PROMPT, "--image", start_png, "--out", start_png).exit_code == 2
    assert start_png.read_bytes() == before
    assert run(PROMPT, "--image", start_png, "--out", start_png, "--force").exit_code == 0
    with Image.open(start_png) as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("flags", "steps", "batches"),
    [
        ((), 10, 1),
        (("-n", 9), 10, 2),
        (("--image", "start.png", "--strength", 0.25), 3, 1),
        (("--image", "start.png", "--strength", 0.25, "-n", 9), 3, 2),
        (("--sampler", "heun"), 10, 1),
    ],
)
def test_the_progress_bar_counts_the_steps_taken(
    fake_bundle: Path,
    start_png: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[object, ...],
    steps: int,
    batches: int,
) -> None:
    shown: list[tuple[int, str]] = []

    @contextmanager
    def fake_progress(label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        assert total == steps * batches
        yield lambda step, message: shown.append((step, message))

    use_engine(monkeypatch, FakeEngine())
    monkeypatch.setattr("tpx_runtime.progress.progress", fake_progress)
    assert run("red cube", "--bundle", fake_bundle, "--steps", 10, *flags).exit_code == 0
    expected = [(step, "" if step % steps else "decoding") for step in range(1, steps * batches + 1)]
    assert shown == [(0, "loading"), *expected, (steps * batches, "")]


def test_rejects_an_image_for_a_bundle_without_vae_encoder(
    fake_bundle: Path, start_png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, FakeEngine())
    without_encoder(fake_bundle)
    message = "expected a bundle with a vae_encoder to start from an image, found fake without one; leave out"
    assert_error(run("red cube", "--bundle", fake_bundle, "--image", start_png), 2, message)


# tpx-run: class-conditional bundles


def test_generates_an_image_of_a_class(classes: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = use_engine(monkeypatch, FakeEngine(manifest=CLASSES))
    result = run("--class", 7, "--bundle", classes)
    assert result.exit_code == 0
    assert result.stdout == "class-7-0.png\n"
    assert run("--class", 7, "--bundle", classes).stdout == "class-7-0-2.png\n"
    with Image.open("class-7-0.png") as image:
        facts = json.loads(image.text["tpx"])
        assert image.text["parameters"].startswith("class 7\nSteps: 3, Sampler: ddim, ")
    assert facts["class_id"] == 7
    assert "strength" not in facts
    class_ids = [inputs["class_id"] for name, inputs in engine.calls if name == "transformer/conditions.onnx"]
    assert {tuple(np.unique(ids)) for ids in class_ids} == {(7, 13)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "expected PROMPT, --prompts or --class, found none",
        ),
        (
            ["--class", "13"],
            "expected a class in 0..12 (this bundle is class-conditional), found 13; name one with -",
        ),
        (["--class", "-1"], "expected a class in 0..12 (this bundle is class-conditional), found -1"),
        (
            [PROMPT],
            "expected a class and no prompt (this bundle is class-conditional), found a prompt; leave it out",
        ),
        (
            [PROMPT, "--class", "3"],
            "expected a class and no prompt (this bundle is class-conditional), found a promp",
        ),
        (
            ["--class", "3", "--negative-prompt", "red"],
            "expected a class and no prompt (this bundle is class-conditional),",
        ),
        (["--class", "3", "--sampler", "euler"], "expected a sampler of ddpm, ddim, found 'euler'"),
        (
            ["--class", "3", "--image", "start.png"],
            "found that classes predicts epsilon; leave out the image",
        ),
    ],
)
def test_rejects_options_that_do_not_fit_a_class_conditional_bundle(
    classes: Path,
    start_png: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    engine = use_engine(monkeypatch, FakeEngine(manifest=CLASSES))
    assert_error(run(*arguments, "--bundle", classes), 2, message)
    assert engine.opened == []
    assert list(workdir.iterdir()) == [workdir / "start.png"]


# tpx-run: several text encoders


def test_a_warning_of_the_engine_is_one_notice(three_encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = use_engine(monkeypatch, FakeEngine(manifest=THREE_ENCODERS))
    open_graph = engine.open

    def open_with_warning(path: Path) -> object:
        warnings.warn("runs without\na CUDA graph", UserWarning, stacklevel=2)
        return open_graph(path)

    monkeypatch.setattr(engine, "open", open_with_warning)
    result = run("red cube", "--bundle", three_encoders)
    assert (result.exit_code, result.stdout) == (0, "red-cube-0.png\n")
    assert result.stderr.splitlines().count("notice: runs without a CUDA graph") == 1
    assert "Warning" not in result.stderr
    monkeypatch.setattr(
        Generator, "decode", lambda *_: (_ for _ in ()).throw(EngineFailed("expected x, found y"))
    )
    failed = run("red cube", "--bundle", three_encoders)
    assert failed.exit_code == EngineFailed.exit_code
    assert failed.stderr.splitlines()[-2:] == [
        "notice: runs without a CUDA graph",
        "error: expected x, found y",
    ]


def test_no_t5_leaves_out_the_t5_encoder(three_encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = use_engine(monkeypatch, FakeEngine(manifest=THREE_ENCODERS))
    assert run("red cube", "--bundle", three_encoders, "--no-t5").exit_code == 0
    assert not any(name.startswith("text_encoder_3") for name in engine.opened)
    with Image.open("red-cube-0.png") as image:
        assert json.loads(image.text["tpx"])["left_out"] == ["text_encoder_3"]
    engine.opened.clear()
    assert run("--like", "red-cube-0.png", "--bundle", three_encoders, "--out", "again.png").exit_code == 0
    assert not any(name.startswith("text_encoder_3") for name in engine.opened)
    like = ("--like", "red-cube-0.png", "--bundle")
    assert run(*like, three_encoders, "--t5", "--out", "with-t5.png").exit_code == 0
    assert any(name.startswith("text_encoder_3") for name in engine.opened)
    assert run("red cube", "--bundle", three_encoders, "--out", "whole.png").exit_code == 0
    assert any(name.startswith("text_encoder_3") for name in engine.opened)


class TruncatingTokenizer:
    """A tokenizer that truncates after five words."""

    text_tokens = 8

    def encode(self, prompt: str) -> Encoding:
        words = prompt.split()
        return Encoding([len(word) for word in words][:5] + [0] * (8 - min(len(words), 5)), len(words) - 5)

    def encode_empty(self) -> Encoding:
        return Encoding([0] * 8)


def test_a_truncated_prompt_gives_one_notice_per_run(
    three_encoders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = use_engine(monkeypatch, FakeEngine(manifest=THREE_ENCODERS))
    monkeypatch.setattr("tpx_runtime.conditioning.load_tokenizer", lambda path: TruncatingTokenizer())
    command = ("a red\ncube on two spheres", "--bundle", three_encoders, "--no-t5", "-n", 3)
    # Python itself would show a repeated warning only once.
    for _ in range(2):
        result = run(*command)
        assert result.exit_code == 0
        assert result.stderr.splitlines()[:2] == [
            r"notice: the prompt 'a red\ncube on two spheres' is too long: its last token is not read by "
            "text_encoder, text_encoder_2",
            f"engine: {engine.name} (chosen by auto)",
        ]
        assert "notice" not in "".join(result.stderr.splitlines()[2:])
        assert result.stdout.startswith("a-red-cube-on-two-spheres-0")


def test_a_rejected_command_prints_no_truncation_notice(
    three_encoders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, FakeEngine(manifest=THREE_ENCODERS))
    monkeypatch.setattr("tpx_runtime.conditioning.load_tokenizer", lambda path: TruncatingTokenizer())
    Image.new("RGB", (8, 8)).save("black.png")
    command = (
        "a red cube on two spheres",
        "--bundle",
        three_encoders,
        "--no-t5",
        "--image",
        "black.png",
    )
    assert_error(run(*command, "--mask", "black.png"), 2, "expected a mask that is white where to repaint")


# tpx-run: errors give one line, no traceback and no file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["red zebra"], "found 'zebra'"),
        (["red cubes"], "found 'cubes' (similar: cube); use other words"),
        ([""], "expected a prompt with words, found none in ''"),
        (["🙂"], "expected a prompt with words, found none in '🙂'"),
        (["red " * 2500], "expected a prompt of at most 10 words and punctuation marks, found 2500"),
        ([PROMPT, "--depth", "0"], "expected a depth of 1, 2, 3 (this bundle's), found 0"),
        ([PROMPT, "--depth", "4"], "expected a depth of 1, 2, 3 (this bundle's), found 4"),
        ([PROMPT, "--steps", "0"], "expected steps to be a whole number in 1..1000, found 0"),
        ([PROMPT, "--steps", "-3"], "found -3"),
        ([PROMPT, "--seed", "-1"], "expected seed to be a whole number in 0.."),
        ([PROMPT, "--guidance", "nan"], "expected guidance to be a number in 1..1000 (1 is off), found nan"),
        (
            [PROMPT, "--guidance-interval", "0.6", "0.2"],
            "expected guidance_interval to be two increasing numbers in 0..1, found (0.6, 0.2)",
        ),
        (
            [PROMPT, "--guidance", "1", "--guidance-interval", "0", "0.5"],
            "expected guidance other than 1 with guidance_interval, found 1; leave out one of them",
        ),
        (
            [PROMPT, "--guidance", "1", "--guidance-every", "2"],
            "expected guidance other than 1 with guidance_every, found 1; leave out one of them",
        ),
        (
            [PROMPT, "--guidance-every", "0"],
            "expected guidance_every to be a whole number of at least 1, found 0",
        ),
        (
            [PROMPT, "--cache-interval", "0"],
            "expected cache_interval to be a whole number of at least 1, found 0",
        ),
        ([PROMPT, "--no-t5"], "expected a bundle with T5 to leave out, found "),
        ([PROMPT, "--sampler", "ddim"], "expected a sampler of euler, heun, dpmpp2m, unipc, found 'ddim'"),
        ([PROMPT, "-n", "0"], "Invalid value for '-n' / '--num-images': 0 is not in the range x>=1"),
        ([PROMPT, "--engine", "tensorflow"], "expected an engine of auto, "),
        (
            [PROMPT, "--negative-prompt", "zebra"],
            "negative prompt: expected words of this model's vocabulary, found 'zebra'",
        ),
        ([PROMPT, "--seed", "any"], "expected a whole number or random, found 'any'"),
        (
            [PROMPT, "--guidance", "1", "--negative-prompt", "blue"],
            "expected no negative prompt at guidance 1",
        ),
        ([], "expected PROMPT, --prompts or --class, found none; describe the image to generate"),
        (
            [PROMPT, "--class", "3"],
            "expected a prompt and no class (this bundle takes prompts), found class 3",
        ),
        (
            ["--class", "3"],
            "expected a prompt and no class (this bundle takes prompts), found class 3; leave",
        ),
        ([PROMPT, "--sampler", "ddpm"], "expected a sampler of euler, heun, dpmpp2m, unipc, found 'ddpm'"),
        (
            [PROMPT, "--mask", "start.png"],
            "expected an image with a mask, found none; give the image to start",
        ),
        (
            [PROMPT, "--strength", "0.5"],
            "expected an image with a strength, found none; give the image to sta",
        ),
        (
            [PROMPT, "--image", "start.png", "--strength", "0"],
            "expected strength above 0 and at most 1, found 0.0",
        ),
        ([PROMPT, "--image", "start.png", "--strength", "1.1"], "above 0 and at most 1, found 1.1"),
        ([PROMPT, "--image", "start.png", "--strength", "nan"], "above 0 and at most 1, found nan"),
        (
            [PROMPT, "--image", "no.png"],
            "expected an image in no.png, found: No such file or directory; name a",
        ),
        ([PROMPT, "--image", "folder.png"], "expected an image in folder.png, found: Is a directory"),
        (
            [PROMPT, "--image", "here.png"],
            "expected an image in here.png, found: no readable image; name",
        ),
        (
            [PROMPT, "--image", "start.png", "--mask", "here.png"],
            "an image in here.png, found: no readable",
        ),
        (
            [PROMPT, "--image", "start.png", "--mask", "start.png"],
            "a mask that is white where to repaint, found",
        ),
        (
            [PROMPT, "--out", "a.gif"],
            "expected an output name that ends in .png, .jpg, .jpeg or .webp, found a.gif",
        ),
        (
            [PROMPT, "--out", "missing/a.png"],
            "expected a folder missing to write a.png into, found none; make it",
        ),
        ([PROMPT, "--out", "n" * 300 + ".png"], "found: File name too long"),
        (
            [PROMPT, "--out", "here.png"],
            "found here.png there already; replace it with --force, or keep it with --skip",
        ),
        ([PROMPT, "--out", "here.png/a.png"], "found: Not a directory"),
        (
            [PROMPT, "--skip-existing", "--out", "n" * 300 + ".png"],
            "found: File name too long; choose another",
        ),
        (
            [PROMPT, "--out", "two\nlines/a.png"],
            "expected a folder two lines to write a.png into, found none; make it",
        ),
        ([PROMPT, "--out", "folder.png"], "expected folder.png to be a file, found a folder"),
        (
            [PROMPT, "--width", "256"],
            "images have the size that the bundle was exported for (tpx-info BUNDLE",
        ),
        ([PROMPT, "-H", "256"], "for another, export one with tpx-export --image-size"),
        ([PROMPT, "--out", "folder.png", "--force"], "expected folder.png to be a file, found a folder"),
    ],
)
def test_rejects_bad_input(default_bundle: Path, workdir: Path, arguments: list[str], message: str) -> None:
    Path("here.png").write_text("before")
    Path("folder.png").mkdir()
    Image.new("RGB", (8, 8)).save("start.png")
    assert_error(run(*arguments), 2, message)
    assert sorted(path.name for path in workdir.iterdir()) == ["folder.png", "here.png", "start.png"]
    assert Path("here.png").read_text() == "before"


def test_rejects_a_run_without_any_bundle() -> None:
    assert_error(run(PROMPT), 2, "expected a bundle in --bundle, $TPX_BUNDLE or ")


@pytest.mark.parametrize(
    "arguments",
    [
        [PROMPT, "--class", "many"],
        [PROMPT, "--steps", "many"],
        [PROMPT, "--seed", "1,2"],
        [PROMPT, "--no-such"],
        [PROMPT, "more"],
    ],
)
def test_usage_errors_are_one_line(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith("; see run --help")
    assert result.stdout == ""


def test_usage_errors_of_a_command_group_are_one_line() -> None:
    for arguments, message in (
        (["draw"], "No such command 'draw'"),
        (["geneval", "--images", "0"], "0 is not in"),
    ):
        result = CliRunner().invoke(evaluation, arguments)
        assert result.exit_code == 2
        [line] = result.stderr.splitlines()
        assert line.startswith("error: ") and message in line and "; see " in line
    assert "Commands:" in CliRunner().invoke(evaluation, []).output


def test_rejects_a_folder_without_write_permission(
    default_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    # Simulated, because root, which often runs the tests, may write anywhere.
    monkeypatch.setattr("tpx_runtime.files.try_writing_into", deny)
    assert_error(run(PROMPT, "--out", "a.png"), 2, "a.png, found: Permission denied; choose another")


def test_rejects_a_damaged_bundle(copy: Path) -> None:
    weights = copy / "transformer/weights.data"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    assert_error(run(PROMPT, "--bundle", copy), 3, f"{weights}: expected SHA-256 ")


def test_rejects_an_engine_that_is_not_installed(
    default_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    message = (
        "expected the package openvino for engine openvino, found none; install it with `pip install 'tpx["
    )
    assert_error(run(PROMPT, "--engine", "openvino"), 4, message)
    assert_error(run(PROMPT), 4, "found none that runs here; install one with `pip install 'tpx[cpu]'`")


def use_engine(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> FakeEngine:
    monkeypatch.setattr("tpx_runtime.engine.resolve", lambda name, precision: engine)
    return engine


def test_a_non_finite_image_is_an_engine_failure(
    fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_decoder = {
        "vae_decoder/model.onnx": lambda inputs: {"image": np.full((1, 3, 8, 12), np.nan, np.float32)}
    }
    use_engine(monkeypatch, FakeEngine(nan_decoder))
    result = run("red cube", "--bundle", fake_bundle)
    assert result.exit_code == 5
    assert result.stderr.splitlines()[-1].startswith("error: expected finite numbers in the image, found NaN")
    assert list(workdir.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_no_file(
    fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, data: bytes) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    use_engine(monkeypatch, FakeEngine())
    monkeypatch.setattr(Path, "write_bytes", fail)
    result = run("red cube", "--bundle", fake_bundle)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "error: expected to write red-cube-0.png, found: No space left on device; free some space or choose another place"
    )
    assert list(workdir.iterdir()) == []


def test_existing_names_get_a_number_unless_force_is_given(
    fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, FakeEngine())
    command = ("A red cube.", "--bundle", fake_bundle)
    assert run(*command).stdout == "a-red-cube-0.png\n"
    assert run(*command).stdout == "a-red-cube-0-2.png\n"
    assert run(*command).stdout == "a-red-cube-0-3.png\n"
    assert run(*command, "--force").stdout == "a-red-cube-0.png\n"
    assert run(*command, "--seed", 1).stdout == "a-red-cube-1.png\n"
    assert len(list(workdir.iterdir())) == 4


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("x-{number}.png", ["x-1.png", "x-2.png", "x-3.png"]),
        ("x-{number}-{seed}.png", [f"x-{n}-{seed}.png" for n in (1, 2, 3) for seed in (4, 5)]),
        (None, ["red-cube-4.png", "blue-cube-4.png", "red-cube-4-2.png"]),
    ],
)
def test_skip_existing_generates_only_the_missing_files(
    name: str | None, files: list[str], fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that an interrupted run of many prompts can be resumed."""
    engine = use_engine(monkeypatch, FakeEngine())
    Path("prompts.txt").write_text("red cube\nblue cube\nred cube\n")
    command = ["--prompts", "prompts.txt", "--bundle", str(fake_bundle), "-n", "2", "--seed", "4"]
    command += ["--skip-existing", *(["--out", name] if name else [])]
    assert run(*command).stdout.split() == files
    before = {file: Path(file).read_bytes() for file in files}
    for missing in (files[1:2], files[::2], []):
        for file in missing:
            Path(file).unlink()
        engine.calls.clear()
        result = run(*command)
        assert result.exit_code == 0 and result.stdout.split() == missing
        assert f"{len(files) - len(missing)} of {len(files)} files are there already" in result.stderr
        decoded = [len(inputs["latents"]) for graph, inputs in engine.calls if graph.startswith("vae_dec")]
        assert sum(decoded) == len(missing) * 6 // len(files)
        assert {file: Path(file).read_bytes() for file in files} == before
    assert_error(run(*command, "--force"), 2, "expected --force or --skip-existing, found both")


@pytest.mark.parametrize(
    "graph",
    [
        "text_encoder/model.onnx",
        "transformer/conditions.onnx",
        "transformer/depth-2.onnx",
        "vae_decoder/model.onnx",
    ],
)
def test_ctrl_c_in_any_graph_gives_a_one_line_error(
    fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    def interrupt(inputs: object) -> dict[str, np.ndarray]:
        raise KeyboardInterrupt

    use_engine(monkeypatch, FakeEngine({graph: interrupt}))
    result = run("red cube", "--bundle", fake_bundle)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "error: cancelled"
    assert "Traceback" not in result.output
    assert list(workdir.iterdir()) == []


def test_ctrl_c_while_writing_leaves_no_file(
    fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Path, data: bytes) -> None:
        self.touch()
        raise KeyboardInterrupt

    use_engine(monkeypatch, FakeEngine())
    monkeypatch.setattr(Path, "write_bytes", interrupt)
    assert run("red cube", "--bundle", fake_bundle).exit_code == 130
    assert list(workdir.iterdir()) == []


def start(*arguments: object) -> subprocess.Popen[str]:
    """tpx-run as its own process, as a console script starts it."""
    code = "import sys; from tpx_runtime.cli import run; sys.exit(run())"
    root = Path(cli.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_a_signal_while_denoising_cancels_the_run(
    tiny_bundle: Path, workdir: Path, how: signal.Signals
) -> None:
    with start(PROMPT, "--bundle", tiny_bundle, "--steps", 1000, "--out", "a.png") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("denoising"):
                break
        process.send_signal(how)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "error: cancelled\n"
    assert output == ""
    assert list(workdir.iterdir()) == []


def test_a_file_name_that_is_not_utf8_is_printed_with_a_replacement(tiny_bundle: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with start(PROMPT, "--bundle", tiny_bundle, "--steps", 1, "--out", name) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "caf\ufffd.png\n"), errors
    assert Path(name).is_file()


def test_the_threads_option_overrides_the_environment(
    fake_bundle: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, FakeEngine())
    monkeypatch.setenv("TPX_THREADS", "7")
    assert run(PROMPT, "--bundle", fake_bundle).exit_code == 0
    assert os.environ["TPX_THREADS"] == "7"
    assert run(PROMPT, "--bundle", fake_bundle, "--threads", 2).exit_code == 0
    assert os.environ["TPX_THREADS"] == "2"
    assert_error(run(PROMPT, "--bundle", fake_bundle, "--threads", 0), 2, "Invalid value for '--threads'")
    monkeypatch.setenv("TPX_THREADS", "all")
    assert_error(run(PROMPT, "--bundle", fake_bundle), 2, "expected TPX_THREADS to be a whole number")


@pytest.mark.parametrize("variable", ["TPX_CUDA_GRAPHS", "TPX_DEVICE_LOOP"])
def test_an_invalid_variable_is_an_error_before_anything_is_loaded(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "maybe")
    message = f"expected {variable} to be 0 or 1, found 'maybe'"
    for command in (cli.run, cli.verify):
        assert_error(CliRunner().invoke(command, ["a red cube", "--engine", "none"]), 2, message)


# tpx-verify


def test_verify_prints_a_table_and_exits_with_zero(tiny_bundle: Path) -> None:
    result = verify(tiny_bundle)
    assert result.exit_code == 0
    assert result.stderr == "engine: onnxruntime (chosen by auto)\n"
    first, heading, *rows = result.stdout.splitlines()
    assert first == "tiny (fp32): 18 files, sizes and SHA-256 as in the manifest"
    assert heading.split() == ["part", "error", "tolerance", "same", "routes", "at", "least", "ok"]
    assert [row.split()[0] for row in rows] == [
        "text_encoder",
        *["transformer"] * 4,
        "vae_decoder",
        "vae_encoder",
    ]
    assert all(row.endswith("yes") for row in rows)
    assert len({len(row) for row in rows}) == 1


def test_verify_uses_the_bundle_from_the_environment(default_bundle: Path) -> None:
    assert verify("--engine", "onnxruntime").exit_code == 0


def test_the_table_is_aligned_and_marks_failed_parts() -> None:
    reports = [
        PartReport("text_encoder", 3.21e-7, 1e-4),
        PartReport("transformer depth 1", 0.031, 1e-4, 0.5, 0.99),
        PartReport("vae_decoder", float("inf"), 1e-4),
    ]
    assert cli.table(reports).splitlines() == [
        "part                      error  tolerance  same routes  at least  ok",
        "text_encoder            3.2e-07      1e-04            -         -  yes",
        "transformer depth 1     3.1e-02      1e-04       50.00%    99.00%  NO",
        "vae_decoder                 inf      1e-04            -         -  NO",
    ]


def test_verify_fails_if_a_part_is_out_of_tolerance(copy: Path) -> None:
    arrays = load_golden(Bundle.open(copy))
    arrays["image"] = arrays["image"] + np.float32(0.1)
    manifest = Bundle.open(copy).manifest
    np.savez(copy / GOLDEN, **arrays)
    seal(copy, manifest)
    result = verify(copy, "--engine", "onnxruntime")
    assert result.exit_code == 5
    assert result.stdout.splitlines()[-1].endswith("NO")
    engine_line, line = result.stderr.splitlines()
    assert engine_line == "engine: onnxruntime"
    assert line.startswith(
        "error: expected the golden outputs from engine onnxruntime, found vae_decoder with "
    )


def test_verify_rejects_a_damaged_or_missing_bundle(copy: Path) -> None:
    (copy / "vae_decoder/model.onnx").write_bytes(b"")
    assert_error(verify(copy), 3, "vae_decoder/model.onnx: expected ")
    assert_error(verify("nowhere"), 3, "expected a bundle (a folder with manifest.json) at nowhere")
    assert_error(verify(), 2, "expected a bundle in --bundle, $TPX_BUNDLE or ")


def test_verify_all_engines_continues_after_unusable_and_failing_engines(
    fake_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(inputs: object) -> dict[str, np.ndarray]:
        raise EngineFailed("depth-2.onnx: refused")

    def doubled(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"latents": 2 * vae_encoder(inputs)["latents"]}

    unusable = FakeEngine(name="unusable", reason="expected luck, found none")
    failing = FakeEngine({"transformer/depth-2.onnx": fail}, name="refusing")
    wrong = FakeEngine({"vae_encoder/model.onnx": doubled}, name="wrong")
    good = FakeEngine(name="good")

    def verify_on(*engines: FakeEngine) -> Result:
        monkeypatch.setattr("tpx_runtime.engine.ENGINES", {engine.name: engine for engine in engines})
        return verify(fake_bundle, "--all-engines")

    result = verify_on(unusable, failing, wrong, good)
    assert result.exit_code == 5
    assert result.stderr == "error: depth-2.onnx: refused\n"
    head, *blocks = result.stdout.rstrip().split("\n\n")
    assert head.startswith("fake (fp32): 14 files")
    assert blocks[0] == "unusable\nnot usable: expected luck, found none"
    assert blocks[1] == "refusing\nfailed: depth-2.onnx: refused"
    assert blocks[2].startswith("wrong\npart ")
    assert " NO\nfailed: expected the golden outputs from engine wrong, found vae_encoder with" in blocks[2]
    assert blocks[3].count(" yes") == 7

    result = verify_on(unusable, good)
    assert (result.exit_code, result.stderr) == (0, "")
    result = verify_on(unusable)
    assert result.exit_code == 4
    assert result.stderr.startswith("error: expected one of the engines ")


def test_verify_rejects_all_engines_together_with_engine(fake_bundle: Path) -> None:
    assert_error(
        verify(fake_bundle, "--all-engines", "--engine", "openvino"),
        2,
        "expected --engine or --all-engines, found both",
    )


def test_verify_rejects_an_unknown_engine_before_it_hashes_the_bundle(fake_bundle: Path) -> None:
    damaged = fake_bundle / "vae_decoder/model.onnx"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    assert_error(verify(fake_bundle), 3, "expected SHA-256 ")
    assert_error(verify(fake_bundle, "--engine", "luck"), 2, "expected an engine of auto, ")


def test_verify_all_engines_tries_every_engine(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "problem", lambda self: f"no {self.package}")
    result = verify(fake_bundle, "--all-engines")
    assert [name for name in ENGINES if f"\n{name}\nnot usable: no " in result.stdout] == list(ENGINES)
    assert result.exit_code == 4


def test_verify_can_be_interrupted(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(inputs: object) -> dict[str, np.ndarray]:
        raise KeyboardInterrupt

    use_engine(monkeypatch, FakeEngine({"vae_decoder/model.onnx": interrupt}))
    result = verify(fake_bundle)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("error: cancelled")


# tpx-info, and --version of every command


def info(*arguments: object) -> Result:
    return CliRunner().invoke(cli.info, [str(argument) for argument in arguments])


def test_info_shows_usable_engines_the_auto_choice_and_the_bundle(
    default_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = {name: replace(ENGINES["onnxruntime"], name=name) for name in ("away", "first", "second")}
    monkeypatch.setattr("tpx_runtime.info.ENGINES", engines)
    problems = {"away": "expected a driver, found none"}
    monkeypatch.setattr(Engine, "problem", lambda engine: problems.get(engine.name))
    result = info()
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert lines["tpx"].startswith(f"tpx {tpx_runtime.__version__}, Python 3.")
    assert lines["away"].split(maxsplit=1)[1] == "no   expected a driver, found none"
    assert "selected by --engine auto" in lines["first"] and "auto" not in lines["second"]
    opened = Bundle.open(default_bundle)
    assert lines["identity"].split()[1] == opened.hash
    assert lines["outputs"].split(maxsplit=1)[1] == "64x64 pixels, predicts velocity"
    assert lines["thinking"].endswith("depth 1, 2, 3")
    assert lines["defaults"].split(maxsplit=1)[1].startswith("euler, 4 steps, guidance 2")
    assert lines["inputs"].endswith(", image-to-image")


def test_info_of_an_image_shows_its_settings(default_bundle: Path) -> None:
    assert run(PROMPT, "--steps", 3, "--seed", 8, "--out", "a.jpg").exit_code == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in info("a.jpg").stdout.splitlines()}
    assert lines["prompt"] == PROMPT and lines["steps"] == "3" and lines["seed"] == "8"
    Image.new("RGB", (8, 8)).save("other.png")
    assert_error(info("other.png"), 2, "expected an image that tpx-run wrote, found other.png without")


def test_info_of_an_image_prints_no_control_characters(workdir: Path) -> None:
    image = Image.new("RGB", (8, 8))
    image.info["tpx"] = json.dumps({"prompt": "x\x1b]0;ti\ntle\x07", "a\x1bengine": "fake", "steps": 3})
    save_image(image, workdir / "a.png")
    lines = info("a.png").stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["prompt", "x\\x1b]0;ti tle\\x07"], ["a\\x1bengine", "fake"], ["steps", "3"]
    ]  # fmt: skip


def test_info_needs_no_bundle_but_rejects_a_path_that_is_not_one(workdir: Path) -> None:
    result = info()
    assert result.exit_code == 0
    assert "\nno bundle: expected a bundle in " in result.stdout
    result = info("nothing-here")
    assert result.exit_code == 3
    assert "onnxruntime " in result.stdout  # listed nevertheless
    assert result.stderr.startswith("error: expected a bundle (a folder with manifest.json) at nothing-here")
    result = info("")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: expected the folder of a bundle, found an empty name")


def test_info_offers_no_image_to_image_for_a_class_conditional_bundle(classes: Path) -> None:
    (line,) = [line for line in info(classes).stdout.splitlines() if line.startswith("inputs")]
    assert line.endswith("classes 0 to 12")


def test_info_shows_the_size_of_the_compiled_engines(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    assert f"compiled{'':<10}nothing" in info(copy).stdout
    (tmp_path / "copy.engines").mkdir()
    (tmp_path / "copy.engines" / RECORD).write_text("{}")
    assert f"compiled{'':<10}nothing" in info(copy).stdout
    (tmp_path / "copy.engines" / "some.engine").write_bytes(bytes(2_500_000))
    assert f"{tmp_path / 'copy.engines'}, 2.5 MB (safe to delete)" in info(copy).stdout
    (tmp_path / "all/copy").mkdir(parents=True)
    (tmp_path / "all/other.engine").write_bytes(bytes(1_000_000))
    monkeypatch.setenv("TPX_ENGINES", str(tmp_path / "all"))
    assert f"compiled{'':<10}nothing" in info(copy).stdout  # what belongs to other bundles does not count
    monkeypatch.setenv("TPX_ENGINES", too_long := "n" * 300)
    assert f"compiled{'':<10}{too_long}/copy, which cannot be read: File name too long" in info(copy).stdout


def test_every_command_prints_its_version() -> None:
    scripts = entry_points(group="console_scripts")
    commands = {
        script.name: script.load()
        for script in scripts
        if script.dist is not None and script.dist.name == "tpx"
    }
    assert {"tpx-run", "tpx-info", "tpx-export", "tpx-eval"} <= commands.keys()
    for name, command in commands.items():
        result = CliRunner().invoke(command, ["--version"])
        assert (result.exit_code, result.stdout) == (0, f"tpx {tpx_runtime.__version__}\n"), name
