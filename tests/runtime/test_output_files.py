"""Names that are generated for files."""

from pathlib import Path

import pytest

from tpx_runtime import output_files
from tpx_runtime.output_files import choose_output_files


def names(prompts: list[str], seed: int = 0, **options: bool) -> list[str]:
    outputs = choose_output_files(None, prompts, [seed], force=options.get("force", False))
    return [str(output.path) for output in outputs]


def test_generated_names_count_up_and_never_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x-2-2.png").touch()
    assert names(["x", "x", "x"], 2) == ["x-2.png", "x-2-3.png", "x-2-4.png"]
    assert names(["x", "x", "x"], 2, force=True) == ["x-2.png", "x-2-2.png", "x-2-3.png"]
    # The names of one prompt may be those of another with a number.
    assert names(["x 2", "x", "x", "x 2", "x"], 2, force=True) == [
        "x-2-2.png", "x-2.png", "x-2-3.png", "x-2-2-2.png", "x-2-4.png"
    ]  # fmt: skip
    assert names(["x", "x", "x 2", "x 2"], 2, force=True) == [
        "x-2.png",
        "x-2-2.png",
        "x-2-2-2.png",
        "x-2-2-3.png",
    ]


def test_many_prompts_of_one_name_do_not_all_count_from_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tried = list[str]()

    def recorded(name: str) -> Path:
        tried.append(name)
        return Path(name)

    monkeypatch.setattr(output_files, "Path", recorded)
    prompts = [f"{'long ' * 20}{number}" for number in range(500)]
    assert len(set(names(prompts))) == 500
    assert len(tried) <= 2 * 500
